"""A pool of pages to test paged attention on, and the answer in float64, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

GARBAGE = 1 << 30  # a page number that nobody may look up


class Pool:
    """Batch entries of every awkward length, on shuffled pages: empty, one token, one short of, at and over a page's edge, odd,
    full; the last two begin with the same page. What belongs to nobody is NaN, and so is what comes after a length."""

    def __init__(self, kv_heads: int, head: int, page_size: int, layout: str, dtype: torch.dtype, max_pages: int = 4) -> None:
        self.page_size, self.layout = page_size, layout
        p = page_size
        self.lengths = [0, 1, max(1, p - 1), p, p + 1, 2 * p + p // 2, max_pages * p]
        batch = len(self.lengths)
        pages = torch.randperm(batch * max_pages + 3)[: batch * max_pages].view(batch, max_pages)
        pages[-1, 0] = pages[-2, 0]
        shape = (batch * max_pages + 3, p, kv_heads, head)
        self.k, self.v = torch.full(shape, torch.nan).to(dtype), torch.full(shape, torch.nan).to(dtype)
        self.table = torch.full((batch, max_pages), GARBAGE, dtype=torch.int32)
        for b, length in enumerate(self.lengths):
            self.table[b, : -(-length // p)] = pages[b, : -(-length // p)]
            for j in range(length):
                page = int(pages[b, j // p])
                self.k[page, j % p], self.v[page, j % p] = torch.randn(2, kv_heads, head).to(dtype)

    def inside(self, token: int) -> tuple[int, int]:
        """Where a token of the last entry stands in the pool."""
        return int(self.table[-1, token // self.page_size]), token % self.page_size

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k_cache, v_cache, block_table and seq_lens."""
        k, v = (c.transpose(1, 2).contiguous() if self.layout == "HND" else c for c in (self.k, self.v))
        return k, v, self.table, torch.tensor(self.lengths, dtype=torch.int32)

    def expected(self, q: Tensor, scale: float) -> Tensor:
        """Softmax over the tokens that each query sees, in float64, one query at a time."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        _, heads, queries, _ = q.shape
        group = heads // self.k.shape[2]
        for b, length in enumerate(self.lengths):
            for i in range(queries):
                seen = [(int(self.table[b, j // self.page_size]), j % self.page_size) for j in range(length - queries + 1 + i)]
                for h in range(heads if seen else 0):
                    k, v = (torch.stack([c[page, place, h // group] for page, place in seen]).double() for c in (self.k, self.v))
                    out[b, h, i] = (k @ q[b, h, i].double() * scale).softmax(0) @ v
        return out
