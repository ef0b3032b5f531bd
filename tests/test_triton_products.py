"""Own product and convolution kernels against float64, on a CPU through Triton's interpreter.

Triton decides at its import whether kernels are interpreted, and other tests may have imported it already: so the cases run
in one process of their own, this file as a program, and each reports to its own test here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
import torch

INTERPRETED = __name__ == "__main__"
if INTERPRETED:
    import interpreter  # noqa: F401  (before the kernels)

    from lz_compiler.backends.base import quantize_rows
    from lz_compiler.kernels import depthwise_conv as depthwise
    from lz_compiler.kernels import gemv as products
    from lz_compiler.kernels.depthwise_conv import depthwise_conv
    from lz_compiler.kernels.gemv import gemv

# Relative error in the norm; the interpreter cuts to bf16 where a GPU rounds to nearest.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2**-7}
BLOCKS = {"block_n": 8, "block_k": 512}
CASES: dict[str, Callable[[], None]] = {}


def _case(function: Callable[..., None], *args: object, **kwargs: object) -> None:
    name = "-".join([function.__name__.strip("_"), *map(str, args), *(f"{k}={v}" for k, v in kwargs.items())]).replace("torch.", "")
    CASES[name] = lambda: function(*args, **kwargs)


def _check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    assert error < tolerance, error


def _activation(act: str, v: torch.Tensor) -> torch.Tensor:
    if act.startswith("gelu"):
        return torch.nn.functional.gelu(v, approximate="tanh" if act == "gelu_tanh" else "none")
    return {"": lambda t: t, "relu": torch.relu, "silu": torch.nn.functional.silu}[act](v)


def _product(
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    act: str = "",
    gated: bool = False,
    bias: bool = False,
    other: bool = False,
    quantized: torch.dtype | None = None,
    splits: int = 1,
    dot: bool = False,
) -> None:
    rows = 2 * n if gated else n
    x, w = torch.randn(m, k).to(dtype), (torch.randn(rows, k) / k**0.5).to(dtype)
    b = torch.randn(rows).to(dtype) if bias else None
    # A slice: the rows of `other` are further apart than they are long.
    o = torch.randn(m, n + 3).to(dtype)[:, :n] if other else None
    scale = None
    if quantized is not None:
        w, scale = quantize_rows(w, quantized)
    blocks = {"block_n": 16, "block_k": 128, "dot": True} if dot else BLOCKS
    y = gemv(x, w, b, o, scale, act, gated, splits=splits, **blocks)
    total = x.double() @ w.double().T
    total = total if scale is None else total * scale.double()
    total = total if b is None else total + b.double()
    value = _activation(act, total[:, :n])
    value = value * total[:, n:] if gated else value
    _check(y, value if o is None else value + o.double(), TOLERANCE[dtype])
    assert y.dtype == dtype
    assert y.is_contiguous()


def _strided_product() -> None:
    """Rows of x and w cut from wider tensors."""
    x, w = torch.randn(3, 700)[:, :600], torch.randn(30, 640)[:, :600]
    _check(gemv(x, w, **BLOCKS), x.double() @ w.double().T, 1e-6)


def _every_variant(m: int, n: int, weight_bytes: int) -> None:
    x, w = torch.randn(m, 2100).half(), torch.randn(n, 2100).half()
    for variant in products.variants(m, n, 2100, weight_bytes):
        _check(gemv(x, w, **variant), x.double() @ w.double().T, TOLERANCE[torch.float16])


def _every_depthwise_variant(width: int) -> None:
    x, w = torch.randn(1, 70, 3, width).contiguous(memory_format=torch.channels_last), torch.randn(70, 1, 3, 3)
    for stride in (1, 2):
        for variant in depthwise.variants((width - 1) // stride + 1, stride):
            y = depthwise_conv(x, w, None, stride, 1, **variant)
            _check(y, torch.nn.functional.conv2d(x.double(), w.double(), None, stride, 1, groups=70), 1e-6)


def _relu_keeps_nan(splits: int) -> None:
    x, w = torch.ones(1, 64), torch.ones(9, 64)
    w[2, 5], w[3], w[4] = float("nan"), -1.0, float("inf")
    y = gemv(x, w, act="relu", splits=splits, block_n=8, block_k=32)
    torch.testing.assert_close(y, torch.relu(x @ w.T), equal_nan=True)
    assert y[0, 2].isnan()
    assert y[0, 3] == 0


def _quantized_rows(dtype: torch.dtype) -> None:
    """Within half a step of int8, within e4m3's three bits of mantissa; zeros stay zeros."""
    w = torch.randn(50, 300)
    w[7] = 0
    q, scale = quantize_rows(w, dtype)
    assert q.dtype == dtype
    assert not q[7].any()
    error = (q.float() * scale[:, None] - w).abs()
    limit = 0.501 * scale[:, None] if dtype == torch.int8 else w.abs() / 16 * 1.001 + 0.001 * scale[:, None]
    assert (error <= limit).all()


