"""FlashInfer (Ye et al., FlashInfer: efficient and customizable attention engine for LLM inference serving, 2025).

Only what is one call without state. Its batch wrappers plan on the host from the lengths, which a graph must not do in each step;
paged decode goes through `trtllm_batch_decode_with_kv_cache`, which reads block tables and lengths on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values, by_name
from .library import Library, LibraryBackend, at_last_key, like_query

LIBRARY = Library("flashinfer-python", "flashinfer", "pip install 'lz-compiler[flashinfer]'", builds=True)  # with nvcc
WORKSPACE = 128 << 20  # bytes, what the library's documentation recommends
SEMAPHORES = 8 << 20  # the first bytes of it, which must be zero


def _single_run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, left: int) -> Tensor:
    """One batch entry; a decode step reads keys and values in whichever order they stand in memory."""
    library = LIBRARY.load()
    turned = [x[0].transpose(0, 1) for x in (k, v)]
    if q.shape[2] == 1:
        layout = "NHD" if all(x.is_contiguous() for x in turned) else "HND"
        k, v = turned if layout == "NHD" else (x[0].contiguous() for x in (k, v))
        y = library.single_decode_with_kv_cache(q[0, :, 0].contiguous(), k, v, kv_layout=layout, sm_scale=scale, window_left=left)
        return y[None, :, None]
    # Views in the order NHD: with HND, 0.6.13's kernel for Hopper takes the length for the number of heads. Steps of 16 bytes.
    k, v = (x if all(step % 8 == 0 for step in x.stride()[:2]) else x.contiguous() for x in turned)
    y = library.single_prefill_with_kv_cache(q[0].transpose(0, 1).contiguous(), k, v, causal=causal, sm_scale=scale, window_left=left)
    return y.transpose(0, 1)[None]


def _paged_run(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, scale: float, layout: str) -> Tensor:
    page = k_cache.shape[1 if layout == "NHD" else 2]
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)  # from the graph's pool: no state between calls
    workspace[:SEMAPHORES].zero_()
    y = LIBRARY.load("flashinfer.decode").trtllm_batch_decode_with_kv_cache(
        q[:, :, 0].contiguous(), (k_cache, v_cache), workspace, table.int(), lengths.int(), table.shape[1] * page,
        bmm1_scale=scale, bmm2_scale=1.0, kv_layout=layout,
    )  # fmt: skip
    return y.masked_fill(lengths[:, None, None] == 0, 0)[:, :, None]  # what it gives for no key at all is not documented


flashinfer_single = ops.define(
    "flashinfer_single(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int left) -> Tensor",
    _single_run, like_query, torch.Tag.needs_exact_strides,
)  # fmt: skip
flashinfer_paged = ops.define(
    "flashinfer_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, float scale, str layout) -> Tensor",
    _paged_run, like_query, torch.Tag.needs_exact_strides,
)  # fmt: skip


def _single(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(flashinfer_single, t["q"], t["k"], t["v"], p["scale"], p["causal"], p["window"] - 1)


def _paged(emit: Emitter, t: Values, p: Values) -> Any:
    scale = float(p["scale"] if p["scale"] is not None else p["head"] ** -0.5)
    return emit.call(flashinfer_paged, t["q"], t["k_cache"], t["v_cache"], t["block_table"], t["seq_lens"], scale, p["layout"])


class FlashInfer(LibraryBackend):
    name = "flashinfer"
    devices: tuple[str, ...] = ("cuda",)
    kernels = by_name(Kernel("flashinfer.single", _single), Kernel("flashinfer.paged", _paged))
    library = LIBRARY

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        if name == "flashinfer.paged":
            cache = ctx.kv_cache
            assert cache is not None
            if ctx.spec("q").shape[1] // cache.kv_heads > 32:
                yield ctx.reject(name, "shape", "at most 32 heads read one key-value head")
            else:
                yield ctx.candidate(self.kernels[name], head=cache.head_size)
        else:
            yield at_last_key(ctx, self.kernels[name])
