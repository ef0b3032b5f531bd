"""The roofline model (Williams, Waterman, Patterson, CACM 2009): time = max(flops / peak rate, bytes / bandwidth) + launch.

It also prices what is never measured alone: loops that TorchInductor fuses, and conversions between formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import collectives
from ..backends.base import SelectionContext
from ..types import Candidate, Cost, Format, Target, TensorSpec
from . import Priced

# Operators whose arithmetic does not hide behind memory traffic in a fused loop.
TRANSCENDENTAL = frozenset(("exp", "erf", "tanh", "sigmoid", "log", "pow", "sin", "cos", "expm1", "log1p", "gelu", "silu"))


def itemsize(dtype: str) -> int:
    value = getattr(torch, dtype)
    return int(value.itemsize)


def bytes_of(spec: TensorSpec, dtype: str | None = None) -> int:
    """Bytes that one pass over the tensor moves; an expanded dimension is read once."""
    elements = math.prod(1 if stride == 0 else size for size, stride in zip(spec.shape, spec.stride, strict=False))
    return elements * itemsize(dtype or spec.dtype)


def flops_of(ctx: SelectionContext) -> int:
    """Multiply-adds count as two."""
    out = math.prod(ctx.outputs[0].shape)
    match ctx.region.op:
        case "linear":
            return 2 * out * ctx.spec("x").shape[-1]
        case "merged_linear":
            return 2 * ctx.spec("x").shape[0] * ctx.spec("x").shape[-1] * sum(ctx.params["widths"])
        case "gated_linear":
            return 4 * out * ctx.spec("x").shape[-1]
        case "bmm":
            return 2 * out * ctx.spec("a").shape[-1]
        case "conv":
            return 2 * out * math.prod(ctx.spec("w").shape[1:])
        case "attention":
            keys, size = ctx.spec("k").shape[-2:]
            return 2 * math.prod(ctx.spec("q").shape[:-1]) * keys * (size + ctx.spec("v").shape[-1])
        case "paged_attention":
            return 4 * out * int(ctx.params["keys"])
    return out


def work(ctx: SelectionContext, candidate: Candidate) -> tuple[int, int]:
    """Flops, and bytes that must move at least: each input and output once, in the candidate's formats."""
    formats = (*candidate.in_formats, *candidate.out_formats)
    moved = sum(bytes_of(s, f.dtype) for s, f in zip((*ctx.specs, *ctx.outputs), formats, strict=True))
    return flops_of(ctx), moved + candidate.param("traffic", 0)


def traffic_ns(target: Target, nbytes: float) -> int:
    return round(nbytes / target.bandwidth * 1e9)


def assumed_error(candidate: Candidate, ctx: SelectionContext) -> Candidate:
    """Nothing was run, so a kernel in a narrower dtype is charged that dtype's rounding of inputs and output."""
    if candidate.param("lossy"):
        return replace(candidate, epsilon=torch.finfo(torch.float8_e4m3fn).eps / 4)
    narrow = candidate.out_formats[0].dtype
    if narrow == ctx.outputs[0].dtype:
        return candidate
    return replace(candidate, epsilon=torch.finfo(getattr(torch, narrow)).eps)


class Roofline:
    def __init__(self, target: Target) -> None:
        self.target = target

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        return [(assumed_error(candidate, ctx), self.cost(ctx, candidate)) for candidate in candidates]

    def cost(self, ctx: SelectionContext, candidate: Candidate) -> Cost:
        if candidate.kernel in self.target.links:
            return Cost(collectives.price(self.target.links[candidate.kernel], ctx.params["nbytes"]), "measured")
        flops, moved = work(ctx, candidate)
        rate = self.target.flops.get(candidate.in_formats[0].dtype, self.target.flops["float32"])
        ns = max(flops / rate * 1e9, moved / self.target.bandwidth * 1e9) + self.target.launch_ns
        return Cost(max(1, round(ns)), "roofline")

    def fused(self, op: str, out: TensorSpec) -> Cost:
        """One node inside a fused loop: its reads and writes are priced as conversions, here is its arithmetic."""
        elements = math.prod(out.shape)
        return Cost(round(elements / self.target.flops["transcendental"] * 1e9) if op in TRANSCENDENTAL else 0, "roofline")

    def extern(self, specs: Sequence[TensorSpec]) -> Cost:
        """A call that has no alternative: its traffic, so that the plan's total is not blind to it."""
        return Cost(traffic_ns(self.target, sum(map(bytes_of, specs))) + self.target.launch_ns, "assumed")

    def conversion(self, spec: TensorSpec, src: Format, dst: Format, cold: bool = False) -> Cost:
        """Bytes read and written; entering or leaving a fused loop costs one side only, a change of layout strides.

        What fits the cache is still there when its reader comes; a `cold` source (an input, a weight) is not.
        """
        read, written = (0 if f.layout.startswith("fused") else bytes_of(spec, f.dtype) for f in (src, dst))
        strided = ("channels_last" in src.layout) != ("channels_last" in dst.layout)
        ns = (traffic_ns(self.target, read) if cold else self.warm_ns(read)) + self.warm_ns(written)
        alone = 0 if "fused" in src.layout or "fused" in dst.layout else self.target.launch_ns
        return Cost(ns * (2 if strided else 1) + alone, "roofline")

    def warm_ns(self, nbytes: int) -> int:
        """What moving bytes takes that were just written, or are read next."""
        fits = 0 < nbytes <= self.target.cache_bytes
        return round(nbytes / self.target.cache_bandwidth * 1e9) if fits else traffic_ns(self.target, nbytes)
