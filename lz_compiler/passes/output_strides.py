"""Outputs keep eager's strides: an output that became part of a larger tensor (Inductor pads products, kernels merge them) is
copied, since Inductor returns a view as it is, whatever gaps it has. Any other output it brings into the strides asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import torch_private
from ..capture import RESHAPES, VIEWS

aten = torch.ops.aten


def output_strides(graph: fx.Graph) -> dict[int, tuple[Any, ...]]:
    """Strides of the graph's outputs, by position."""
    return {i: node.meta["val"].stride() for i, node in enumerate(_outputs(graph)) if _is_strided(node)}


def restore_output_strides_pass(graph: fx.Graph, before: dict[int, tuple[Any, ...]]) -> int:
    """Copy each output whose strides are no longer those of `before`, in place; returns how many."""
    copied = 0
    for i, node in enumerate(_outputs(graph)):
        if i not in before or node.target not in (*RESHAPES, *VIEWS) or _same(node.meta["val"].stride(), before[i]):
            continue
        order = sorted(range(len(before[i])), key=lambda dim: before[i][dim], reverse=True)
        back = [order.index(dim) for dim in range(len(order))]
        output = graph.output_node()
        with graph.inserting_before(output), torch_private.fake_mode_of(graph):
            dense = _call(graph, aten.permute.default, node, order)
            dense = _call(graph, aten.clone.default, dense, memory_format=torch.contiguous_format)
            dense = _call(graph, aten.permute.default, dense, back)
        if _same(dense.meta["val"].stride(), before[i]):  # else eager's has gaps too, or overlaps
            output.replace_input_with(node, dense)
            copied += 1
    return copied


def _call(graph: fx.Graph, op: Any, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(op, (x, *args), kwargs)
    node.meta["val"] = op(x.meta["val"], *args, **kwargs)
    return node


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return list(map(str, a)) == list(map(str, b))  # symbolic sizes: equal expressions, without a guard


def _outputs(graph: fx.Graph) -> list[Any]:
    return pytree.tree_leaves(graph.output_node().args)


def _is_strided(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.layout is torch.strided
