"""What convolutions of several libraries share: folding per-channel steps into weights, and a 1x1 convolution as a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import semantics
from ..types import Candidate
from .base import Emitter, Kernel, SelectionContext, Values

aten, prims = torch.ops.aten, torch.ops.prims


def folded(emit: Emitter, t: Values, p: Values) -> tuple[Any, Any]:
    """Weight and bias with the per-channel steps folded in, in the kernel's dtype (a batch norm's steps are float32, also in
    a bfloat16 model), computed in the graph (weights may change between calls)."""
    weight, shift, scale = t["w"], t.get("bias"), None
    dtype = semantics.torch_dtype(p["dtype"])
    for i, step in enumerate(p["affine"]):
        c = emit.call(aten.reshape.default, t[f"c{i}"], [-1])
        if step == "mul":
            scale = c if scale is None else emit.call(aten.mul.Tensor, scale, c)
            shift = None if shift is None else emit.call(aten.mul.Tensor, shift, c)
        elif shift is None:
            shift = c if step == "add" else emit.call(aten.neg.default, c)
        else:
            shift = emit.call(aten.add.Tensor if step == "add" else aten.sub.Tensor, shift, c)
    if scale is not None:
        weight = emit.call(aten.mul.Tensor, weight, emit.call(aten.reshape.default, scale, [-1, 1, 1, 1]))
        weight = emit.call(prims.convert_element_type.default, weight, dtype)
    if p["affine"] and shift is not None:
        shift = emit.call(prims.convert_element_type.default, shift, dtype)
    return weight, shift


def _fold_constants(t: Values, p: Values) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = t["w"], t.get("bias")
    if p["affine"]:
        scale, shift = semantics.affine(t, p, weight.new_ones(weight.shape[0]))
        bias = shift if bias is None else bias * scale + shift
        weight = weight * scale.reshape(-1, 1, 1, 1)
    dtype = semantics.torch_dtype(p["dtype"])
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def fold_constants(emit: Emitter, t: Values, p: Values, pack: Callable[[torch.Tensor], torch.Tensor]) -> Values:
    """The folded weight, packed, and the folded bias, both ahead of time."""
    roles = [r for r in t if r in ("w", "bias") or r[0] == "c"]
    values = [t[r] for r in roles]
    weight = emit.constant(lambda *v: pack(_fold_constants(dict(zip(roles, v, strict=True)), p)[0]), *values)
    has_bias = "bias" in t or bool(p["affine"])
    bias = emit.constant(lambda *v: _fold_constants(dict(zip(roles, v, strict=True)), p)[1], *values) if has_bias else None
    return {"x": t["x"], "w": weight, "bias": bias, **({"other": t["other"]} if "other" in t else {})}


def fold(emit: Emitter, t: Values, p: Values, pack: Callable[[torch.Tensor], torch.Tensor]) -> Values:
    """The folded weight and bias: packed ahead of time where all of them are frozen, else as they are, in the graph."""
    if p["is_frozen"]:
        return fold_constants(emit, t, p, pack)
    weight, bias = folded(emit, t, p)
    return {**t, "w": weight, "bias": bias}


def rows_of(emit: Emitter, x: Any, stride: tuple[int, int] = (1, 1)) -> Any:
    """Channels-last (N, C, H, W) as (N, H, W, C), a view: what a 1x1 convolution multiplies. A stride only drops rows."""
    for dim, step in zip((2, 3), stride, strict=True):
        x = x if step == 1 else emit.call(aten.slice.Tensor, x, dim, 0, 9223372036854775807, step)
    return emit.call(aten.permute.default, x, [0, 2, 3, 1])


def folding_candidate(ctx: SelectionContext, kernel: Kernel, **extra: Any) -> Candidate:
    """A candidate of a convolution, channels last in and out, weights and per-channel steps folded."""
    constants = [r for r in ctx.roles if r not in ("x", "other")]
    frozen = all(r in ctx.frozen for r in constants)
    layouts = {"x": "channels_last", "other": "channels_last", "w": "packed" if frozen else "channels_last"}
    layouts.update(extra.pop("layouts", {}))
    return ctx.candidate(kernel, layouts=layouts, out_layout="channels_last", is_frozen=frozen, **extra)
