"""ATen as it stands: the node of the graph, which TorchInductor calls unchanged (MKL for float32 products, oneDNN for
convolutions and bfloat16), and MKL with a packed weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .. import ops
from ..types import Candidate, Rejection
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name, natural_layout

aten = torch.ops.aten


def _weight(emit: Emitter, t: Values, p: Values) -> object:
    """The weight as the right operand of a product, (K, N)."""
    return t["w"] if p["transposed"] else emit.call(aten.permute.default, t["w"], [1, 0])


def weight_rows(emit: Emitter, t: Values, p: Values) -> Any:
    """The weight with one row an output, (N, K)."""
    return emit.call(aten.permute.default, t["w"], [1, 0]) if p["transposed"] else t["w"]


def _mm(emit: Emitter, t: Values, p: Values) -> object:
    if "bias" in t:
        return emit.call(aten.addmm.default, t["bias"], t["x"], _weight(emit, t, p))
    return emit.call(aten.mm.default, t["x"], _weight(emit, t, p))


def _conv(emit: Emitter, t: Values, p: Values) -> object:
    geometry = (list(p["stride"]), list(p["padding"]), list(p["dilation"]), False, [0, 0], p["groups"])
    return emit.call(aten.convolution.default, t["x"], t["w"], t.get("bias"), *geometry)


def attention_arguments(t: Values, p: Values) -> tuple[Any, ...]:
    return t["q"], t["k"], t["v"], t.get("mask"), p["causal"], p["scale"], p["gqa"]


def paged_arguments(t: Values) -> tuple[Any, ...]:
    return t["q"], t["k_cache"], t["v_cache"], t["block_table"], t["seq_lens"]


def _pack_mkl(emit: Emitter, t: Values, p: Values) -> Values:
    def dense(w: torch.Tensor) -> torch.Tensor:
        return (w.t() if p["transposed"] else w).contiguous()

    weight = emit.constant(dense, t["w"])
    packed = emit.constant(lambda w: torch.ops.mkl._mkl_reorder_linear_weight(dense(w), p["rows"]), t["w"])
    return {**t, "w": weight, "packed": packed}


def _mkl(emit: Emitter, t: Values, p: Values) -> object:
    # ATen would fill the result with the bias, to have the product added; a sum of its own ends in the loop that reads it.
    product = emit.call(ops.mkl_linear, t["x"], t["packed"], t["w"], None, p["rows"])
    return emit.loop(aten.add.Tensor, product, t["bias"]) if "bias" in t else product


class Aten(Described):
    name = "aten"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels = by_name(
        Kernel("aten.mm", _mm),
        Kernel("aten.bmm", lambda emit, t, p: emit.call(aten.bmm.default, t["a"], t["b"])),
        Kernel("aten.conv", _conv),
        Kernel("aten.sdpa", lambda emit, t, p: emit.call(ops.sdpa, *attention_arguments(t, p))),
        Kernel("aten.paged_attention", lambda emit, t, p: emit.call(ops.paged_attention, *paged_arguments(t), p["scale"], p["layout"])),
        Kernel("mkl.linear_packed", _mkl, _pack_mkl, version=2),
    )

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        kernel, x = self.kernels[name], ctx.specs[0]
        if name == "mkl.linear_packed":
            missing = ctx.reject(name, "library_missing", "this torch was built without MKL")
            yield ctx.candidate(kernel, layouts={"w": "packed"}) if torch.backends.mkl.is_available() else missing
            return
        mask: dict[str, Any] = {"mask_dtype": ctx.spec("mask").dtype if "mask" in ctx.roles else ""} if name == "aten.sdpa" else {}
        yield ctx.candidate(kernel, as_is=True, **mask)
        keeps = (x.device, x.dtype) != ("cuda", "float64")  # there the result is contiguous whatever comes in
        if name == "aten.conv" and keeps and ctx.options.layout_mode == "adapt" and natural_layout(x) == "strided":
            yield ctx.candidate(kernel, layouts={"x": "channels_last", "w": "channels_last"}, out_layout="channels_last")
