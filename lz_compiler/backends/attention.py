"""Attention as torch implements it (on a CPU the flash kernel, on a GPU cuDNN, flash and memory-efficient; the unfused formula),
and on a CPU a kernel of our own over oneDNN's small products.

A mask that was understood (masks.py) reaches a kernel as its own arguments; what these cannot say is written out as the
smallest tensor to add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import ops, semantics
from ..types import Candidate, Rejection
from .aten import attention_arguments
from .base import Emitter, Kernel, SelectionContext, Values

aten, prims = torch.ops.aten, torch.ops.prims


def _mask(emit: Emitter, t: Values, p: Values) -> Any:
    """The mask as a term to add, in q's dtype: what the flash kernel takes."""
    mask, dtype = t.get("mask"), semantics.torch_dtype(p["dtype"])
    if mask is None or p["mask_dtype"] == p["dtype"]:
        return mask
    if p["mask_dtype"] != "bool":
        return emit.call(prims.convert_element_type.default, mask, dtype)
    constant = {"dtype": dtype, "device": mask.device if isinstance(mask, torch.Tensor) else mask.meta["val"].device}
    keep, drop = (emit.call(aten.full.default, [], value, **constant) for value in (0.0, -math.inf))
    return emit.call(aten.where.self, mask, keep, drop)


def _added(emit: Emitter, t: Values, p: Values) -> Any:
    """What to add to the scores for the given mask or predicate, broadcast over batch, heads or queries where it may be; None
    where the kernel's `is_causal` says it all."""
    if "mask" in t:
        return _mask(emit, t, p)
    position, keys = semantics.mask_inputs(emit.call, t, p)
    seen = None if keys is None else emit.call(aten.reshape.default, keys, [-1, 1, 1, p["keys"]])
    if position is not None:
        device = position.device if isinstance(position, torch.Tensor) else position.meta["val"].device
        every = emit.call(aten.arange.default, p["keys"], device=device)
        last = emit.call(aten.add.Tensor, emit.call(aten.reshape.default, position, [-1, 1, 1, 1]), p["shift"])
        bounds = [emit.call(aten.le.Tensor, every, last)] if p["causal"] else []
        if p["window"]:
            bounds.append(emit.call(aten.gt.Tensor, every, emit.call(aten.sub.Tensor, last, p["window"])))
        for bound in bounds:
            seen = bound if seen is None else emit.call(aten.logical_and.default, seen, bound)
    return None if seen is None else _mask(emit, {"mask": seen}, {**p, "mask_dtype": "bool"})


def _cudnn(emit: Emitter, t: Values, p: Values) -> Any:
    causal = p["causal"] and "position" not in t
    op = aten._scaled_dot_product_cudnn_attention.default
    return emit.item(emit.call(op, t["q"], t["k"], t["v"], _added(emit, t, p), False, 0.0, causal, False, scale=p["scale"]), 0)


def _flash_cuda(emit: Emitter, t: Values, p: Values) -> Any:
    op = aten._scaled_dot_product_flash_attention.default
    return emit.item(emit.call(op, t["q"], t["k"], t["v"], 0.0, p["causal"], False, scale=p["scale"]), 0)


def _efficient(emit: Emitter, t: Values, p: Values) -> Any:
    bias, causal = _added(emit, t, p), p["causal"] and "position" not in t
    if bias is not None:
        bias = emit.call(aten.expand.default, bias, p["scores"])
    op = aten._scaled_dot_product_efficient_attention.default
    return emit.item(emit.call(op, t["q"], t["k"], t["v"], bias, False, 0.0, causal, scale=p["scale"]), 0)


def _flash(emit: Emitter, t: Values, p: Values) -> Any:
    options = {"attn_mask": _mask(emit, t, p), "scale": p["scale"]}
    both = emit.call(aten._scaled_dot_product_flash_attention_for_cpu.default, t["q"], t["k"], t["v"], 0.0, p["causal"], **options)
    return emit.item(both, 0)


def _brgemm(emit: Emitter, t: Values, p: Values) -> Any:
    scale = p["scale"] if p["scale"] is not None else 1.0 / math.sqrt(p["size"])
    return emit.call(ops.attention_brgemm(), t["q"], t["k"], t["v"], _mask(emit, t, p), p["causal"], scale)


