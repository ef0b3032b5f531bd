"""Attention whose mask is a predicate of positions, evaluated inside the kernel; no mask is read but one bit per key.

FlashAttention-2 (Dao, 2023): one program per batch entry, query head and tile of queries, online softmax over tiles of keys.
Tiles that no row can see are not visited; tiles that every row sees entirely take a loop without any mask. Where the visible
keys of a batch entry are one range, as under padding, that holds for them too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _clamp(x, length):
    return tl.minimum(tl.maximum(x, 0), length).to(tl.int32)


@triton.jit
def _visible_range(keys, keys_n, length, BLOCK: tl.constexpr):
    """First visible key, one past the last one (both 0 where there is none), and how many there are."""
    j = tl.arange(0, BLOCK)
    first = tl.full((BLOCK,), 2147483647, tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, length, BLOCK):
        at = start + j
        seen = tl.load(keys + at.to(tl.int64) * keys_n, mask=at < length, other=0) != 0
        first = tl.minimum(first, tl.where(seen, at, 2147483647))
        end = tl.where(seen, at + 1, end)
        count += seen.to(tl.int32)
    last = tl.max(end, 0)
    return tl.minimum(tl.min(first, 0), last), last, tl.sum(count, 0)


@triton.jit
def _step(
    acc, m, total, q_tile, k, v, keys, tile, low, high, hidden, k_n, v_n, keys_n, length,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, HAS_KEYS: tl.constexpr,
    UNIFORM: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys. `m` is in units of log2; row r sees low[r] <= j < high[r]."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    j = tile + n
    # 64-bit per tile, 32-bit within it: the loop keeps half the registers for addresses.
    k_ptr = (k + tl.cast(tile, tl.int64) * k_n) + (n[None, :] * k_n + d[:, None])
    v_ptr = (v + tl.cast(tile, tl.int64) * v_n) + (n[:, None] * v_n + d[None, :])
    if MASKED:
        k_tile = tl.load(k_ptr, mask=(j < length)[None, :] & (d < HEAD)[:, None], other=0.0)
    elif HEAD < BLOCK_D:
        k_tile = tl.load(k_ptr, mask=(d < HEAD)[:, None], other=0.0)
    else:
        k_tile = tl.load(k_ptr)
    s = tl.dot(q_tile, k_tile, input_precision="ieee")
    if MASKED:
        visible = (j < length)[None, :]
        if CAUSAL:
            visible &= j[None, :] < high[:, None]
        if WINDOW > 0:
            visible &= j[None, :] >= low[:, None]
        if HAS_KEYS:
            seen = tl.load(keys + j.to(tl.int64) * keys_n, mask=j < length, other=0) != 0
            if UNIFORM:
                s = tl.where(seen[None, :], s, hidden)
            else:
                visible &= seen[None, :]
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * (SCALE * LOG2E))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far
    p = tl.exp2(s * (SCALE * LOG2E) - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    total = total * alpha + tl.sum(p, 1)
    if MASKED:
        v_tile = tl.load(v_ptr, mask=(j < length)[:, None] & (d < HEAD)[None, :], other=0.0)
    elif HEAD < BLOCK_D:
        v_tile = tl.load(v_ptr, mask=(d < HEAD)[None, :], other=0.0)
    else:
        v_tile = tl.load(v_ptr)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, total


@triton.jit
def _attention_kernel(
    q, k, v, offset, keys, out,
    q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, offset_b, keys_b, keys_n,
    heads, queries, length, shift,
    GROUP: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_KEYS: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid % tiles
    if CAUSAL:
        tile_m = tiles - 1 - tile_m  # the longest first
    h = (pid // tiles) % heads
    b = (pid // tiles // heads).to(tl.int64)
    g = (h // GROUP).to(tl.int64)
    top = tile_m * BLOCK_M
    bottom = tl.minimum(top + BLOCK_M, queries) - 1
    i = top + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)

    # Some row sees keys of [start, end); every row sees all of [full_start, full_end). In int64 until clamped to the keys.
    seen = tl.zeros((), tl.int64) + shift
    if HAS_OFFSET:
        seen += tl.load(offset + b * offset_b).to(tl.int64)
    start, end = _clamp(seen * 0, length), _clamp(seen * 0 + length, length)
    full_start, full_end = start, end
    low, high = _clamp(seen + 1 + i - WINDOW, length), _clamp(seen + 1 + i, length)
    if CAUSAL:
        end, full_end = _clamp(seen + 1 + bottom, length), _clamp(seen + 1 + top, length)
    if WINDOW > 0:
        start, full_start = _clamp(seen + 1 + top - WINDOW, length), _clamp(seen + 1 + bottom - WINDOW, length)
    hidden = 0.0
    if HAS_KEYS:
        keys += b * keys_b
        keys_start, keys_end, count = _visible_range(keys, keys_n, length, BLOCK_KEYS)
        if UNIFORM:  # no causality and no window here; where nothing is visible, every key has the same score
            hidden = tl.where(count == 0, 0.0, float("-inf"))
            keys_end = tl.where(count == 0, length, keys_end)
        start, end = tl.maximum(start, keys_start), tl.minimum(end, keys_end)
        full_start, full_end = tl.maximum(full_start, start), tl.minimum(full_end, end)
        full_end = tl.where(count == keys_end - keys_start, full_end, 0)
    start = start // BLOCK_N * BLOCK_N
    full_start = tl.cdiv(full_start, BLOCK_N) * BLOCK_N
    full_end = full_end // BLOCK_N * BLOCK_N
    some_full = full_start < full_end
    full_start, full_end = tl.where(some_full, full_start, start), tl.where(some_full, full_end, start)

    q_ptr = q + b * q_b + h.to(tl.int64) * q_h + i.to(tl.int64)[:, None] * q_i + d[None, :]
    q_tile = tl.load(q_ptr, mask=(i < queries)[:, None] & (d < HEAD)[None, :], other=0.0)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in tl.range(full_start, full_end, BLOCK_N, num_stages=STAGES):
        acc, m, total = _step(
            acc, m, total, q_tile, k, v, keys, tile, low, high, hidden, k_n, v_n, keys_n, length,
            HEAD, CAUSAL, WINDOW, SCALE, HAS_KEYS, UNIFORM, False, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    before = (full_start - start) // BLOCK_N
    for t in tl.range(0, before + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_N), num_stages=STAGES):
        tile = tl.where(t < before, start + t * BLOCK_N, full_end + (t - before) * BLOCK_N)
        acc, m, total = _step(
            acc, m, total, q_tile, k, v, keys, tile, low, high, hidden, k_n, v_n, keys_n, length,
            HEAD, CAUSAL, WINDOW, SCALE, HAS_KEYS, UNIFORM, True, BLOCK_D, BLOCK_N,
        )  # fmt: skip

    acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    row = (b * queries + i) * heads + h
    tl.store(out + row[:, None] * HEAD + d[None, :], acc.to(out.dtype.element_ty), mask=(i < queries)[:, None] & (d < HEAD)[None, :])


def parameters(queries: int, head: int, itemsize: int) -> dict[str, int]:
    """Good `block_m`, `block_n`, `warps`, `stages` of `attention`; itemsize in bytes. Blocks of 128 keys lost to 64 in each of the 17
    regions of the H200's corpus with more than 64 queries and head sizes up to 128.

    64 rows are the fewest of Hopper's matrix instruction, for four warps; 128 rows by eight warps leave each thread the
    registers that its part of the scores and of the result takes. Products in float32 proper run on the CUDA cores, from registers.
    """
    block_d = triton.next_power_of_2(head)
    if itemsize == 4:
        return {"block_m": 32, "block_n": 32, "warps": 4 if block_d <= 64 else 8, "stages": 2}
    if queries <= 64:
        return {"block_m": 64, "block_n": 64, "warps": 4, "stages": 2}
    return {"block_m": 128, "block_n": 64, "warps": 4 if block_d <= 64 else 8, "stages": 3 if block_d <= 128 else 2}


@triton_op("lz::attention", mutates_args={})
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor | None,
    keys: Tensor | None,
    shift: int,
    causal: bool,
    window: int,
    uniform: bool,
    scale: float,
    *,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
) -> Tensor:
    """softmax(scale q k^T) v over the visible keys, (B, H, Q, D) in memory order (B, Q, H, D), in q's dtype. No gradient.

    q is (B, H, Q, D), k and v are (B, G, K, D) with G dividing H; any strides but 1 in the last dimension; bfloat16, float16 or
    float32; D at most 256; scale positive. With o = `offset` + `shift` (offset: integers, one element or (B,); None: 0), key j is
    visible to query i where (not causal or j <= i + o), (window is 0 or j > i + o - window) and keys[b, j] (bool, (B or 1, K);
    None: all). A row that sees no key is 0; with `uniform`, for neither causal nor window, it is the mean of v over all keys, as under
    an additive mask of the most negative number. Sums are float32.

    `block_m`, `block_n`, `warps` and `stages` are for speed alone; see `parameters`.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}, and must be positive: the kernel scales a maximum of scores, not the scores")
    batch, heads, queries, head = q.shape
    length = k.shape[2]
    out = torch.empty((batch, queries, heads, head), dtype=q.dtype, device=q.device)
    wrap_triton(_attention_kernel)[(triton.cdiv(queries, block_m) * heads * batch,)](
        q, k, v, q if offset is None else offset, q if keys is None else keys, out,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        0 if offset is None or offset.numel() == 1 else offset.stride(0),
        0 if keys is None or keys.shape[0] == 1 else keys.stride(0), 0 if keys is None else keys.stride(1),
        heads, queries, length, shift,
        GROUP=heads // k.shape[1], HEAD=head, CAUSAL=causal, WINDOW=window, SCALE=scale,
        HAS_OFFSET=offset is not None, HAS_KEYS=keys is not None, UNIFORM=uniform,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, triton.next_power_of_2(head)), BLOCK_KEYS=1024, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return out.transpose(1, 2)
