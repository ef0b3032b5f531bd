"""Own product and depthwise kernels beside cuBLAS, cuDNN and a copy of the same bytes, on one GPU.

    python benchmarks/product_kernels.py [gemv] [quantized] [depthwise] [--rows 1 2 4 8]

Microseconds per call inside a CUDA graph of many calls whose weights (or images) rotate through several times the L2 cache;
GB/s of what must be moved at least; `copy` moves as many bytes, half of them written; the error is relative, in the norm,
against float64.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lz_compiler.backends.base import quantize_rows
from lz_compiler.kernels import depthwise_conv as depthwise
from lz_compiler.kernels import gemv

PRODUCTS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096), (1024, 4096)]
DEPTHWISE = [(64, 128, 56), (64, 256, 28), (64, 512, 14), (64, 1024, 7)]
ROTATED_BYTES = 400 << 20  # several times any L2
CALLS = 40
REPLAYS = 9

Inputs = tuple[torch.Tensor | None, ...]


def microseconds(call: Callable[..., object], inputs: Sequence[Inputs]) -> float:
    """Median over the replays of a graph of calls, each on the next of `inputs`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*inputs[0])
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), max(CALLS, len(inputs))
    with torch.cuda.graph(graph):
        for arguments in itertools.islice(itertools.cycle(inputs), count):
            call(*arguments)
    taken = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(taken[2:])


def report(calls: dict[str, Callable[..., torch.Tensor]], inputs: Sequence[Inputs], moved: int, exact: torch.Tensor) -> None:
    """One line per call, and one for a copy of as many bytes, which is what 100 % means."""
    halves = [(torch.empty(moved // 2, dtype=torch.uint8, device="cuda"),) for _ in inputs]
    target = [torch.empty_like(halves[0][0]) for _ in inputs]
    pairs = [(source[0], t) for source, t in zip(halves, target, strict=True)]
    copy = microseconds(lambda source, into: into.copy_(source), pairs)
    print(f"  {'copy':58} {copy:8.2f} us {moved / copy / 1e3:6.0f} GB/s")
    for name, call in calls.items():
        error = ((call(*inputs[0]).double() - exact).norm() / exact.norm()).item()
        us = microseconds(call, inputs)
        print(f"  {name:58} {us:8.2f} us {moved / us / 1e3:6.0f} GB/s {copy / us:6.1%} of copy  error {error:.1e}", flush=True)


def copies(bytes_each: int) -> int:
    return max(2, -(-ROTATED_BYTES // bytes_each))


def label(variant: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in variant.items())


def own(act: str, gated: bool, variant: dict[str, Any]) -> Callable[..., torch.Tensor]:
    return lambda x, w, scale: gemv.gemv(x, w, None, None, scale, act, gated, **variant)


def product(m: int, n: int, k: int, quantized: torch.dtype | None = None, gated: bool = False) -> None:
    """n counts the rows of w; with `gated` half of them are gates."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    inputs: list[Inputs] = []
    for _ in range(copies(n * k * (1 if quantized else 2))):
        w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / k**0.5
        inputs.append((x, *quantize_rows(w, quantized)) if quantized else (x, w, None))
    _, w, scale = inputs[0]
    assert w is not None
    exact = x.double() @ w.double().T
    exact = exact if scale is None else exact * scale.double()
    act = "silu" if gated else ""
    exact = torch.nn.functional.silu(exact[:, : n // 2]) * exact[:, n // 2 :] if gated else exact
    moved = w.numel() * w.element_size() + 2 * (x.numel() + exact.numel())
    print(f"\ngemv M={m} N={n} K={k} {w.dtype} {'gated' if gated else ''}")
    if gated:  # without gate and activation its error would mean nothing
        us = microseconds(lambda x, w, _: torch.nn.functional.linear(x, w), inputs)
        print(f"  {'torch, the product alone':58} {us:8.2f} us")
    calls: dict[str, Callable[..., torch.Tensor]] = {}
    if quantized is None and not gated:
        calls["torch"] = lambda x, w, _: torch.nn.functional.linear(x, w)
    for variant in gemv.variants(m, n // 2 if gated else n, k, w.element_size()):
        calls[label(variant)] = own(act, gated, variant)
    report(calls, inputs, moved, exact)


def convolution(images: int, channels: int, size: int) -> None:
    weight = torch.randn(channels, 1, 7, 7, dtype=torch.bfloat16, device="cuda")
    # As freezing leaves it: channels side by side and float32, nothing left to convert at run time.
    packed = weight.float().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    bias = torch.randn(channels, dtype=torch.bfloat16, device="cuda")
    shape = (images, channels, size, size)
    inputs: list[Inputs] = []
    for _ in range(copies(2 * images * channels * size * size)):
        inputs.append((torch.randn(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last), bias))
    x = inputs[0][0]
    assert x is not None
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=3, groups=channels)
    print(f"\ndepthwise 7x7 {shape}")
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "torch": lambda x, bias: torch.nn.functional.conv2d(x, weight, bias, padding=3, groups=channels),
    }
    for variant in depthwise.variants(size, 1):
        calls[label(variant)] = lambda x, bias, v=variant: depthwise.depthwise_conv(x, packed, bias, 1, 3, **v)
    report(calls, inputs, 4 * x.numel(), exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["gemv", "quantized", "depthwise"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    if "gemv" in options.parts:
        for m, (n, k) in itertools.product(options.rows, PRODUCTS):
            product(m, n, k)
        product(1, 28672, 4096, gated=True)
    if "quantized" in options.parts:
        for dtype, (n, k) in itertools.product((torch.int8, torch.float8_e4m3fn), PRODUCTS[:4]):
            product(1, n, k, quantized=dtype)
    if "depthwise" in options.parts:
        for shape in DEPTHWISE:
            convolution(*shape)


if __name__ == "__main__":
    main()
