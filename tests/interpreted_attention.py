"""The Triton attention kernels against float64, run by Triton's interpreter, so without a GPU.

Run by test_triton_attention.py, with TRITON_INTERPRET set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import interpreter
import pytest
import torch
from paged_pool import Pool
from torch import Tensor

from lz_compiler.kernels import attention as flash
from lz_compiler.kernels import decode_attention as decode
from lz_compiler.kernels import paged_attention as paged

SCALE = 0.125


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys in float64; visible broadcasts to (B, H, Q, K); 0 where a row sees none."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * SCALE).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def predicate(q: Tensor, k: Tensor, offset: Tensor | int, *, causal: bool = True, window: int = 0, keys: Tensor | None = None) -> Tensor:
    """visible[b, 0, i, j], spelled out as in the operators' docstrings."""
    last = torch.arange(q.shape[2]).view(1, 1, -1, 1) + torch.as_tensor(offset).view(-1, 1, 1, 1)
    j = torch.arange(k.shape[2])
    visible = (j <= last) if causal else torch.ones((), dtype=torch.bool).expand(1, 1, q.shape[2], k.shape[2])
    if window:
        visible = visible & (j > last - window)
    return visible if keys is None else visible & keys[:, None, None, :]


def inputs(batch: int, heads: int, kv_heads: int, queries: int, length: int, head: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (heads, queries), (kv_heads, length), (kv_heads, length)
    if layout == "BHSD":
        q, k, v = (torch.randn(batch, h, s, head) for h, s in shapes)
    else:
        q, k, v = (torch.randn(batch, s, h, head).transpose(1, 2) for h, s in shapes)
    return q, k, v


def close(out: Tensor, expected: Tensor, *, atol: float = 2e-6) -> None:
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    assert out.transpose(1, 2).is_contiguous()


def crossed(values: Sequence[Any], *cases: tuple[Any, ...]) -> list[Any]:
    """Each case with each value: with one of them in turn by default, and the others are slow."""
    crossing = ((i, case, j, value) for i, case in enumerate(cases) for j, value in enumerate(values))
    return [pytest.param(*case, value, marks=pytest.mark.slow if (i - j) % len(values) else ()) for i, case, j, value in crossing]


def test_kernels_are_interpreted() -> None:
    assert isinstance(decode._partial_kernel, interpreter.InterpretedFunction)
    assert isinstance(flash._attention_kernel, interpreter.InterpretedFunction)
    assert isinstance(paged._partial_kernel, interpreter.InterpretedFunction)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "length", "head", "layout", "position", "window", "splits", "padded"),
    crossed(
        (False, True),
        (4, 2, 1, 1, 64, "BHSD", 0, 0, 1),
        (4, 2, 1, 7, 64, "BSHD", 6, 0, 2),
        (4, 1, 1, 100, 64, "BHSD", 50, 0, 4),
        (2, 2, 3, 100, 80, "BSHD", 97, 0, 2),
        (4, 2, 3, 257, 64, "BHSD", (3, 200), 0, 4),
        (2, 2, 1, 257, 64, "BSHD", 256, 40, 2),
        (4, 2, 3, 100, 64, "BHSD", (-2, 60), 16, 3),
        (2, 1, 1, 100, 64, "BHSD", 1000, 950, 1),
        (2, 1, 1, 100, 64, "BHSD", -1, 0, 2),
    ),
)
def test_decode(
    heads: int, kv_heads: int, queries: int, length: int, head: int, layout: str, position: Any, window: int, splits: int, padded: bool
) -> None:
    q, k, v = inputs(2, heads, kv_heads, queries, length, head, layout)
    at = torch.tensor(position)
    keys = torch.rand(2, length) > 0.4 if padded else None
    if keys is not None:
        keys[1] = False
    expected = reference(q, k, v, predicate(q, k, at, window=window, keys=keys))
    out = decode.decode_attention(q, k, v, at, keys, 0, window, SCALE, splits=splits, block_n=32, warps=4, stages=2)
    close(out, expected)


