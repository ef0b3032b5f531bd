"""Outputs keep eager's strides: an output that became part of a larger tensor (Inductor pads products, kernels merge them) is
copied, since Inductor returns a view as it is, whatever gaps it has. Any other output it brings into the strides asked for."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import torch_private
from ..capture import RESHAPES, VIEWS, propagate

aten = torch.ops.aten


Strides = tuple[Any, ...]


class Output(NamedTuple):
    """Strides of an output; sizes and strides of the tensor that it is a view of, and the first output that is a view of the same."""

    strides: Strides
    root_shape: Strides
    root_strides: Strides
    first: int


def output_strides(graph: fx.Graph) -> dict[int, Output]:
    """By position, what is to be kept of the graph's outputs."""
    found: dict[int, Output] = {}
    first: dict[fx.Node, int] = {}
    for i, node in enumerate(_outputs(graph)):
        if _is_strided(node):
            root, value = _root(node), _root(node).meta["val"]
            found[i] = Output(node.meta["val"].stride(), tuple(value.shape), value.stride(), first.setdefault(root, i))
    return found


def restore_output_strides_pass(graph: fx.Graph, before: dict[int, Output]) -> int:
    """Copy each output whose strides are no longer those of `before`, in place; returns how many.

    Outputs that shared a tensor still do: it is copied once, under all of them.
    """
    outputs, copies, copied = _outputs(graph), dict[fx.Node, fx.Node](), 0
    shared = Counter(known.first for known in before.values())
    output = graph.output_node()
    with graph.inserting_before(output), torch_private.fake_mode_of(graph):
        for i, (strides, root_shape, root_strides, first) in before.items():
            node, root, new = outputs[i], _root(outputs[i], root_shape), None
            value = root.meta["val"]
            moved = root.op == "call_function" and _same(tuple(value.shape), root_shape) and not _same(value.stride(), root_strides)
            if moved and shared[first] > 1 and root is _root(outputs[first], root_shape):
                new = _on_copy(graph, node, root, root_strides, copies)
            if _source(node) is not None and not any(_same(n.meta["val"].stride(), strides) for n in (new, node) if n):
                new = _copy(graph, node, strides)
                if moved and not _same(new.meta["val"].stride(), strides):  # eager's has gaps, or repeats elements
                    new = _on_copy(graph, node, root, root_strides, copies)
            if new is not None and _same(new.meta["val"].stride(), strides):
                output.replace_input_with(node, new)
                copied += 1
    return copied


def _copy(graph: fx.Graph, node: fx.Node, strides: Strides) -> fx.Node:
    """Without gaps, its dimensions in the order of `strides`."""
    order = sorted(range(len(strides)), key=lambda dim: strides[dim], reverse=True)
    dense = _call(graph, aten.permute.default, node, order)
    dense = _call(graph, aten.clone.default, dense, memory_format=torch.contiguous_format)
    return _call(graph, aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])


def _root(node: fx.Node, shape: Strides | None = None) -> fx.Node:
    """The tensor that a node is a view of. `shape`: the tensor's size once, in whose place a part of a larger one may be now."""
    part = node
    while (source := _source(node)) is not None:
        node = source
        if shape is None or (_is_strided(node) and _same(tuple(node.meta["val"].shape), shape)):
            part = node
    return part


def _source(node: fx.Node) -> fx.Node | None:
    """What a node is a view of, or None; the parts of a tensor that is split are views of the split."""
    viewed = node.target in (*RESHAPES, *VIEWS) and _is_strided(node.args[0])
    part = node.target is operator.getitem and _source(node.args[0]) is not None  # type: ignore[arg-type]
    return node.args[0] if viewed or part else None  # type: ignore[return-value]


def _on_copy(graph: fx.Graph, node: fx.Node, root: fx.Node, strides: Strides, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node as a view of its root's copy, which is made once."""
    if root not in copies:
        copies[root] = _copy(graph, root, strides)
    return _viewed_again(graph, node, copies)


def _viewed_again(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same view of the copy of its root."""
    if node in copies:
        return copies[node]
    source = _viewed_again(graph, node.args[0], copies)  # type: ignore[arg-type]
    return _call(graph, node.target, source, *node.args[1:], **node.kwargs)


def _call(graph: fx.Graph, op: Any, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(op, (x, *args), kwargs)
    propagate(node)
    return node


def _same(a: Strides, b: Strides) -> bool:
    return list(map(str, a)) == list(map(str, b))  # symbolic sizes: equal expressions, without a guard


def _outputs(graph: fx.Graph) -> list[Any]:
    return pytree.tree_leaves(graph.output_node().args)


def _is_strided(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.layout is torch.strided
