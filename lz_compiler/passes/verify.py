"""The verifier: what a rewritten graph must still be. A violation is LayerZero's own bug."""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import torch_private


def interface(graph: fx.Graph) -> tuple[list[str], list[str]]:
    """Placeholders and outputs as text: what a rewrite may not change."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in graph.nodes if n.op == "output")
    return inputs, [_facts(n) for n in pytree.tree_leaves(output.args)]


def _facts(node: object) -> str:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return f"{value.dtype} {[*map(torch_private.sampled, value.shape)]} {value.device}" if isinstance(value, Tensor) else str(value)


def verify(graph: fx.Graph, before: tuple[list[str], list[str]]) -> None:
    """Well-formed, same inputs, same output shapes and dtypes, and every node that is read knows its value."""
    graph.lint()
    assert interface(graph) == before, f"the rewrite changed the graph's interface: {before} -> {interface(graph)}"
    for node in graph.nodes:
        if node.op == "call_function" and node.users:  # runtime assertions have neither users nor a value
            assert "val" in node.meta, f"{node.format_node()} has no value"
