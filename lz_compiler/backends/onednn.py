"""oneDNN through torch's own mkldnn operators: products and convolutions with fused activation or residual, with plain or
packed weights, in float32 and bfloat16, 1x1 convolutions as products, batch norm folded into the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .. import ops, semantics
from ..target import onednn_computes
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values, split_columns
from .folding import fold_constants, folded, rows_of

aten, prims = torch.ops.aten, torch.ops.prims

# Our names of activations -> oneDNN's (attribute, algorithm) as mkldnn::_linear_pointwise spells them.
_ATTR = {
    None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""), "sigmoid": ("sigmoid", ""), "tanh": ("tanh", ""),
}  # fmt: skip
_CONV_ACTS = (None, "silu", "sigmoid", "tanh")
RELU = "oneDNN's fused relu turns NaN into 0, eager's keeps it (so does its clip)"


def _vector(emit: Emitter, value: Any, p: Values) -> Any:
    """A bias in the kernel's dtype."""
    if value is None or p["dtype"] == p["vector_dtype"]:
        return value
    return emit.call(prims.convert_element_type.default, value, semantics.torch_dtype(p["dtype"]))


def _linear(emit: Emitter, t: Values, p: Values) -> Any:
    if p["binary"]:
        other = emit.call(aten.reshape.default, t["other"], [-1, p["width"]])
        return emit.call(ops.linear_binary, t["x"], other, t["w"], t["bias"], p["binary"])
    return emit.call(ops.linear, t["x"], t["w"], t["bias"], *_ATTR[p["act"]])


def _plain(emit: Emitter, t: Values, p: Values) -> Values:
    weight = emit.call(aten.permute.default, t["w"], [1, 0]) if p["transposed"] else t["w"]
    return {**t, "w": weight, "bias": _vector(emit, t.get("bias"), p)}


def _dense(weight: torch.Tensor, p: Values) -> torch.Tensor:
    return (weight.t() if p["transposed"] else weight).to(semantics.torch_dtype(p["dtype"])).contiguous()


def _frozen_bias(emit: Emitter, value: Any, p: Values) -> Any:
    return None if value is None else emit.constant(lambda b: b.to(semantics.torch_dtype(p["dtype"])), value)


def _pack_linear(emit: Emitter, t: Values, p: Values) -> Values:
    rows = None if p["dynamic_rows"] else p["rows"]
    weight = emit.constant(lambda w: torch.ops.mkldnn._reorder_linear_weight(_dense(w, p), rows), t["w"])
    return {**t, "w": weight, "bias": _frozen_bias(emit, t.get("bias"), p)}


