"""ATen as it stands: the node of the graph, which TorchInductor calls unchanged (MKL for float32 products, oneDNN for
convolutions and bfloat16), and MKL with a packed weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import ops
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values, natural_layout

aten = torch.ops.aten


def _weight(emit: Emitter, t: Values, p: Values) -> object:
    """The weight as the right operand of a product, (K, N)."""
    return t["w"] if p["transposed"] else emit.call(aten.permute.default, t["w"], [1, 0])


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
    return emit.call(ops.mkl_linear, t["x"], t["packed"], t["w"], t.get("bias"), p["rows"])


class Aten:
    name = "aten"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels: Mapping[str, Kernel] = {
        kernel.name: kernel
        for kernel in (
            Kernel("aten.mm", _mm),
            Kernel("aten.bmm", lambda emit, t, p: emit.call(aten.bmm.default, t["a"], t["b"])),
            Kernel("aten.conv", _conv),
            Kernel("aten.sdpa", lambda emit, t, p: emit.call(ops.sdpa, *attention_arguments(t, p))),
            Kernel("aten.paged_attention", lambda emit, t, p: emit.call(ops.paged_attention, *paged_arguments(t), p["scale"], p["layout"])),
            Kernel("mkl.linear_packed", _mkl, _pack_mkl),
        )
    }

    def version(self) -> str:
        return "torch"  # built into it, and torch's version is part of every target

    def missing(self) -> str | None:
        return None

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        op = ctx.region.op
        if op == "linear" and ctx.default:
            yield ctx.candidate(self.kernels["aten.mm"], as_is=True)
            if ctx.spec("x").device == "cpu":
                yield from self._mkl(ctx)
        elif op == "bmm":
            yield ctx.candidate(self.kernels["aten.bmm"], as_is=True)
        elif op == "attention" and ctx.default:
            mask_dtype = ctx.spec("mask").dtype if "mask" in ctx.roles else ""
            yield ctx.candidate(self.kernels["aten.sdpa"], as_is=True, mask_dtype=mask_dtype)
        elif op == "paged_attention":
            yield ctx.candidate(self.kernels["aten.paged_attention"], as_is=True)
        elif op == "conv" and ctx.default:
            kernel = self.kernels["aten.conv"]
            yield ctx.candidate(kernel, as_is=True)
            if ctx.options.layout_mode == "adapt" and natural_layout(ctx.spec("x")) == "strided":
                yield ctx.candidate(kernel, layouts={"x": "channels_last", "w": "channels_last"}, out_layout="channels_last")

    def _mkl(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name = "mkl.linear_packed"
        if ctx.spec("x").dtype != "float32":
            yield ctx.reject(name, "dtype", f"MKL packs float32, not {ctx.spec('x').dtype}")
        elif not torch.backends.mkl.is_available():
            yield ctx.reject(name, "library_missing", "this torch was built without MKL")
        elif "w" not in ctx.frozen:
            yield ctx.reject(name, "weight_not_frozen", "a packed weight needs freeze=True and a parameter")
        elif ctx.params["dynamic_rows"]:
            yield ctx.reject(name, "dynamic_shape", "MKL packs for one number of rows")
        else:
            yield ctx.candidate(self.kernels[name], layouts={"w": "packed"})
