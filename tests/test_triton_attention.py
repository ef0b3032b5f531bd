"""The Triton attention kernels against float64, run by Triton's interpreter, so without a GPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So it is set here before the kernels are imported, and the first test
says so if some other module of the same process was quicker.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is optional, and for Linux only")
from triton.runtime import interpreter

from lz_compiler.kernels import decode_attention as decode

_patch_lang_tensor: Callable[[Any, Any], None] = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    # Triton 3.6's interpreter asks for int() of one-element arrays, for loop bounds; NumPy 2.4 and later refuse.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

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


def test_kernels_are_interpreted() -> None:
    assert isinstance(decode._partial_kernel, interpreter.InterpretedFunction)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "length", "head", "layout", "position", "window", "splits"),
    [
        (4, 2, 1, 1, 64, "BHSD", 0, 0, 1),
        (4, 2, 1, 7, 64, "BSHD", 6, 0, 2),
        (4, 1, 1, 100, 64, "BHSD", 50, 0, 4),
        (2, 2, 3, 100, 80, "BSHD", 97, 0, 2),
        (4, 2, 3, 257, 64, "BHSD", (3, 200), 0, 4),
        (2, 2, 1, 257, 64, "BSHD", 256, 40, 2),
        (4, 2, 3, 100, 64, "BHSD", (-2, 60), 16, 3),
        (2, 1, 1, 100, 64, "BHSD", 1000, 950, 1),
        (2, 1, 1, 100, 64, "BHSD", -1, 0, 2),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_in_two_bytes(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, 4, 2, 1, 100, 64, "BHSD"))
    out = decode.decode_attention(q, k, v, torch.tensor([70]), None, 0, 0, SCALE, splits=2, block_n=64, warps=4, stages=2)
    assert out.dtype == dtype
    close(out, reference(q, k, v, predicate(q, k, 70)), atol=1e-2)


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
