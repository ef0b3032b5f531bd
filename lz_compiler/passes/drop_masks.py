"""Attention that AOTAutograd resolved already (where gradients flow): a mask that was proved to be causal, or to hide nothing,
becomes the kernel's `is_causal`, in the forward and the backward call alike. The mask need not be computed, saved or read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..masks import infer_mask

aten = torch.ops.aten

FORWARD = {
    aten._scaled_dot_product_cudnn_attention.default: aten._scaled_dot_product_cudnn_attention_backward.default,
    aten._scaled_dot_product_efficient_attention.default: aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default: aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def drop_masks_pass(graph: fx.Graph) -> int:
    """Rewrite a joint or inference graph in place; returns how many attentions lost their mask."""
    dropped = 0
    for node in graph.nodes:
        mask = _get(node, "mask") if node.target in FORWARD else None
        causal = _causal(node, mask) if isinstance(mask, fx.Node) else None
        if causal is None:
            continue
        outputs = set(node.users)
        backward = [n for n in graph.nodes if n.target is FORWARD[node.target] and outputs & set(n.all_input_nodes)]
        if any(_get(n, "mask") is not mask or _needs_mask_gradient(n) for n in backward):
            continue
        for call in (node, *backward):
            _set(call, "mask", None)
            _set(call, "is_causal", causal)
        dropped += 1
    if dropped:
        graph.eliminate_dead_code()
    return dropped


def _causal(node: fx.Node, mask: fx.Node) -> bool | None:
    """The `is_causal` that says the mask, or None if it says something else."""
    q, k = (_get(node, name).meta["val"] for name in ("query", "key"))
    if _get(node, "is_causal") or q.dim() != 4:
        return None
    found = infer_mask(mask, q.shape[0], q.shape[2], k.shape[2])
    if found is None or found.keys or found.position is not None or found.window or found.offset or found.empty == "uniform":
        return None
    square = str(q.shape[2]) == str(k.shape[2])  # as text: comparing symbolic sizes would guard on the answer
    return None if found.causal and not square else found.causal


def _needs_mask_gradient(node: fx.Node) -> bool:
    wanted = _get(node, "grad_input_mask")
    return bool(wanted is not None and wanted[3])


def _position(node: fx.Node, name: str) -> int | str | None:
    """Where the call has an argument: its place, or its keyword. `mask` is `attn_bias` or `attn_mask`."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    name = next((n for n in names if n in ("attn_bias", "attn_mask")), name) if name == "mask" else name
    if name not in names:
        return None
    index = names.index(name)
    return index if index < len(node.args) else name


def _get(node: fx.Node, name: str) -> Any:
    where = _position(node, name)
    return node.args[where] if isinstance(where, int) else node.kwargs.get(where) if where is not None else None


def _set(node: fx.Node, name: str, value: Any) -> None:
    where = _position(node, name)
    if isinstance(where, int):
        node.update_arg(where, value)
    elif where is not None:
        node.update_kwarg(where, value)
