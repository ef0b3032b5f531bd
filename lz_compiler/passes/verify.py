"""The verifier: what a rewritten graph must still be. A violation is LayerZero's own bug."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import torch_private


def interface(graph: fx.Graph) -> tuple[list[str], list[Any]]:
    """Placeholders, and of the outputs dtypes, sizes and devices: what a rewrite may not change."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in graph.nodes if n.op == "output")
    return inputs, [_facts(n) for n in pytree.tree_leaves(output.args)]


def _facts(node: object) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return (value.dtype, tuple(value.shape), value.device) if isinstance(value, Tensor) else str(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    sizes = len(one[1]) == len(other[1]) and all(map(torch_private.same_size, one[1], other[1]))
    return sizes and one[::2] == other[::2]


def verify(graph: fx.Graph, before: tuple[list[str], list[Any]]) -> None:
    """Well-formed, same inputs, same output shapes and dtypes, and every node that is read knows its value."""
    graph.lint()
    after = interface(graph)
    kept = before[0] == after[0] and len(before[1]) == len(after[1]) and all(map(_same, before[1], after[1]))
    assert kept, f"the rewrite changed the graph's interface: {before} -> {after}"
    for node in graph.nodes:
        if node.op == "call_function" and node.users:  # runtime assertions have neither users nor a value
            assert "val" in node.meta, f"{node.format_node()} has no value"
