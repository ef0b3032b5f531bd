"""oneDNN through torch's own mkldnn operators: products and convolutions with fused activation or residual, with plain or
packed weights, in float32 and bfloat16, 1x1 convolutions as products, batch norm folded into the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from .. import ops, semantics
from ..target import onednn_computes
from ..trust.capabilities import fitting
from ..types import Candidate, Rejection
from .aten import weight_rows
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name, split_columns
from .folding import fold_constants, folded, rows_of

aten, prims = torch.ops.aten, torch.ops.prims

# Our names of activations -> oneDNN's (attribute, algorithm) as mkldnn::_linear_pointwise spells them.
_ATTR = {
    None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""), "sigmoid": ("sigmoid", ""), "tanh": ("tanh", ""),
}  # fmt: skip


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
    return {**t, "w": weight_rows(emit, t, p), "bias": _vector(emit, t.get("bias"), p)}


def _dense(weight: torch.Tensor, p: Values) -> torch.Tensor:
    return (weight.t() if p["transposed"] else weight).to(semantics.torch_dtype(p["dtype"])).contiguous()


def _frozen_bias(emit: Emitter, value: Any, p: Values) -> Any:
    return None if value is None else emit.constant(lambda b: b.to(semantics.torch_dtype(p["dtype"])), value)


def _rows(p: Values) -> int | None:
    """The number of rows that a weight is packed for. What is packed for any (None) can be read with any."""
    return None if p["dynamic_rows"] or p.get("any_rows") else p["rows"]


def _size(p: Values) -> list[int] | None:
    return None if p["dynamic_rows"] or p.get("any_rows") else list(p["size"])


def _pack_linear(emit: Emitter, t: Values, p: Values) -> Values:
    rows = _rows(p)
    weight = emit.constant(lambda w: torch.ops.mkldnn._reorder_linear_weight(_dense(w, p), rows), t["w"])
    return {**t, "w": weight, "bias": _frozen_bias(emit, t.get("bias"), p)}


def _pack_merged(emit: Emitter, t: Values, p: Values) -> Values:
    count, rows = p["count"], _rows(p)

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
        return torch.ops.mkldnn._reorder_convolution_weight(weight, p["padding"], p["stride"], p["dilation"], p["groups"], _size(p))

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


def _linear_packs(p: Values) -> Hashable:
    return "onednn.linear", p["dtype"], _rows(p)


def _conv_packs(p: Values) -> Hashable:
    return "onednn.conv", p["dtype"], p["affine"], p["padding"], p["stride"], p["dilation"], p["groups"], str(_size(p))


class OneDNN(Described):
    name = "onednn"
    devices: tuple[str, ...] = ("cpu",)
    kernels = by_name(
        Kernel("onednn.linear", _linear, _plain),
        Kernel("onednn.linear_packed", _linear, _pack_linear, packs=_linear_packs),
        Kernel("onednn.merged_linear_packed", _merged, _pack_merged, packs=_linear_packs),
        Kernel("onednn.conv", _conv, _fold),
        Kernel("onednn.conv_packed", _conv, _pack_conv, packs=_conv_packs),
        Kernel("onednn.conv1x1", _conv1x1, _fold_1x1),
    )

    def missing(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        x, (fit, refused) = ctx.specs[0], fitting(self, ctx)
        if (fit or refused) and not onednn_computes(x.dtype):
            yield ctx.reject(f"onednn.{ctx.region.op}", "dtype", f"no oneDNN kernel for {x.dtype} on this CPU")
            return
        yield from refused
        dtypes = [x.dtype]
        if x.dtype == "float32" and ctx.options.error_budget > 0 and onednn_computes("bfloat16"):
            dtypes.append("bfloat16")
        for dtype in dtypes:
            for name in fit:
                if name == "onednn.linear" and dtype != x.dtype and "w" in ctx.frozen:
                    continue  # it would convert the weight in each call
                yield self._candidate(ctx, name, dtype)
                # For one row oneDNN packs as for its matrix-vector product, which is often the slower one.
                one = ctx.region.op != "conv" and ctx.params["rows"] == 1
                if (ctx.options.any_rows or one) and self.kernels[name].packs and not ctx.params["dynamic_rows"]:
                    yield self._candidate(ctx, name, dtype, any_rows=True)

    def _candidate(self, ctx: SelectionContext, name: str, dtype: str, **more: bool) -> Candidate:
        kernel, extra = self.kernels[name], dict[str, Any](vector_dtype=ctx.specs[0].dtype, **more)
        if ctx.region.op != "conv":
            frozen = {r: "packed" for r in ctx.roles if r[0] == "w"} if name != "onednn.linear" else None
            return ctx.candidate(kernel, dtype, frozen, **extra)
        layouts = {"x": "channels_last", "other": "channels_last"}
        if name == "onednn.conv_packed":
            return ctx.candidate(kernel, dtype, {**layouts, "w": "packed"}, "channels_last", **extra)
        size = 4 if dtype == "float32" else 2
        traffic = 2 * size * math.prod(ctx.spec("w").shape) if "mul" in ctx.params["affine"] else 0
        weight = {"w": "channels_last"} if name == "onednn.conv" else {}
        return ctx.candidate(kernel, dtype, {**layouts, **weight}, "channels_last", traffic=traffic, **extra)
