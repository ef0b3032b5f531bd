"""Attention of a few queries over a key-value cache that stands in pages.

Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023) over the block tables of PagedAttention (Kwon et al., 2023): the tokens of each
batch entry are cut into splits, one program per batch entry, KV head and split reads its keys and values once, for all query heads
of that KV head, and a second kernel combines the splits. Lengths and pages are known on the device alone: the splits are cut
there, from the length, and each key looks up its own page, so that a tile may span several pages or be a part of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .decode_attention import LOG2E, _combine_kernel


@triton.jit
def _partial_kernel(
    q, k, v, table, lengths, out, lse,
    q_b, q_h, q_i, k_p, k_n, k_h, v_p, v_n, v_h, table_b, table_n, lengths_b,
    kv_heads, max_pages,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
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

    # Row r sees the keys j < high[r]; the program reads start <= j < end. No more than the block table has room for.
    length = tl.minimum(tl.load(lengths + b * lengths_b).to(tl.int64), max_pages * PAGE).to(tl.int32)
    high = length - QUERIES + 1 + i
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
    start = split * per_split
    end = tl.minimum(start + per_split, length)

    q_ptr = q + b * q_b + (h * q_h + i * q_i)[None, :] + d[:, None]
    q_t = tl.load(q_ptr, mask=row_ok[None, :] & (d < HEAD)[:, None], other=0.0)
    k_ptr = k + g.to(tl.int64) * k_h + d[None, :]
    v_ptr = v + g.to(tl.int64) * v_h + d[:, None]

    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        j = tile + n
        read = j < end
        page = tl.load(table + b * table_b + (j // PAGE) * table_n, mask=read, other=0).to(tl.int64)
        place = (j % PAGE).to(tl.int64)
        k_tile = tl.load(k_ptr + (page * k_p + place * k_n)[:, None], mask=read[:, None] & (d < HEAD)[None, :], other=0.0)
        # Keys are the rows of the product: 64 or more of them fill Hopper's wgmma, few query heads never would.
        s = tl.dot(k_tile, q_t, input_precision="ieee") * (SCALE * LOG2E)
        s = tl.where(read[:, None] & (j[:, None] < high[None, :]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[None, :])
        alpha = tl.exp2(m - m_safe)
        total = total * alpha + tl.sum(p, 0)
        v_tile = tl.load(v_ptr + (page * v_p + place * v_n)[None, :], mask=read[None, :] & (d < HEAD)[:, None], other=0.0)
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


@triton_op("lz::triton_paged_attention", mutates_args={})
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    layout: str,
    *,
    splits: int,
    block_n: int,
    warps: int,
    stages: int,
) -> Tensor:
    """What torch.ops.lz.paged_attention computes (see ops.py), in bfloat16, float16 or float32.

    Any strides but 1 in the last dimension of q and of the caches; D at most 256; (H / G) Q at most decode_attention.MAX_ROWS;
    scale above 0. `splits`, `block_n`, `warps` and `stages` are for speed alone; see `decode_attention.parameters`.
    """
    batch, heads, queries, head = q.shape
    at_token, at_head = (1, 2) if layout == "NHD" else (2, 1)
    page_size, kv_heads = k_cache.shape[at_token], k_cache.shape[at_head]
    steps = [c.stride(dim) for c in (k_cache, v_cache) for dim in (0, at_token, at_head)]
    out = torch.empty((batch, queries, heads, head), dtype=q.dtype, device=q.device)
    partial, lse = out, q  # lse: unused
    if splits > 1:
        partial = torch.empty((batch * heads * queries, splits, head), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch * heads * queries, splits), dtype=torch.float32, device=q.device)
    rows, block_d = heads // kv_heads * queries, max(16, triton.next_power_of_2(head))
    wrap_triton(_partial_kernel)[(batch * kv_heads * splits,)](
        q, k_cache, v_cache, block_table, seq_lens, partial, lse,
        q.stride(0), q.stride(1), q.stride(2), *steps,
        block_table.stride(0), block_table.stride(1), seq_lens.stride(0),
        kv_heads, block_table.shape[1],
        GROUP=heads // kv_heads, QUERIES=queries, HEAD=head, PAGE=page_size, SCALE=scale,
        SPLITS=splits, BLOCK_R=max(16, triton.next_power_of_2(rows)), BLOCK_D=block_d, BLOCK_N=block_n, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        wrap_triton(_combine_kernel)[(batch * heads * queries,)](
            partial, lse, out,
            HEADS=heads, QUERIES=queries, HEAD=head,
            SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)