def _broadcasts(ctx: SelectionContext) -> bool:
    """Whether batches, or heads that are not grouped, are equal only after broadcasting (which torch does for its own op)."""
    q, k, v = (ctx.spec(role).shape for role in ("q", "k", "v"))
    end = -3 if ctx.params["gqa"] else -2
    return len({len(q), len(k), len(v)}) > 1 or not q[:end] == k[:end] == v[:end]


def _own_arguments(ctx: SelectionContext) -> bool:
    """Whether `is_causal`, which is for as many queries as keys, says the whole predicate."""
    p = ctx.params
    return (p["square"] or not p["causal"]) and len(ctx.roles) == 3 and not p["window"] and not p["shift"]


def _unfit(ctx: SelectionContext) -> tuple[str, str] | None:
    """Why none of torch's GPU kernels can compute this attention (code, detail), or None."""
    q, k, v, p = ctx.spec("q"), ctx.spec("k"), ctx.spec("v"), ctx.params
    if q.dtype not in ("bfloat16", "float16", "float32"):
        return "dtype", f"no fused kernel for {q.dtype}"
    if len(q.shape) != 4 or q.shape[-1] != v.shape[-1] or q.shape[-1] % 8:
        return "shape", "needs (batch, heads, length, size) with one head size, a multiple of 8"
    if any(0 in spec.shape for spec in ctx.specs):
        return "empty", "an input has no elements"
    if any(spec.stride[-1] != 1 for spec in (q, k, v)):
        return "stride", "the head dimension must be contiguous"
    if "mask" in ctx.roles:
        return None if len(ctx.spec("mask").shape) == 4 else ("shape", "the mask needs four dimensions")
    row = p["queries"] == 1 and "position" in ctx.roles
    bounded = p["causal"] or p["window"] or p["shift"]
    if p["uniform"] or not (_own_arguments(ctx) or row or not bounded):
        return "mask", "is_causal cannot say this predicate, and written out it would be the mask again"
    return None


def _aligned(ctx: SelectionContext) -> bool:
    """Whether the rows of the term that is added begin at multiples of eight elements, as torch's own wrapper sees to."""
    if "mask" not in ctx.roles:
        return bool(ctx.params["keys"] % 8 == 0)
    mask = ctx.spec("mask")
    steps = [step for size, step in zip(mask.shape[:-1], mask.stride[:-1], strict=True) if size > 1]
    return mask.shape[-1] == ctx.params["keys"] and mask.shape[-1] % 8 == 0 and mask.stride[-1] == 1 and all(s % 8 == 0 for s in steps)


