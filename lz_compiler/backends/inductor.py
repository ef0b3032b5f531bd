"""TorchInductor as a library among others: the loops that it fuses, a matrix-vector product and attention written as loops
it can fuse, and its C++ GEMM templates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..types import Candidate, Rejection
from .aten import weight_rows
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name

aten, prims = torch.ops.aten, torch.ops.prims


def _gemv(emit: Emitter, t: Values, p: Values) -> Any:
    """x (1, K) times w (N, K), as a broadcast multiplication and a sum: one pass over the weight, fused with neighbours."""
    y = emit.call(aten.sum.dim_IntList, emit.call(aten.mul.Tensor, weight_rows(emit, t, p), t["x"]), [1])
    y = emit.call(aten.reshape.default, y, [1, -1])
    return emit.call(aten.add.Tensor, y, t["bias"]) if "bias" in t else y


def _attention(emit: Emitter, t: Values, p: Values) -> Any:
    """softmax(q k^T scale + mask) v in elementary operators, accumulated in float32."""
    q, k, v, (batch, heads, length, size) = t["q"], t["k"], t["v"], p["q_shape"]
    keys = p["k_shape"][2]
    scale = p["scale"] if p["scale"] is not None else 1.0 / math.sqrt(size)
    flat = lambda x, n, d: emit.call(aten.reshape.default, x, [batch * heads, n, d])  # noqa: E731
    scores = emit.call(
        aten.bmm.default, flat(emit.call(aten.mul.Tensor, q, scale), length, size),
        emit.call(aten.permute.default, flat(k, keys, size), [0, 2, 1]),
    )  # fmt: skip
    scores = emit.call(aten.reshape.default, scores, [batch, heads, length, keys])
    if "mask" in t:
        mask = t["mask"]
        if p["mask_dtype"] == "bool":
            scores = emit.call(aten.where.ScalarOther, mask, scores, -math.inf)
        else:
            scores = emit.call(aten.add.Tensor, scores, mask)
    top = emit.call(aten.amax.default, scores, [-1], True)
    if "mask" in t:  # a row masked out entirely is 0 in eager, not NaN
        top = emit.call(aten.where.ScalarSelf, emit.call(aten.eq.Scalar, top, -math.inf), 0.0, top)
    weights = emit.call(aten.exp.default, emit.call(aten.sub.Tensor, scores, top))
    total = emit.call(aten.sum.dim_IntList, weights, [-1], True)
    if "mask" in t:
        total = emit.call(aten.where.ScalarSelf, emit.call(aten.eq.Scalar, total, 0.0), 1.0, total)
    weights = emit.call(aten.div.Tensor, weights, total)
    out = emit.call(aten.bmm.default, flat(weights, length, keys), flat(v, keys, p["v_size"]))
    return emit.call(aten.reshape.default, out, [batch, heads, length, p["v_size"]])


def _cpp_gemm(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(torch.ops.mkldnn._linear_pointwise.default, t["x"], t["w"], t["bias"], "none", [], "")


def _dense(emit: Emitter, t: Values, p: Values) -> Values:
    weight = emit.constant(lambda w: (w.t() if p["transposed"] else w).contiguous(), t["w"])
    bias = emit.constant(torch.clone, t["bias"]) if "bias" in t else None
    return {**t, "w": weight, "bias": bias}


class Inductor(Described):
    name = "inductor"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels = by_name(
        Kernel("inductor.gemv", _gemv),
        Kernel("inductor.attention", _attention, version=2),
        Kernel("inductor.cpp_gemm", _cpp_gemm, _dense, compiled=True),
    )

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        extra: dict[str, Any] = {}
        if name == "inductor.attention":
            q, k, v = (ctx.spec(role).shape for role in "qkv")
            mask = ctx.spec("mask").dtype if "mask" in ctx.roles else ""
            extra = {"mask_dtype": mask, "q_shape": q, "k_shape": k, "v_size": v[-1]}
        yield ctx.candidate(self.kernels[name], **extra)