def _pack_merged(emit: Emitter, t: Values, p: Values) -> Values:
    count, rows = p["count"], None if p["dynamic_rows"] else p["rows"]

    def pack(*weights: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(torch.cat([_dense(w, p) for w in weights]), rows)

    weight = emit.constant(pack, *(t[f"w{i}"] for i in range(count)))
    bias = None
    if "b0" in t:
        make: Callable[..., torch.Tensor] = lambda *b: torch.cat(b).to(semantics.torch_dtype(p["dtype"]))  # noqa: E731
        bias = emit.constant(make, *(t[f"b{i}"] for i in range(count)))
    return {**t, "w": weight, "bias": bias}


def _merged(emit: Emitter, t: Values, p: Values) -> tuple[Any, ...]:
    return split_columns(emit, emit.call(ops.linear, t["x"], t["w"], t["bias"], "none", ""), p["widths"])


def _pack_conv(emit: Emitter, t: Values, p: Values) -> Values:
    def pack(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.contiguous(memory_format=torch.channels_last)
        size = None if p["dynamic_rows"] else list(p["size"])
        return torch.ops.mkldnn._reorder_convolution_weight(weight, p["padding"], p["stride"], p["dilation"], p["groups"], size)

    return fold_constants(emit, t, p, pack)


def _fold(emit: Emitter, t: Values, p: Values) -> Values:
    weight, bias = folded(emit, t, p)
    return {**t, "w": weight, "bias": _vector(emit, bias, p)}


def _fold_1x1(emit: Emitter, t: Values, p: Values) -> Values:
    t = _fold(emit, t, p)
    return {**t, "w": emit.call(aten.reshape.default, t["w"], list(p["w_shape"][:2]))}


def _conv(emit: Emitter, t: Values, p: Values) -> Any:
    weight, bias = t["w"], t["bias"]
    geometry = (list(p["padding"]), list(p["stride"]), list(p["dilation"]), p["groups"])
    if p["binary"]:
        return emit.call(ops.conv_binary, t["x"], t["other"], weight, bias, *geometry, p["binary"], p["act"])
    return emit.call(ops.conv, t["x"], weight, bias, *geometry, _ATTR[p["act"]][0])


def _conv1x1(emit: Emitter, t: Values, p: Values) -> Any:
    """A 1x1 convolution on channels-last data is a product over the channels; a stride only drops rows first."""
    weight, bias, rows = t["w"], t["bias"], rows_of(emit, t["x"], p["stride"])
    if p["binary"]:
        y = emit.call(ops.linear_binary, rows, rows_of(emit, t["other"]), weight, bias, p["binary"])
    else:
        y = emit.call(ops.linear, rows, weight, bias, *_ATTR[p["act"]])
    return emit.call(aten.permute.default, y, [0, 3, 1, 2])


class OneDNN:
    name = "onednn"
    devices: tuple[str, ...] = ("cpu",)
    kernels: Mapping[str, Kernel] = {
        kernel.name: kernel
        for kernel in (
            Kernel("onednn.linear", _linear, _plain),
            Kernel("onednn.linear_packed", _linear, _pack_linear),
            Kernel("onednn.merged_linear_packed", _merged, _pack_merged),
            Kernel("onednn.conv", _conv, _fold),
            Kernel("onednn.conv_packed", _conv, _pack_conv),
            Kernel("onednn.conv1x1", _conv1x1, _fold_1x1),
        )
    }

    def version(self) -> str:
        return "torch"  # built into it, and torch's version is part of every target

    def missing(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        if ctx.region.op not in ("linear", "merged_linear", "conv"):
            return
        name = f"onednn.{ctx.region.op}"
        x = ctx.spec("x")
        if not onednn_computes(x.dtype):
            yield ctx.reject(name, "dtype", f"no oneDNN kernel for {x.dtype} on this CPU")
        elif any(0 in spec.shape for spec in (*ctx.specs, *ctx.outputs)):
            yield ctx.reject(name, "empty", "an input has no elements")
        else:
            dtypes = [x.dtype]
            if x.dtype == "float32" and ctx.options.error_budget > 0 and onednn_computes("bfloat16"):
                dtypes.append("bfloat16")
            for dtype in dtypes:
                yield from self._linear(ctx, dtype) if ctx.region.op != "conv" else self._conv(ctx, dtype)

    def _linear(self, ctx: SelectionContext, dtype: str) -> Iterable[Candidate | Rejection]:
        merged = ctx.region.op == "merged_linear"
        name = "onednn.merged_linear_packed" if merged else "onednn.linear_packed"
        weights = [r for r in ctx.roles if r not in ("x", "other")]
        if ctx.params.get("act") == "relu":
            yield ctx.reject("onednn.linear", "nan", RELU)
            return
        if ctx.params.get("binary") and ctx.params.get("act"):
            yield ctx.reject("onednn.linear", "epilogue", "a product ends with a residual or an activation, not both")
            return
        extra: dict[str, Any] = {"vector_dtype": ctx.spec("x").dtype}
        frozen = all(r in ctx.frozen for r in weights)
        if not merged and frozen:
            yield ctx.reject("onednn.linear", "dominated", "frozen weights are packed at no run-time cost")
        elif not merged:
            yield ctx.candidate(self.kernels["onednn.linear"], dtype, **extra)
        if not frozen:
            yield ctx.reject(name, "weight_not_frozen", "a packed weight needs freeze=True and parameters")
        else:
            layouts = {r: "packed" for r in weights if r[0] == "w"}
            yield ctx.candidate(self.kernels[name], dtype, layouts, **extra)

    def _conv(self, ctx: SelectionContext, dtype: str) -> Iterable[Candidate | Rejection]:
        if ctx.options.layout_mode == "strict":
            yield ctx.reject("onednn.conv", "layout", "channels-last output, and layout_mode='strict' keeps eager's")
            return
        if ctx.params["act"] == "relu":
            yield ctx.reject("onednn.conv", "nan", RELU)
            return
        if ctx.params["act"] not in _CONV_ACTS or (ctx.params["binary"] and ctx.params["act"]):
            yield ctx.reject("onednn.conv", "epilogue", f"no fused {ctx.params['act']} after a convolution")
            return
        pointwise = ctx.spec("w").shape[2:] == (1, 1) and set(ctx.params["padding"]) == {0} and ctx.params["groups"] == 1
        pointwise &= not (ctx.params["binary"] and ctx.params["act"])
        layouts = {"x": "channels_last", "other": "channels_last"}
        extra: dict[str, Any] = {"vector_dtype": ctx.spec("x").dtype}
        constants = [r for r in ctx.roles if r not in ("x", "other")]
        frozen = all(r in ctx.frozen for r in constants)
        if frozen and ctx.params.get("absorbed"):
            yield ctx.reject("onednn.conv_packed", "dominated", "the per-channel steps that follow fold into a frozen weight")
            return
        if frozen:
            packed = self.kernels["onednn.conv_packed"]
            yield ctx.candidate(packed, dtype, {**layouts, "w": "packed"}, "channels_last", **extra)
            yield ctx.reject("onednn.conv", "dominated", "frozen weights are packed at no run-time cost")
            return
        yield ctx.reject("onednn.conv_packed", "weight_not_frozen", "a packed weight needs freeze=True and parameters")
        size = 4 if dtype == "float32" else 2
        extra["traffic"] = 2 * size * math.prod(ctx.spec("w").shape) if "mul" in ctx.params["affine"] else 0
        yield ctx.candidate(self.kernels["onednn.conv"], dtype, {**layouts, "w": "channels_last"}, "channels_last", **extra)
        if pointwise:
            yield ctx.candidate(self.kernels["onednn.conv1x1"], dtype, layouts, "channels_last", **extra)
        else:
            yield ctx.reject("onednn.conv1x1", "shape", "not an unpadded, ungrouped 1x1 convolution with at most one epilogue")