def test_decode_without_position() -> None:
    q, k, v = inputs(1, 2, 1, 2, 40, 64, "BHSD")
    out = decode.decode_attention(q, k, v, None, None, 20, 0, SCALE, splits=2, block_n=16, warps=4, stages=2)
    close(out, reference(q, k, v, predicate(q, k, 20)))


def test_decode_in_float16() -> None:
    # The interpreter's products do not know bfloat16.
    q, k, v = (x.half() for x in inputs(1, 4, 2, 1, 100, 64, "BHSD"))
    out = decode.decode_attention(q, k, v, torch.tensor([70]), None, 0, 0, SCALE, splits=2, block_n=64, warps=4, stages=2)
    assert out.dtype == torch.float16
    close(out, reference(q, k, v, predicate(q, k, 70)), atol=2e-3)


def test_batches_share_their_keys() -> None:
    q, k, v = inputs(3, 2, 1, 1, 40, 64, "BHSD")
    keys = torch.rand(3, 40)[:1] > 0.4
    shared = keys.clone()  # nothing of ours behind its end
    expected = reference(q, k, v, predicate(q, k, 39, keys=keys))
    close(decode.decode_attention(q, k, v, None, shared, 39, 0, SCALE, splits=2, block_n=16, warps=4, stages=2), expected)
    close(flash.attention(q, k, v, None, shared, 39, True, 0, False, SCALE, block_m=16, block_n=16, warps=4, stages=2), expected)


def test_decode_reads_no_hidden_key() -> None:
    q, k, v = inputs(1, 2, 1, 1, 100, 64, "BHSD")
    keys = torch.arange(100)[None] >= 10
    expected = reference(q, k, v, predicate(q, k, 70, keys=keys))
    k[:, :, 71:], v[:, :, 71:], k[:, :, :10], v[:, :, :10] = torch.nan, torch.nan, torch.nan, torch.nan
    run = lambda: decode.decode_attention(q, k, v, torch.tensor([70]), keys, 0, 0, SCALE, splits=2, block_n=32, warps=4, stages=2)  # noqa: E731
    close(run(), expected)
    k[:, :, 40] = torch.nan  # a key that is seen
    assert run().isnan().all()


def test_decode_parameters_fill_the_card() -> None:
    large = decode.parameters(batch=32, kv_heads=8, rows=4, length=4096, head=128, itemsize=2, multiprocessors=132)
    small = decode.parameters(batch=1, kv_heads=8, rows=4, length=4096, head=128, itemsize=2, multiprocessors=132)
    assert large["splits"] * 32 * 8 >= 132
    assert small["splits"] * 8 >= 132
    assert small["splits"] * small["block_n"] * 2 <= 4096


LEFT, RIGHT, HOLES = "left", "right", "holes"


def padding(kind: str | None, length: int) -> Tensor | None:
    """Two batch entries: one padded as told, one of which nothing is visible."""
    if kind is None:
        return None
    one = {
        LEFT: torch.arange(length) >= length // 3,
        RIGHT: torch.arange(length) < max(1, length // 3),
        HOLES: torch.rand(length) > 0.3,
    }[kind]
    return torch.stack([one, torch.zeros_like(one)])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "length", "head", "layout", "offset", "causal", "window", "kind"),
    [
        (2, 1, 1, 1, 64, "BHSD", 0, True, 0, None),
        (2, 2, 7, 7, 64, "BSHD", 0, False, 0, None),
        (2, 1, 100, 100, 64, "BSHD", 0, True, 0, None),
        (1, 1, 100, 100, 80, "BHSD", 0, True, 0, LEFT),
        (2, 1, 7, 257, 80, "BHSD", (0, 200), True, 0, RIGHT),
        (2, 1, 100, 257, 64, "BSHD", 150, True, 33, None),
        (1, 1, 100, 257, 64, "BSHD", 10, False, 40, HOLES),
        (1, 1, 257, 257, 64, "BHSD", 0, True, 100, None),
        (2, 2, 65, 257, 64, "BSHD", 0, False, 0, None),
        (1, 1, 65, 257, 64, "BSHD", 0, False, 0, LEFT),
        (1, 1, 65, 257, 64, "BHSD", 0, False, 0, RIGHT),
        (1, 1, 65, 257, 64, "BHSD", 0, False, 0, HOLES),
        (1, 1, 100, 100, 64, "BHSD", (-40, -200), True, 0, None),
    ],
)
def test_attention(
    heads: int, kv_heads: int, queries: int, length: int, head: int, layout: str, offset: Any, causal: bool, window: int, kind: str | None
) -> None:
    q, k, v = inputs(2, heads, kv_heads, queries, length, head, layout)
    at, keys = torch.tensor(offset), padding(kind, length)
    visible = predicate(q, k, at, causal=causal, window=window, keys=keys)
    block_m = 64 if queries > 16 else 16
    run = lambda uniform: flash.attention(  # noqa: E731
        q, k, v, at - 1, keys, 1, causal, window, uniform, SCALE, block_m=block_m, block_n=32, warps=4, stages=2
    )
    close(run(False), reference(q, k, v, visible))
    if kind and not causal and not window:
        nothing = ~visible.any(-1, keepdim=True)
        close(run(True), reference(q * ~nothing, k, v, visible | nothing))


