"""xFormers' memory-efficient attention (Lefaudeux et al., xFormers, 2022), which picks among the kernels it was built with."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values, by_name
from .library import Library, LibraryBackend, at_last_key, like_query

LIBRARY = Library("xformers", "xformers.ops", "pip install 'lz-compiler[xformers]'")


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: int) -> Tensor:
    """Heads as xFormers has them: (B, M, H, D), or (B, M, G, H, D) for G groups that share keys and values, expanded to H."""
    fmha = LIBRARY.load("xformers.ops.fmha")
    bias = None
    if causal:
        masks = fmha.attn_bias
        bias = masks.LowerTriangularFromBottomRightLocalAttentionMask(window) if window else masks.LowerTriangularFromBottomRightMask()
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if shared > 1:
        q = q.unflatten(2, (groups, shared))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, shared, -1) for x in (k, v))
    y = fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias, scale=scale)
    return (y.flatten(2, 3) if shared > 1 else y).contiguous().transpose(1, 2)


xformers_attention = ops.define(
    "xformers_attention(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int window) -> Tensor",
    _run, like_query, torch.Tag.needs_exact_strides,
)  # fmt: skip


def _attention(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(xformers_attention, t["q"], t["k"], t["v"], p["scale"], p["causal"], p["window"])


class XFormers(LibraryBackend):
    name = "xformers"
    devices: tuple[str, ...] = ("cuda",)
    kernels = by_name(Kernel("xformers.attention", _attention))
    library = LIBRARY

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        if not getattr(sys.modules.get("xformers._cpp_lib"), "_built_with_cuda", True):
            yield ctx.reject(name, "library_import", "its CUDA kernels do not load: built for another torch (python -m xformers.info)")
        else:
            yield at_last_key(ctx, self.kernels[name])
