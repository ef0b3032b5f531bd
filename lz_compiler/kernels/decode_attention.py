"""Attention of a few queries over a static key-value cache of which only a part is filled.

Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023): the visible keys are cut into splits, one program per batch entry, KV head and
split reads its keys and values once, for all query heads of that KV head, and a second kernel combines the splits. How many keys
are visible is known on the device alone, so the splits are cut there, from the visible range: they stay balanced however little
of the cache is filled, and what nobody sees is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_ROWS = 128  # query heads per KV head times queries, of one program


@triton.jit
def _partial_kernel(
    q, k, v, position, keys, out, lse,
    q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, position_b, keys_b, keys_n,
    kv_heads, length, shift,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_KEYS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one KV head. Rows are (query head in the group, query); scores are (keys, rows), see the dot below.

    Writes the normalised partial output (row, split, d) and its log2-sum-exp2 (row, split), -inf where it saw no key. With one
    split, writes the result (b, i, h, d).
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    g = (pid // SPLITS) % kv_heads
    b = (pid // SPLITS // kv_heads).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    i = r % QUERIES
    h = g * GROUP + r // QUERIES
    row_ok = r < GROUP * QUERIES

    # Row r sees the keys low[r] <= j < high[r]; the program reads first <= j < last. In int64 until clamped to the cache.
    seen = tl.zeros((), tl.int64) + shift
    if HAS_POSITION:
        seen += tl.load(position + b * position_b).to(tl.int64)
    high = tl.minimum(tl.maximum(seen + i + 1, 0), length).to(tl.int32)
    last = tl.minimum(tl.maximum(seen + QUERIES, 0), length).to(tl.int32)
    low = tl.zeros_like(high)
    first = tl.zeros_like(last)
    if WINDOW > 0:
        low = tl.minimum(tl.maximum(seen + i + 1 - WINDOW, 0), length).to(tl.int32)
        first = tl.minimum(tl.maximum(seen + 1 - WINDOW, 0), length).to(tl.int32)
    first_tile = first // BLOCK_N
    per_split = tl.cdiv(tl.cdiv(last, BLOCK_N) - first_tile, SPLITS)
    start = (first_tile + split * per_split) * BLOCK_N
    end = tl.minimum(start + per_split * BLOCK_N, last)

    q_ptr = q + b * q_b + (h * q_h + i * q_i)[None, :] + d[:, None]
    q_t = tl.load(q_ptr, mask=row_ok[None, :] & (d < HEAD)[:, None], other=0.0)
    k_ptr = k + b * k_b + g.to(tl.int64) * k_h + n[:, None] * k_n + d[None, :]
    v_ptr = v + b * v_b + g.to(tl.int64) * v_h + n[None, :] * v_n + d[:, None]

    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        j = tile + n
        read = (j >= first) & (j < end)
        if HAS_KEYS:
            # A hidden key is not read at all: no traffic, and nothing that stands in it can leak.
            read &= tl.load(keys + b * keys_b + j.to(tl.int64) * keys_n, mask=read, other=0) != 0
        at = tl.cast(tile, tl.int64)
        k_tile = tl.load(k_ptr + at * k_n, mask=read[:, None] & (d < HEAD)[None, :], other=0.0)
        # Keys are the rows of the product: 64 or more of them fill Hopper's wgmma, few query heads never would.
        s = tl.dot(k_tile, q_t, input_precision="ieee") * (SCALE * LOG2E)
        visible = read[:, None] & (j[:, None] < high[None, :])
        if WINDOW > 0:
            visible &= j[:, None] >= low[None, :]
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[None, :])
        alpha = tl.exp2(m - m_safe)
        total = total * alpha + tl.sum(p, 0)
        v_tile = tl.load(v_ptr + at * v_n, mask=read[None, :] & (d < HEAD)[:, None], other=0.0)
        acc = tl.dot(v_tile, p.to(v_tile.dtype), acc * alpha[None, :], input_precision="ieee")
        m = m_new

    empty = total == 0.0  # not `total > 0`: NaN must stay NaN
    total = tl.where(empty, 1.0, total)
    acc = acc / total[None, :]
    write = row_ok[None, :] & (d < HEAD)[:, None]
    if SPLITS == 1:
        row = (b * QUERIES + i) * (kv_heads * GROUP) + h
        tl.store(out + row[None, :] * HEAD + d[:, None], acc.to(out.dtype.element_ty), mask=write)
    else:
        row = ((b * kv_heads + g) * (GROUP * QUERIES) + r) * SPLITS + split
        tl.store(lse + row, tl.where(empty, float("-inf"), m + tl.log2(total)), mask=row_ok)
        tl.store(out + row[None, :] * HEAD + d[:, None], acc, mask=write & (start < end))


@triton.jit
def _combine_kernel(
    partial, lse, out,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row (b, h, i): the partial outputs weighted by exp2 of their log2-sum-exp2."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(lse + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    some = x != float("-inf")  # a split that saw no key has written no output
    m = tl.max(x, 0)
    w = tl.exp2(x - tl.where(m == float("-inf"), 0.0, m))
    part = tl.load(partial + (row * SPLITS + s[:, None]) * HEAD + d[None, :], mask=some[:, None] & (d < HEAD)[None, :], other=0.0)
    total = tl.sum(w, 0)
    acc = tl.sum(part * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    i = row % QUERIES
    h = (row // QUERIES) % HEADS
    b = row // (QUERIES * HEADS)
    to = ((b * QUERIES + i) * HEADS + h) * HEAD
    tl.store(out + to + d, acc.to(out.dtype.element_ty), mask=d < HEAD)


def parameters(batch: int, kv_heads: int, rows: int, length: int, head: int, itemsize: int, multiprocessors: int) -> dict[str, int]:
    """Good `splits`, `block_n`, `warps`, `stages` of `decode_attention`, to try first; rows is (H / G) Q, itemsize in bytes.

    A tile is 64 keys: the fewest that Hopper's matrix instruction takes as rows. With heads of 128 in two bytes, three tiles in
    flight leave room for two programs on a multiprocessor. Splits (a power of two, each of at least two tiles when the cache is
    full) are the fewest whose programs fill at least 0.9 of their last round over the multiprocessors.
    """
    block_d = triton.next_power_of_2(head)
    block_n = 64 if itemsize == 2 else 32
    stages = 3 if block_d <= 128 and itemsize == 2 else 2
    warps = 8 if rows * block_d > 64 * 128 else 4
    slots = multiprocessors * (2 if block_d <= 128 else 1)
    most = max(1, length // (2 * block_n))
    options = [2**i for i in range(8) if 2**i <= most]

    def filled(splits: int) -> float:
        rounds = batch * kv_heads * splits / slots
        return rounds / -(-rounds // 1)

    splits = next((s for s in options if filled(s) >= 0.9), max(options, key=filled))
    return {"splits": splits, "block_n": block_n, "warps": warps, "stages": stages}


@triton_op("lz::decode_attention", mutates_args={})
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    keys: Tensor | None,
    shift: int,
    window: int,
    scale: float,
    *,
    splits: int,
    block_n: int,
    warps: int,
    stages: int,
) -> Tensor:
    """softmax(scale q k^T) v over the visible keys, (B, H, Q, D) in memory order (B, Q, H, D), in q's dtype.

    q is (B, H, Q, D), k and v are (B, G, K, D) with G dividing H; any strides but 1 in the last dimension; bfloat16, float16 or
    float32; D at most 256; (H / G) Q at most MAX_ROWS. Key j is visible to query i where j <= p + i + shift, with p
    `position` (integers, one element or (B,); None: 0), and j > p + i + shift - window (window 0: no such bound), and keys[b, j]
    (bool, (B or 1, K); None: all). A row that sees no key is 0. Sums are float32.

    A key that nobody sees is not read: unlike under eager's boolean mask, NaN in it does not reach the result.

    `splits`, `block_n`, `warps` and `stages` are for speed alone; see `parameters`.
    """
    batch, heads, queries, head = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    out = torch.empty((batch, queries, heads, head), dtype=q.dtype, device=q.device)
    partial, lse = out, q  # lse: unused
    if splits > 1:
        partial = torch.empty((batch * heads * queries, splits, head), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch * heads * queries, splits), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head))
    wrap_triton(_partial_kernel)[(batch * kv_heads * splits,)](
        q, k, v, q if position is None else position, q if keys is None else keys, partial, lse,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        0 if position is None or position.numel() == 1 else position.stride(0),
        0 if keys is None or keys.shape[0] == 1 else keys.stride(0), 0 if keys is None else keys.stride(1),
        kv_heads, length, shift,
        GROUP=group, QUERIES=queries, HEAD=head, WINDOW=window, SCALE=scale,
        HAS_POSITION=position is not None, HAS_KEYS=keys is not None,
        SPLITS=splits, BLOCK_R=max(16, triton.next_power_of_2(group * queries)), BLOCK_D=block_d, BLOCK_N=block_n, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        wrap_triton(_combine_kernel)[(batch * heads * queries,)](
            partial, lse, out,
            HEADS=heads, QUERIES=queries, HEAD=head,
            SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)
