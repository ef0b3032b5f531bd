"""Own attention kernels beside torch's, on one GPU, with several settings of each.

    python benchmarks/attention_kernels.py [decode] [forward]

Microseconds per call inside a CUDA graph of many calls whose inputs rotate through several times the L2 cache. GB/s counts the
visible keys and values once; TFLOP/s counts the visible pairs only, for every kernel. The error is relative, in the norm, on
the first KV head, against float64. `parameters` marks the settings that the kernel's own rule gives. torch's kernels get the most
favourable form: for decoding the cache already cut to what is visible, and `is_causal` instead of a mask wherever it can say it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from product_kernels import Inputs, copies, label, microseconds
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from lz_compiler.kernels import attention as flash
from lz_compiler.kernels import decode_attention as decode

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
DECODE_KEYS = ("splits", "block_n", "warps", "stages")
FORWARD_KEYS = ("block_m", "block_n", "warps", "stages")
# batch, query heads, KV heads, cache, head, position
DECODE = [
    (32, 32, 8, 4096, 128, 4095),
    (1, 32, 8, 4096, 128, 4095),
    (8, 32, 8, 4096, 128, 4095),
    (32, 32, 8, 4096, 128, 500),
    (1, 32, 8, 4096, 128, 500),
    (1, 32, 8, 32768, 128, 32767),
    (4, 16, 16, 2048, 64, 2047),
    (2, 8, 4, 8192, 256, 8191),
]


@dataclass(frozen=True)
class Shape:
    """A forward pass. `padded`: every batch entry hides its last quarter of keys."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    length: int
    head: int
    causal: bool = False
    window: int = 0
    padded: bool = False

    def visible(self) -> Tensor:
        """(Q, K) bool; the last query sees the last key."""
        i = torch.arange(self.queries, device="cuda")[:, None] + self.length - self.queries
        j = torch.arange(self.length, device="cuda")
        seen = (j <= i) if self.causal else torch.ones(self.queries, self.length, dtype=torch.bool, device="cuda")
        seen = seen & (j > i - self.window) if self.window else seen
        return seen & (j < self.length * 3 // 4) if self.padded else seen


FORWARD = [
    Shape(1, 32, 8, 4096, 4096, 128, causal=True),
    Shape(4, 32, 8, 2048, 2048, 128, causal=True),
    Shape(1, 32, 8, 512, 512, 128, causal=True),
    Shape(1, 32, 8, 4096, 4096, 128, causal=True, window=1024),
    Shape(1, 32, 8, 512, 4096, 128, causal=True),
    Shape(32, 16, 16, 512, 512, 64),
    Shape(32, 16, 16, 512, 512, 64, padded=True),
    Shape(32, 16, 16, 197, 197, 64),
    Shape(8, 16, 16, 1024, 1024, 80),
    Shape(2, 16, 8, 2048, 2048, 256, causal=True),
]


def variants(keys: Sequence[str], first: dict[str, int], others: Iterable[Sequence[int]]) -> list[dict[str, int]]:
    """`first` and then the others, each once."""
    every = [first, *(dict(zip(keys, values, strict=True)) for values in others)]
    return [v for i, v in enumerate(every) if v not in every[:i]]


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The query heads of the first KV head of the first batch entry, in float64."""
    q, k, v = q[:1, : q.shape[1] // k.shape[1]].double(), k[:1, :1].double(), v[:1, :1].double()
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def torch_calls(mask: Tensor | None, causal: bool, length: int) -> dict[str, Callable[..., Tensor]]:
    def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k[:, :, :length], v[:, :, :length], mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        return call

    return {f"torch {backend.name.lower()}": with_backend(backend) for backend in BACKENDS}


def report(calls: dict[str, Callable[..., Tensor]], inputs: Sequence[Inputs], visible: Tensor, rate: Callable[[float], str]) -> None:
    q, k, v = inputs[0]
    assert q is not None and k is not None and v is not None  # noqa: PT018
    exact = reference(q, k, v, visible)
    for name, call in calls.items():
        try:
            out = call(q, k, v)
        except (RuntimeError, OutOfResources) as refused:  # torch says "No available kernel", Triton how much it lacks
            print(f"  {name:52} {str(refused).splitlines()[0]}")
            continue
        error = ((out[:1, : exact.shape[1]].double() - exact).norm() / exact.norm()).item()
        us = microseconds(call, inputs)
        print(f"  {name:52} {us:9.2f} us {rate(us)} error {error:.1e}", flush=True)


def tensors(batch: int, heads: int, kv_heads: int, queries: int, length: int, head: int, layout: str) -> list[Inputs]:
    """q in (B, S, H, D) as projections write it; k and v too, or in (B, H, S, D), as caches are."""
    make = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    cache = (batch, length, kv_heads, head) if layout == "BSHD" else (batch, kv_heads, length, head)
    turn = (lambda x: x.transpose(1, 2)) if layout == "BSHD" else (lambda x: x)
    count = copies(2 * 2 * batch * kv_heads * length * head)
    return [(make(batch, queries, heads, head).transpose(1, 2), turn(make(*cache)), turn(make(*cache))) for _ in range(count)]


def decoding(batch: int, heads: int, kv_heads: int, length: int, head: int, position: int) -> None:
    inputs = tensors(batch, heads, kv_heads, 1, length, head, "BHSD")
    at = torch.tensor([position], device="cuda")
    units = torch.cuda.get_device_properties().multi_processor_count
    first = decode.parameters(batch, kv_heads, heads // kv_heads, length, head, 2, units)
    s, n, w, stages = (first[key] for key in DECODE_KEYS)
    others = [(max(1, s // 2), n, w, stages), (2 * s, n, w, stages), (4 * s, n, w, stages)]
    others += [(s, n, w, 2), (2 * s, n, w, 2), (s, n, w, 4), (s, 128, w, 2), (s, 128, 8, 2)]
    calls: dict[str, Callable[..., Tensor]] = {}
    for variant in variants(DECODE_KEYS, first, others):
        name = label(variant) + (" (parameters)" if variant == first else "")
        calls[name] = lambda q, k, v, x=variant: decode.decode_attention(q, k, v, at, None, 0, 0, head**-0.5, **x)
    calls |= torch_calls(None, False, position + 1)
    moved = 2 * 2 * batch * kv_heads * (position + 1) * head
    print(f"\ndecode B={batch} H={heads} G={kv_heads} K={length} D={head} position={position}")
    report(calls, inputs, torch.arange(length, device="cuda") <= position, lambda us: f"{moved / us / 1e3:6.0f} GB/s")


def forward(shape: Shape) -> None:
    inputs = tensors(shape.batch, shape.heads, shape.kv_heads, shape.queries, shape.length, shape.head, "BSHD")
    visible = shape.visible()
    keys = torch.arange(shape.length, device="cuda").expand(shape.batch, -1) < shape.length * 3 // 4 if shape.padded else None
    first = flash.parameters(shape.queries, shape.head, 2)
    others = [(128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)]
    others += [(128, 64, 4, 2), (128, 64, 4, 3)] if shape.head <= 64 else [(128, 64, 8, 2), (128, 64, 8, 3)]
    calls: dict[str, Callable[..., Tensor]] = {}
    for variant in variants(FORWARD_KEYS, first, others):
        name = label(variant) + (" (parameters)" if variant == first else "")
        arguments: tuple[Any, ...] = (None, keys, shape.length - shape.queries, shape.causal, shape.window, False, shape.head**-0.5)
        calls[name] = lambda q, k, v, a=arguments, x=variant: flash.attention(q, k, v, *a, **x)
    plain = not shape.window and not shape.padded and (shape.queries == shape.length or not shape.causal)
    calls |= torch_calls(None if plain else visible[None, None], plain and shape.causal, shape.length)
    work = 4 * shape.batch * shape.heads * shape.head * int(visible.sum())
    print(f"\nforward {shape}")
    report(calls, inputs, visible, lambda us: f"{work / us / 1e6:6.0f} TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["decode", "forward"])
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    if "decode" in options.parts:
        for shape in DECODE:
            decoding(*shape)
    if "forward" in options.parts:
        for each in FORWARD:
            forward(each)


if __name__ == "__main__":
    main()