class Attention:
    name = "attention"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels: Mapping[str, Kernel] = {
        kernel.name: kernel
        for kernel in (
            Kernel("aten.flash_attention_cpu", _flash),
            Kernel("cudnn.attention", _cudnn),
            Kernel("aten.flash_attention", _flash_cuda),
            Kernel("aten.efficient_attention", _efficient),
            Kernel("attention.brgemm", _brgemm, setup=ops.attention_brgemm),
            Kernel("aten.sdpa_math", lambda emit, t, p: emit.call(ops.sdpa_math, *attention_arguments(t, p))),
        )
    }

    def version(self) -> str:
        return "torch"  # built into it, and torch's version is part of every target

    def missing(self) -> str | None:
        return None

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        if ctx.region.op != "attention":
            return
        mask = ctx.spec("mask") if "mask" in ctx.roles else None
        extra: dict[str, Any] = {"mask_dtype": mask.dtype if mask else ""}
        if _broadcasts(ctx):
            for name in ("aten.sdpa_math", "aten.flash_attention_cpu", "cudnn.attention", "aten.flash_attention"):
                yield ctx.reject(name, "shape", "q, k and v have different batch dimensions")
            return
        if ctx.default:
            yield ctx.candidate(self.kernels["aten.sdpa_math"], **extra)
        if ctx.spec("q").device == "cuda":
            yield from self._gpu(ctx, extra)
        elif "mask" in ctx.roles and ctx.params["causal"]:
            for name in ("aten.flash_attention_cpu", "attention.brgemm"):
                yield ctx.reject(name, "mask", "either a mask or is_causal, not both")
        elif "mask" not in ctx.roles and not ctx.default and not _own_arguments(ctx):
            for name in ("aten.flash_attention_cpu", "attention.brgemm"):
                yield ctx.reject(name, "mask", "is_causal cannot say this predicate")
        else:
            yield from self._flash(ctx)
            yield self._brgemm(ctx, extra)

    def _gpu(self, ctx: SelectionContext, extra: dict[str, Any]) -> Iterable[Candidate | Rejection]:
        q, p, grouped = ctx.spec("q"), ctx.params, ctx.spec("q").shape[1] != ctx.spec("k").shape[1]
        cudnn, flash, efficient = "cudnn.attention", "aten.flash_attention", "aten.efficient_attention"
        why = _unfit(ctx)
        if why is not None:
            for name in (cudnn, flash, efficient):
                yield ctx.reject(name, *why)
            return
        masked = len(ctx.roles) > 3
        half = q.dtype != "float32"
        yield ctx.candidate(self.kernels[cudnn], **extra) if half else ctx.reject(cudnn, "dtype", "16-bit types only")
        if masked or not half:
            yield ctx.reject(flash, "mask", "takes is_causal but no mask, in 16-bit types")
        else:
            yield ctx.candidate(self.kernels[flash], **extra)
        if masked and p["dynamic_rows"]:
            yield ctx.reject(efficient, "dynamic_shape", "a mask is expanded to fixed shapes")
        elif masked and not _aligned(ctx):
            yield ctx.reject(efficient, "stride", "it reads a mask eight elements at once: rows must begin at multiples of eight")
        elif grouped:
            yield ctx.reject(efficient, "shape", "needs as many heads in k and v as in q")
        else:
            yield ctx.candidate(self.kernels[efficient], scores=[*q.shape[:3], p["keys"]], **extra)

    def _brgemm(self, ctx: SelectionContext, extra: dict[str, Any]) -> Candidate | Rejection:
        name, q = "attention.brgemm", ctx.spec("q")
        if q.dtype != "float32" or torch.backends.cpu.get_cpu_capability() != "AVX512":
            return ctx.reject(name, "device", "float32 on a CPU with AVX-512, which torch's brgemm needs")
        if len(q.shape) != 4 or ctx.params["dynamic_rows"] or any(0 in spec.shape for spec in ctx.specs):
            return ctx.reject(name, "shape", "four dimensions, fixed and not empty: oneDNN generates code for each shape")
        if ctx.spec("k").shape[-2] < 16:
            return ctx.reject(name, "nan", "with fewer keys than a vector holds, eager turns a row of NaN into 0")
        if any(spec.stride[-1] != 1 for spec in ctx.specs):
            return ctx.reject(name, "stride", "the last dimension of each input must be contiguous")
        if "mask" in ctx.roles and ctx.spec("mask").shape[-1] != ctx.spec("k").shape[-2]:
            return ctx.reject(name, "mask", "a mask must have a column for each key")
        return ctx.candidate(self.kernels[name], size=q.shape[-1], **extra)

    def _flash(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, q, v = "aten.flash_attention_cpu", ctx.spec("q"), ctx.spec("v")
        if q.dtype not in ("float32", "bfloat16", "float16", "float64"):
            yield ctx.reject(name, "dtype", f"no flash kernel for {q.dtype}")
        elif len(q.shape) != 4 or q.shape[-1] != v.shape[-1]:
            yield ctx.reject(name, "shape", "needs (batch, heads, length, size) with equal head sizes of q and v")
        elif any(0 in spec.shape for spec in ctx.specs):
            yield ctx.reject(name, "empty", "an input has no elements")
        elif any(spec.stride[-1] != 1 for role, spec in zip(ctx.roles, ctx.specs, strict=True) if role in "qkv"):
            yield ctx.reject(name, "stride", "the head dimension must be contiguous")
        else:
            mask: dict[str, Any] = {"mask_dtype": ctx.spec("mask").dtype if "mask" in ctx.roles else ""}
            yield ctx.candidate(self.kernels[name], q.dtype, **mask)
            if q.dtype == "float32" and ctx.options.error_budget > 0:
                yield ctx.candidate(self.kernels[name], "bfloat16", **mask)
