"""Attention as torch implements it (on a CPU the flash kernel, on a GPU cuDNN, flash and memory-efficient; the unfused formula),
and on a CPU a kernel of our own over oneDNN's small products.

A mask that was understood (masks.py) reaches a kernel as its own arguments; what these cannot say is written out as the
smallest tensor to add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .. import ops, semantics
from ..types import Candidate, Rejection
from .aten import attention_arguments
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name

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
        added = _mask(emit, t, p)
        return emit.call(aten.clone.default, added, memory_format=torch.contiguous_format) if p.get("mask_copied") else added
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


def _scattered(ctx: SelectionContext) -> bool:
    """Whether a row of the mask is not one piece of memory (T5's position bias has its heads innermost): the vendor's kernels would read it
    in pieces of 16 bytes all the same, which is an error that no process survives."""
    mask = ctx.spec("mask") if "mask" in ctx.roles else None
    return mask is not None and mask.shape[-1] > 1 and mask.stride[-1] != 1


def _aligned(ctx: SelectionContext) -> bool:
    """Whether the rows of the term that is added begin at multiples of eight elements, as torch's own wrapper sees to."""
    if "mask" not in ctx.roles:
        return bool(ctx.params["keys"] % 8 == 0)
    mask = ctx.spec("mask")
    steps = [step for size, step in zip(mask.shape[:-1], mask.stride[:-1], strict=True) if size > 1]
    return mask.shape[-1] == ctx.params["keys"] and mask.shape[-1] % 8 == 0 and mask.stride[-1] == 1 and all(s % 8 == 0 for s in steps)


class Attention(Described):
    name = "attention"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels = by_name(
        Kernel("aten.flash_attention_cpu", _flash),
        Kernel("cudnn.attention", _cudnn),
        Kernel("aten.flash_attention", _flash_cuda),
        Kernel("aten.efficient_attention", _efficient),
        Kernel("attention.brgemm", _brgemm, setup=ops.attention_brgemm),
        Kernel("aten.sdpa_math", lambda emit, t, p: emit.call(ops.sdpa_math, *attention_arguments(t, p))),
    )

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        if ctx.region.op == "attention" and _broadcasts(ctx):
            for name in ("aten.sdpa_math", "aten.flash_attention_cpu", "cudnn.attention", "aten.flash_attention"):
                yield ctx.reject(name, "shape", "q, k and v have different batch dimensions")
        else:
            yield from super().candidates(ctx)

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        kernel, q = self.kernels[name], ctx.spec("q")
        extra: dict[str, Any] = {"mask_dtype": ctx.spec("mask").dtype if "mask" in ctx.roles else ""}
        match name:
            case "aten.flash_attention_cpu":
                yield ctx.candidate(kernel, q.dtype, **extra)
                if q.dtype == "float32" and ctx.options.error_budget > 0:
                    yield ctx.candidate(kernel, "bfloat16", **extra)
            case "attention.brgemm":
                yield ctx.candidate(kernel, size=q.shape[-1], **extra)
            case "cudnn.attention" if _scattered(ctx):
                yield ctx.candidate(kernel, mask_copied=True, **extra)
            case "aten.efficient_attention" if len(ctx.roles) > 3 and not _aligned(ctx):
                yield ctx.reject(name, "stride", "it reads a mask eight elements at once: rows must begin at multiples of eight")
            case "aten.efficient_attention":
                yield ctx.candidate(kernel, scores=[*q.shape[:3], ctx.params["keys"]], **extra)
            case _:
                yield ctx.candidate(kernel, **extra)
