"""cuBLAS and cuBLASLt through torch: products that end in an activation, merged products, and float8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .. import ops, semantics
from ..types import Candidate, Rejection
from .aten import weight_rows
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name, natural_layout, quantize_rows, split_columns, stacked
from .folding import fold, folding_candidate, rows_of

aten, prims = torch.ops.aten, torch.ops.prims

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def _activated(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(ops.addmm_activation, t["bias"], t["x"], weight_rows(emit, t, p), p["act"] != "relu")


def _merge(emit: Emitter, t: Values, p: Values) -> Values:
    weight = emit.constant(lambda *weights: stacked(weights, p), *(t[f"w{i}"] for i in range(p["count"])))
    bias = emit.constant(lambda *b: torch.cat(b), *(t[f"b{i}"] for i in range(p["count"]))) if "b0" in t else None
    return {"x": t["x"], "w": emit.call(aten.permute.default, weight, [1, 0]), "bias": bias}


def _merged(emit: Emitter, t: Values, p: Values) -> tuple[Any, ...]:
    if t["bias"] is None:
        return split_columns(emit, emit.call(aten.mm.default, t["x"], t["w"]), p["widths"])
    return split_columns(emit, emit.call(aten.addmm.default, t["bias"], t["x"], t["w"]), p["widths"])


def _conv1x1(emit: Emitter, t: Values, p: Values) -> Any:
    """A 1x1 convolution on channels-last data is a product over the channels."""
    x = emit.call(aten.reshape.default, rows_of(emit, t["x"], p["stride"]), [p["rows"], p["w_shape"][1]])
    return _finished(emit, x, t, p)


def _patch_weight(emit: Emitter, t: Values, p: Values) -> Values:
    """(N, C, H, W) filters as rows: constants where frozen."""
    t = fold(emit, t, p, lambda w: w.contiguous())
    return {"x": t["x"], "w": emit.call(aten.reshape.default, t["w"], [p["w_shape"][0], -1]), "bias": t["bias"]}


def _im2col(emit: Emitter, t: Values, p: Values) -> Any:
    """A convolution as a product over gathered windows, (N*H*W, C*h*w): the gathering is one pass, which pays for windows
    that do not overlap, and for few channels (which tensor cores do not take in a convolution)."""
    (high, wide), (above, left) = p["w_shape"][2:], p["padding"]
    x = t["x"]
    if above or left:
        x = emit.call(aten.constant_pad_nd.default, x, [left, left, above, above])
    for dim, length, step in ((2, high, p["stride"][0]), (3, wide, p["stride"][1])):
        x = emit.call(aten.unfold.default, x, dim, length, step)  # (N, C, H, W, h, w)
    inner = p["w_shape"][1] * high * wide
    x = emit.call(aten.reshape.default, emit.call(aten.permute.default, x, [0, 2, 3, 1, 4, 5]), [p["rows"], inner])
    if inner % 8:  # rows start at multiples of 16 bytes
        x = emit.call(aten.constant_pad_nd.default, x, [0, -inner % 8])
        t = {**t, "w": emit.call(aten.constant_pad_nd.default, t["w"], [0, -inner % 8])}
    return _finished(emit, x, t, p)


def _finished(emit: Emitter, x: Any, t: Values, p: Values) -> Any:
    """x @ w^T + bias and the activation, as a channels-last image."""
    if p["act"]:
        y = emit.call(ops.addmm_activation, t["bias"], x, t["w"], p["act"] != "relu")
    else:
        weight = emit.call(aten.permute.default, t["w"], [1, 0])
        bias = t["bias"]
        y = emit.call(aten.mm.default, x, weight) if bias is None else emit.call(aten.addmm.default, bias, x, weight)
    batch, channels, height, width = p["out_shape"]
    return emit.call(aten.permute.default, emit.call(aten.reshape.default, y, [batch, height, width, channels]), [0, 3, 1, 2])


def _fp8_weight(emit: Emitter, t: Values, p: Values) -> Values:
    weight = emit.constant(lambda w: quantize_rows(stacked([w], p), FP8)[0], t["w"])
    scale = emit.constant(lambda w: quantize_rows(stacked([w], p), FP8)[1][None, :], t["w"])
    return {**t, "w": emit.call(aten.permute.default, weight, [1, 0]), "scale": scale}


def _fp8(emit: Emitter, t: Values, p: Values) -> Any:
    """x quantised row by row in the graph (fused with what made it), float8 product, one scale a row and a column."""
    x = emit.call(prims.convert_element_type.default, t["x"], torch.float32)
    top = emit.call(aten.amax.default, emit.call(aten.abs.default, x), [1], True)
    scale = emit.call(aten.div.Tensor, emit.call(aten.clamp_min.default, top, 1e-12), FP8_MAX)
    narrow = emit.call(prims.convert_element_type.default, emit.call(aten.div.Tensor, x, scale), FP8)
    out = semantics.torch_dtype(p["dtype"])
    return emit.call(aten._scaled_mm.default, narrow, t["w"], scale, t["scale"], t.get("bias"), None, out, True)


class Cublas(Described):
    name = "cublas"
    devices: tuple[str, ...] = ("cuda",)
    kernels = by_name(
        Kernel("cublas.addmm_activation", _activated),
        Kernel("cublas.merged", _merged, _merge, packs=lambda p: ("stacked", "")),
        Kernel("cublas.conv1x1", _conv1x1, _patch_weight, packs=lambda p: ("patches", p["affine"], p["dtype"])),
        Kernel("cublas.im2col", _im2col, _patch_weight, packs=lambda p: ("patches", p["affine"], p["dtype"]), compiled=True),
        Kernel("cublas.fp8_rowwise", _fp8, _fp8_weight, packs=lambda p: ("stacked", "float8_e4m3fn"), compiled=True),
    )

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        kernel = self.kernels[name]
        match name:
            case "cublas.addmm_activation":
                yield ctx.candidate(kernel)
            case "cublas.fp8_rowwise":
                yield ctx.candidate(kernel, layouts={"w": "packed"}, lossy=True)
            case "cublas.merged":
                yield ctx.candidate(kernel, layouts={r: "packed" for r in ctx.roles if r != "x"})
            case "cublas.conv1x1":
                yield folding_candidate(ctx, kernel, out_shape=ctx.outputs[0].shape)
            case "cublas.im2col":
                eager = {r: natural_layout(ctx.spec(r)) for r in ("x", "w")}
                yield folding_candidate(ctx, kernel, out_shape=ctx.outputs[0].shape, layouts=eager)