def _depthwise(dtype: torch.dtype, channels: int, height: int, width: int, kernel: int, stride: int, padding: int, bias: bool) -> None:
    x = torch.randn(2, channels, height, width).to(dtype, memory_format=torch.channels_last)
    w, b = torch.randn(channels, 1, kernel, kernel).to(dtype), torch.randn(channels).to(dtype) if bias else None
    y = depthwise_conv(x, w, b, stride, padding, block_h=8, block_w=4, block_c=16)
    double = None if b is None else b.double()
    _check(y, torch.nn.functional.conv2d(x.double(), w.double(), double, stride, padding, groups=channels), TOLERANCE[dtype])
    assert y.is_contiguous(memory_format=torch.channels_last)


def _channel_slice() -> None:
    """Half of the channels of a wider image: pixels are further apart than there are channels."""
    x = torch.randn(2, 40, 6, 5).contiguous(memory_format=torch.channels_last)[:, 8:28]
    w = torch.randn(20, 1, 3, 3)
    y = depthwise_conv(x, w, None, 1, 1, block_h=4, block_w=2, block_c=32)
    _check(y, torch.nn.functional.conv2d(x.double(), w.double(), None, 1, 1, groups=20), 1e-6)


for dtype in TOLERANCE:
    _case(_product, dtype, 1, 37, 1000)
    _case(_product, dtype, 3, 20, 4100, bias=True, other=True)
    _case(_product, dtype, 8, 24, 1024, act="silu", gated=True)
    for size in ((9, 11, 7, 1, 3), (10, 13, 3, 2, 1), (12, 9, 5, 1, 0), (7, 7, 7, 2, 3)):
        _case(_depthwise, dtype, 24, *size, bias=size[2] == 7)
for act in ("relu", "silu", "gelu", "gelu_tanh"):
    for splits in (1, 3):
        _case(_product, torch.float32, 2, 19, 1000, act=act, gated=True, bias=True, other=True, splits=splits)
for quantized in (torch.int8, torch.float8_e4m3fn):
    _case(_quantized_rows, quantized)
    _case(_product, torch.bfloat16, 1, 37, 1000, quantized=quantized)
    _case(_product, torch.float16, 3, 20, 1024, act="gelu", gated=True, bias=True, other=True, quantized=quantized, splits=2)
    _case(_product, torch.float16, 3, 20, 1000, quantized=quantized, dot=True)
# Not bf16: the interpreter's dot multiplies its bits as integers.
_case(_product, torch.float16, 1, 37, 1000, dot=True)
_case(_product, torch.float16, 8, 40, 1024, act="silu", gated=True, bias=True, other=True, dot=True)
_case(_product, torch.float16, 3, 20, 4100, gated=True, act="gelu_tanh", splits=3, dot=True)
for m, n, weight_bytes in ((1, 30, 2), (3, 20, 1)):
    _case(_every_variant, m, n, weight_bytes)
for width in (7, 16):
    _case(_every_depthwise_variant, width)
_case(_strided_product)
_case(_relu_keeps_nan, 1)
_case(_relu_keeps_nan, 2)
_case(_depthwise, torch.float32, 33, 9, 7, 7, 1, 3, True)
_case(_channel_slice)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """An empty string, or the traceback, per case."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernel(outcomes: dict[str, str], name: str) -> None:
    assert not outcomes[name], outcomes[name]


def test_importing_the_package_leaves_triton_alone() -> None:
    code = "import lz_compiler, sys; raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _run(case: Callable[[], None]) -> str:
    torch.manual_seed(0)
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


if INTERPRETED:
    torch.set_num_threads(1)
    json.dump({name: _run(case) for name, case in CASES.items()}, sys.stdout)
