"""FlashAttention 2 and 3 (Dao, FlashAttention-2, 2023; Shah et al., FlashAttention-3, 2024), each a package of its own.

Both take (batch, length, heads, size), which is a view of what the graph has, grouped heads, and causal masks and windows that are
aligned to the last key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import ops, semantics
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values
from .library import Library, LibraryBackend, at_last_key, like_query


def _only(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # early versions of FlashAttention 3 return the sums as well


def _attention_run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, left: int, module: str) -> Tensor:
    call = import_module(module).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _only(call(q, k, v, softmax_scale=scale, causal=causal, window_size=(left, 0 if left >= 0 else -1))).transpose(1, 2)


def _cached_run(
    q: Tensor, k: Tensor, v: Tensor, last: Tensor, offset: int, pages: Tensor | None, scale: float | None, left: int, module: str
) -> Tensor:
    """k and v are (B, H, K, D), or with `pages` pools (pages, page_size, H, D); `last` + `offset` is how many keys there are."""
    call = import_module(module).flash_attn_with_kvcache
    k, v = (k, v) if pages is not None else (k.transpose(1, 2), v.transpose(1, 2))
    lengths = (last + offset).expand(q.shape[0]).int().contiguous()
    table = {"page_table" if module == "flash_attn_interface" else "block_table": pages.int()} if pages is not None else {}
    window = (left, 0 if left >= 0 else -1)
    y = call(q.transpose(1, 2), k, v, cache_seqlens=lengths, softmax_scale=scale, causal=True, window_size=window, **table)
    return _only(y).transpose(1, 2)


_STRIDES = torch.Tag.needs_exact_strides  # they ask for a contiguous last dimension, which descriptors promise of the graph's strides
flash_attention = ops.define(
    "flash_attention(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int left, str module) -> Tensor",
    _attention_run, like_query, _STRIDES,
)  # fmt: skip
flash_attention_cached = ops.define(
    "flash_attention_cached(Tensor q, Tensor k, Tensor v, Tensor last, int offset, Tensor? pages, float? scale, int left, str module)"
    " -> Tensor",
    _cached_run, like_query, _STRIDES,
)  # fmt: skip


def _attention(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(flash_attention, t["q"], t["k"], t["v"], p["scale"], p["causal"], p["window"] - 1, p["module"])


def _cached(emit: Emitter, t: Values, p: Values) -> Any:
    position, _ = semantics.mask_inputs(emit.call, t, p)
    arguments = (position, p["shift"] + p["queries"], None, p["scale"], p["window"] - 1, p["module"])
    return emit.call(flash_attention_cached, t["q"], t["k"], t["v"], *arguments)


def _paged(emit: Emitter, t: Values, p: Values) -> Any:
    arguments = (t["seq_lens"], 0, t["block_table"], p["scale"], -1, p["module"])
    return emit.call(flash_attention_cached, t["q"], t["k_cache"], t["v_cache"], *arguments)


def _kernels(name: str) -> dict[str, Kernel]:
    runs = {"attention": _attention, "cached": _cached, "paged": _paged}
    return {f"{name}.{what}": Kernel(f"{name}.{what}", run) for what, run in runs.items()}


class FlashAttention(LibraryBackend):
    name = "flash_attn"
    devices: tuple[str, ...] = ("cuda",)
    kernels: Mapping[str, Kernel] = _kernels("flash_attn")
    library = Library("flash-attn", "flash_attn", "pip install --no-build-isolation 'lz-compiler[flash-attn]'")

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        offer = at_last_key if name.endswith(".attention") else SelectionContext.candidate
        yield offer(ctx, self.kernels[name], module=self.library.module)


class FlashAttention3(FlashAttention):
    name = "flash_attn_3"
    kernels: Mapping[str, Kernel] = _kernels("flash_attn_3")
    library = Library("flash-attn-3", "flash_attn_interface", "build `hopper` of https://github.com/Dao-AILab/flash-attention")
