"""Skinny products for decoding: y (M, N) = x (M, K) @ w (N, K)^T for 1 to 8 rows of x, bound by streaming w once.

Each program owns `block_n` rows of w and walks along K in tiles whose 16-byte loads are issued together, so that enough
bytes are in flight per SM; x is small and stays in L1. Bias, activation, gate and residual are applied in float32 to the
sum before its only rounding. Weights may be int8 or float8_e4m3fn with one scale per row.

Two ways of multiplying, the same in all else: on the CUDA cores (few rows), and with w as the left operand of the tensor
cores (`dot`, 16-bit x, from about four rows on, where the first runs out of arithmetic).

With `splits` > 1 the programs of one row block share K: their float32 partial sums are added by a torch sum in a fixed
order, which Inductor fuses with the epilogue and with whatever reads the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

MAX_ROWS = 8  # and the tensor cores' smallest operand: with `dot`, rows of x beyond M are zero
ACTIVATIONS = ("", "relu", "silu", "gelu", "gelu_tanh")
RELU: tl.constexpr = tl.constexpr(1)
SILU: tl.constexpr = tl.constexpr(2)
GELU: tl.constexpr = tl.constexpr(3)
GELU_TANH: tl.constexpr = tl.constexpr(4)


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == RELU:
        v = tl.where(v < 0, 0.0, v)  # not maximum: NaN stays NaN
    elif ACT == SILU:
        v = v * tl.sigmoid(v)
    elif ACT == GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == GELU_TANH:
        # (1 + tanh(u)) / 2 is sigmoid(2u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return v


@triton.jit
def _affine(v, rows, mask, bias, scale):
    if scale is not None:
        v *= tl.load(scale + rows, mask=mask, other=0.0)
    if bias is not None:
        v += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _store(
    y, v, up, rows, m, mask, bias, other, scale, other_stride,
    M: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes outputs (m, rows), or, of a split sum, the part of this split. `v`, `rows`, `m` and `mask` broadcast together."""
    if SPLITS > 1:
        width: tl.constexpr = 2 * N if GATED else N
        y += (tl.program_id(1) * M + m) * width
        tl.store(y + rows, v, mask=mask)
        if GATED:
            tl.store(y + N + rows, up, mask=mask)
    else:
        v = _activate(_affine(v, rows, mask, bias, scale), ACT)
        if GATED:
            v *= _affine(up, N + rows, mask, bias, scale)
        if other is not None:
            v += tl.load(other + m * other_stride + rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + m * N + rows, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _weights(w, cols, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile of w, read once and by nobody else: it should not push x or activations out of the caches."""
    if EVEN:
        return tl.load(w + cols[None, :], eviction_policy="evict_first")
    return tl.load(w + cols[None, :], mask=cols[None, :] < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _dot_rows(tile, v, VEC: tl.constexpr):
    """Products summed over the VEC neighbours that one thread loaded: no shuffle until the very end."""
    product = tl.reshape(tile * v[None, :], (tile.shape[0], tile.shape[1] // VEC, VEC))
    return tl.sum(product, 2)


@triton.jit
def _gemv_kernel(
    x, w, bias, other, scale, y, x_stride, w_stride, other_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = CHUNK * SPLITS == K
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w += tl.minimum(rows, N - 1).to(tl.int64)[:, None] * w_stride
    start = tl.program_id(1) * CHUNK
    acc = ()
    acc_up = ()
    for _ in tl.static_range(M):
        acc += (tl.zeros((BLOCK_N, BLOCK_K // VEC), tl.float32),)
        if GATED:
            acc_up += (tl.zeros((BLOCK_N, BLOCK_K // VEC), tl.float32),)
    for k in tl.range(0, CHUNK, BLOCK_K, num_stages=STAGES):
        cols = start + k + tl.arange(0, BLOCK_K)
        tile = _weights(w, cols, K, EVEN).to(tl.float32)
        if GATED:
            tile_up = _weights(w + N * tl.cast(w_stride, tl.int64), cols, K, EVEN).to(tl.float32)
        new = ()
        new_up = ()
        for m in tl.static_range(M):
            if EVEN:
                v = tl.load(x + m * x_stride + cols).to(tl.float32)
            else:
                v = tl.load(x + m * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
            new += (acc[m] + _dot_rows(tile, v, VEC),)
            if GATED:
                new_up += (acc_up[m] + _dot_rows(tile_up, v, VEC),)
        acc = new
        acc_up = new_up
    for m in tl.static_range(M):
        v = tl.sum(acc[m], 1)
        up = tl.sum(acc_up[m], 1) if GATED else v
        _store(y, v, up, rows, m, rows < N, bias, other, scale, other_stride, M, N, ACT, GATED, SPLITS)


@triton.jit
def _gemv_dot_kernel(
    x, w, bias, other, scale, y, x_stride, w_stride, other_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = CHUNK * SPLITS == K
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w += tl.minimum(rows, N - 1).to(tl.int64)[:, None] * w_stride
    start = tl.program_id(1) * CHUNK
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, CHUNK, BLOCK_K, num_stages=STAGES):
        cols = start + k + tl.arange(0, BLOCK_K)
        mask = m[None, :] < M
        if not EVEN:
            mask = mask & (cols[:, None] < K)
        v = tl.load(x + m[None, :] * x_stride + cols[:, None], mask=mask, other=0.0)
        acc = tl.dot(_weights(w, cols, K, EVEN).to(v.dtype), v, acc)
        if GATED:
            up = tl.dot(_weights(w + N * tl.cast(w_stride, tl.int64), cols, K, EVEN).to(v.dtype), v, up)
    mask = (rows[:, None] < N) & (m[None, :] < M)
    _store(y, acc, up, rows[:, None], m[None, :], mask, bias, other, scale, other_stride, M, N, ACT, GATED, SPLITS)


def _epilogue(total: torch.Tensor, bias: Any, other: Any, scale: Any, act: str, gated: bool) -> torch.Tensor:
    """What `_store` does, on float32 sums (M, rows of w)."""
    if scale is not None:
        total = total * scale
    if bias is not None:
        total = total + bias
    value, up = total.chunk(2, -1) if gated else (total, None)
    if act == "relu":
        value = torch.relu(value)
    elif act == "silu":
        value = torch.nn.functional.silu(value)
    elif act:
        value = torch.nn.functional.gelu(value, approximate="tanh" if act == "gelu_tanh" else "none")
    if up is not None:
        value = value * up
    return value if other is None else value + other


@triton_op("lz::gemv", mutates_args={})
def gemv(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    act: str = "",
    gated: bool = False,
    *,
    dot: bool = False,
    block_n: int = 8,
    block_k: int = 1024,
    splits: int = 1,
    warps: int = 4,
    stages: int = 1,
) -> torch.Tensor:
    """act(x @ w^T * scale + bias) [* (the same of the second half of w's rows, without act)] + other.

    x (M, K), bf16, fp16 or float32, M at most 8; w (N, K), or (2N, K) with `gated`: gate rows, then up rows; of x's dtype, or
    int8 or float8_e4m3fn with `scale`, float32, one per row of w; bias, one per row of w; other (M, N). The last dimension of
    x, w and other has stride 1, bias and scale are contiguous. Returns (M, N), contiguous, of x's dtype.
    `block_n`, `block_k` and `warps` are powers of two; `dot` needs a 16-bit x, and block_n and block_k of at least 16.
    """
    m, k = x.shape
    n = w.shape[0] // 2 if gated else w.shape[0]
    assert 1 <= m <= MAX_ROWS, x.shape
    assert w.shape[1] == k, (x.shape, w.shape)
    assert not dot or x.element_size() == 2, x.dtype
    assert all(t.stride(-1) == 1 for t in (x, w, bias, other, scale) if t is not None)
    shape, dtype = ((m, n), x.dtype) if splits == 1 else ((splits, m, w.shape[0]), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    args = (x, w, bias, other, scale, y, x.stride(0), w.stride(0), n if other is None else other.stride(0))
    common = {"M": m, "N": n, "K": k, "ACT": ACTIVATIONS.index(act), "GATED": gated, "SPLITS": splits, "BLOCK_N": block_n}
    common |= {"BLOCK_K": block_k, "STAGES": stages, "num_warps": warps}
    common["CHUNK"] = triton.cdiv(triton.cdiv(k, block_k), splits) * block_k  # of K, per split
    grid = (triton.cdiv(n, block_n), splits)
    if dot:
        wrap_triton(_gemv_dot_kernel)[grid](*args, BLOCK_M=MAX_ROWS, **common)
    else:
        wrap_triton(_gemv_kernel)[grid](*args, VEC=16 // w.element_size(), **common)
    return y if splits == 1 else _epilogue(y.sum(0), bias, other, scale, act, gated).to(x.dtype)


def variants(m: int, n: int, k: int, weight_bytes: int = 2) -> list[dict[str, Any]]:
    """Keyword arguments of `gemv` worth measuring for m rows of 16-bit x and a w of (n, k) with elements of `weight_bytes`."""
    wide = 2048 // weight_bytes  # 128 threads times 16 bytes: one load per thread and row
    splits = min(4, triton.cdiv(k, 2 * wide)) if n <= 2048 else 1
    choices: list[dict[str, Any]] = [
        {"block_n": 4, "block_k": wide, "splits": splits, "warps": 4, "stages": 1},
        {"block_n": 8, "block_k": wide, "splits": splits, "warps": 4, "stages": 3},
    ]
    if m == 1:
        choices += [
            {"block_n": 2, "block_k": wide, "splits": 1, "warps": 4, "stages": 1},
            {"block_n": 4, "block_k": 2 * wide, "splits": splits, "warps": 8, "stages": 1},
        ]
    else:
        choices += [
            {"dot": True, "block_n": 16, "block_k": 256, "splits": splits, "warps": 1, "stages": 4},
            {"dot": True, "block_n": 32, "block_k": 256, "splits": splits, "warps": 2, "stages": 4},
            {"dot": True, "block_n": 64, "block_k": 128, "splits": 2 * splits, "warps": 4, "stages": 5},
        ]
    return choices