def test_attention_in_float16() -> None:
    q, k, v = (x.half() for x in inputs(1, 2, 1, 64, 100, 64, "BSHD"))
    out = flash.attention(q, k, v, None, None, 36, True, 0, False, SCALE, block_m=64, block_n=64, warps=4, stages=2)
    assert out.dtype == torch.float16
    close(out, reference(q, k, v, predicate(q, k, 36)), atol=2e-3)


def test_attention_skips_tiles() -> None:
    q, k, v = inputs(1, 1, 1, 32, 128, 64, "BHSD")
    keys = torch.arange(128)[None] < 64
    expected = reference(q, k, v, predicate(q, k, 64, window=40, keys=keys))
    # Whole tiles that no row sees: past the last visible key, and before the window.
    k[:, :, 64:], v[:, :, 64:], k[:, :, :16], v[:, :, :16] = torch.nan, torch.nan, torch.nan, torch.nan
    out = flash.attention(q, k, v, None, keys, 64, True, 40, False, SCALE, block_m=32, block_n=16, warps=4, stages=2)
    close(out, expected)


def test_scale_must_be_positive() -> None:
    q, k, v = inputs(1, 1, 1, 1, 1, 64, "BHSD")
    with pytest.raises(ValueError, match="scale"):
        flash.attention(q, k, v, None, None, 0, False, 0, False, -1.0, block_m=16, block_n=16, warps=4, stages=2)


# --- over pages: see test_paged.py for the pool -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "head", "page_size", "splits", "block_n", "layout"),
    crossed(
        ("NHD", "HND"),
        (4, 2, 1, 64, 16, 1, 32),  # a tile of two pages
        (4, 2, 1, 64, 16, 3, 32),
        (6, 2, 3, 80, 5, 2, 16),  # pages that no tile ends with
        (2, 2, 2, 128, 16, 2, 16),
        (4, 1, 1, 64, 64, 4, 16),  # a page of several tiles
        (8, 1, 5, 64, 1, 2, 16),
    ),
)
def test_paged(heads: int, kv_heads: int, queries: int, head: int, page_size: int, splits: int, block_n: int, layout: str) -> None:
    for dtype, atol in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        pool = Pool(kv_heads, head, page_size, layout, dtype)
        q = torch.randn(len(pool.lengths), queries, heads, head).to(dtype).transpose(1, 2)
        tuning = {"splits": splits, "block_n": block_n, "warps": 4, "stages": 2}
        out = paged.paged_attention(q, *pool.tensors(), SCALE, layout, **tuning)
        assert out.dtype == dtype
        close(out, pool.expected(q, SCALE), atol=atol)
        pool.k[pool.inside(page_size)] = torch.nan  # a token that is seen
        out = paged.paged_attention(q, *pool.tensors(), SCALE, layout, **tuning)
        assert torch.equal(out.isnan(), pool.expected(q, SCALE).isnan())
        assert out.isnan().any()
