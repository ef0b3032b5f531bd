"""What a learned cost model sees of a kernel: named numbers. Sizes are base-2 logarithms; names with `=` are 0/1 indicators."""

from __future__ import annotations

import math
from dataclasses import replace

from ..backends.base import SelectionContext
from ..types import Candidate, Target
from .roofline import Roofline, bytes_of, flops_of

Features = dict[str, float]


def roofline_ns(ctx: SelectionContext, candidate: Candidate, roofline: Roofline) -> int:
    """The kernel's own estimate, without the traffic that using it costs elsewhere (which is no part of a measurement)."""
    own = tuple((k, v) for k, v in candidate.params if k != "traffic")
    return roofline.cost(ctx, replace(candidate, params=own)).ns


def features(ctx: SelectionContext, candidate: Candidate, target: Target) -> Features:
    """Op, kernel, sizes, dtypes, layouts and parameters of the candidate; peaks of the device; the roofline's estimate."""
    formats = (*candidate.in_formats, *candidate.out_formats)
    moved = sum(bytes_of(s, f.dtype) for s, f in zip((*ctx.specs, *ctx.outputs), formats, strict=True))
    rate = target.flops.get(candidate.in_formats[0].dtype, target.flops["float32"])
    flops = flops_of(ctx)
    sizes = {
        "roofline": roofline_ns(ctx, candidate, Roofline(target)), "flops": flops, "bytes": moved, "intensity": flops / max(moved, 1),
        "bandwidth": target.bandwidth, "rate": rate, "launch": target.launch_ns, "inputs": len(ctx.specs), **_sizes(ctx),
    }  # fmt: skip
    found = {name: math.log2(1 + value) for name, value in sizes.items()}
    for name in _names(ctx, candidate, target):
        found[name] = 1.0
    return found


def _sizes(ctx: SelectionContext) -> dict[str, float]:
    """The sizes that an op's kernels differ by: of a product M, N, K; of attention and convolution their own."""
    out = ctx.outputs[0].shape
    found: dict[str, float] = {"out": math.prod(out), "last": out[-1] if out else 1, "inner": (ctx.specs[0].shape or (1,))[-1]}
    found["rows"] = found["out"] / max(found["last"], 1)
    if ctx.region.op in ("attention", "paged_attention"):
        q = ctx.spec("q").shape
        if ctx.region.op == "attention":
            *batch, keys, _ = ctx.spec("k").shape
            kv_heads = math.prod(batch)
        else:
            assert ctx.kv_cache is not None
            keys, kv_heads = ctx.params["keys"], q[0] * ctx.kv_cache.kv_heads
        heads = math.prod(q[:-2])
        found |= {"heads": heads, "queries": q[-2], "keys": keys, "head": q[-1], "group": heads / kv_heads}
    elif ctx.region.op == "conv":
        w, step = ctx.spec("w").shape, ctx.params.get("stride", (1,))
        found |= {"channels": w[1], "filters": w[0], "window": math.prod(w[2:]), "stride": math.prod(step),
                  "groups": ctx.params.get("groups", 1), "pixels": math.prod(out[2:])}  # fmt: skip
    elif ctx.region.op == "bmm":
        found["batch"] = out[0]
    return found


def _names(ctx: SelectionContext, candidate: Candidate, target: Target) -> list[str]:
    params = dict(candidate.params)
    names = [f"device={target.device}", f"op={ctx.region.op}", f"kernel={candidate.kernel}", f"out={candidate.out_formats[0]}"]
    names += [f"in{i}={fmt}" for i, fmt in enumerate(candidate.in_formats[:2])]
    names += [f"{k}={params[k]}" for k in ("act", "binary", "variant", "weight_dtype") if params.get(k)]
    names += [f"has={role}" for role in ctx.roles if role in ("bias", "other", "mask")]
    names += [f"is={k}" for k in ("as_is", "causal", "absorbed", "transposed") if params.get(k) is True]
    return names
