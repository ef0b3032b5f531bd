"""Regions at the edge of what kernels take: what is absorbed, merged or offered must still be what the graph computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_kernels import BF16, F32, Case, rand, trace
from torch import Tensor, nn
from torch.nn import functional as F

from lz_compiler import backends, measure, ops, semantics
from lz_compiler.backends import attention
from lz_compiler.backends.base import SelectionContext
from lz_compiler.types import Candidate


class ConvolutionAsColumns(nn.Module):
    """What follows the convolution is applied after a reshape that an image has not."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 16, 3, padding=1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x).flatten(2)).transpose(1, 2)


class TwoWidths(nn.Module):
    """One tensor read as rows of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.narrow(x), self.wide(x.reshape(-1, 16))


class PartOfACache(nn.Module):
    """A cache of which a part of symbolic length is written."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(2, 64, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[:, : x.shape[1]] = self.proj(x)
        return self.cache + 1


class Narrow(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(64, 64, dtype=dtype), nn.Conv2d(8, 8, 3, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return F.gelu(self.linear(x)), F.silu(self.conv(y))


class OtherShapes(nn.Module):
    """Products read with a dimension of one more or less, or with their heads apart, by what they absorb."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 24) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        gate, added = F.silu(self.a(x[:, 0]).unsqueeze(1)), self.b(x)[..., None] + y.flatten(2)[..., None]
        return gate, added, self.c(x).unflatten(-1, (2, 12)) * y, F.gelu(self.d(x).squeeze(1)[:, None])


IMAGE = (rand(2, 8, 8, 8),)
ABSORBING = {"policy": {"prefer": [{"kernel": "onednn.*", "factor": 0.001}]}}
MODELS: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = {
    "activation of columns": (ConvolutionAsColumns(F.silu), IMAGE, {}),
    "activation of columns, frozen": (ConvolutionAsColumns(torch.tanh), IMAGE, {"freeze": True}),
    "one tensor, two widths": (TwoWidths(), (rand(4, 8),), {"freeze": True}),
    "other shapes": (OtherShapes(), (rand(3, 1, 8), rand(3, 1, 2, 12)), ABSORBING),
    "part of a cache": (PartOfACache(), (rand(2, 5, 8),), {}),
    "float16": (Narrow(torch.float16), (rand(4, 64).half(), rand(2, 8, 8, 8).half()), {}),
    "float16, frozen": (Narrow(torch.float16), (rand(4, 64).half(), rand(2, 8, 8, 8).half()), {"freeze": True}),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, dynamic: bool) -> None:
    model, args, options = MODELS[name]
    torch._dynamo.reset()
    run = torch.compile(model, backend="layerzero", dynamic=dynamic, options={"race": False, "cost_model": "roofline", **options})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "LayerZero")  # a plan that could not be compiled
        found, expected = run(*args), model(*args)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_columns_are_not_added_to_an_image() -> None:
    args = (*IMAGE, rand(16, 8, 3, 3), rand(2, 16, 36))
    contexts = trace(Case("", lambda x, w, other: F.conv2d(x, w).flatten(2) + other, args)).contexts
    assert [ctx.outputs[0].shape for ctx in contexts] == [(2, 16, 6, 6)]


def offered(library: str, ctx: SelectionContext) -> set[str]:
    backend = backends.all_backends()[library]
    found = backend.candidates(ctx if ctx.specs[0].device in backend.devices else on_cuda(ctx))
    return {answer.kernel for answer in found if isinstance(answer, Candidate)}


def on_cuda(ctx: SelectionContext, **params: Any) -> SelectionContext:
    specs = tuple(replace(spec, device="cuda") for spec in ctx.specs)
    return replace(ctx, specs=specs, params={**ctx.params, **params})


def attention_contexts(q: Tensor, k: Tensor, mask: Callable[..., Tensor] | None = None, *rest: Tensor, causal: bool = False) -> Any:
    def fn(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return ops.sdpa(q, k, v, mask(*rest) if mask else None, causal, None, False)

    return trace(Case("", fn, (q, k, k, *rest))).contexts


GPU_KERNELS = {"cudnn.attention", "aten.flash_attention", "aten.efficient_attention"}


def test_is_causal_with_fewer_queries_than_keys_is_no_gpu_kernels() -> None:
    """Flash attention on a GPU aligns the last query with the last key, torch's `is_causal` the first with the first."""
    q, k = rand(2, 4, 8, 64, dtype=BF16), rand(2, 4, 16, 64, dtype=BF16)
    (ctx,) = attention_contexts(q, k, causal=True)
    assert not offered("attention", on_cuda(ctx)) & GPU_KERNELS
    (square,) = attention_contexts(q, q, causal=True)
    assert offered("attention", on_cuda(square)) >= GPU_KERNELS


def test_symbolic_sizes_are_not_written_into_a_kernels_arguments() -> None:
    q = rand(2, 4, 8, 64, dtype=BF16)
    (ctx, *_) = attention_contexts(q, q, lambda m: m, rand(2, 1, 8, 8, dtype=BF16))
    assert "aten.efficient_attention" in offered("attention", on_cuda(ctx))
    assert "aten.efficient_attention" not in offered("attention", on_cuda(ctx, dynamic_rows=True))


def test_own_attention_takes_one_batch() -> None:
    one, two = rand(1, 4, 32, 64), rand(2, 4, 32, 64)
    assert "triton.attention" in offered("triton", attention_contexts(two, two)[0])
    assert "triton.attention" not in offered("triton", attention_contexts(two, one)[0])


def padded(length: int, value: float) -> Callable[[Tensor], Tensor]:
    """A causal mask over padded keys."""
    causal = lambda: torch.ones(length, length, dtype=torch.bool).tril()  # noqa: E731
    return lambda keep: torch.where(causal() & keep[:, None, None, :], 0.0, value)


def test_empty_rows_are_means_where_the_mask_is_a_number() -> None:
    """A row that sees no key is the mean of all values under a mask of finfo.min; the kernel gives zeros if it is causal."""
    q, keep = rand(2, 4, 32, 64), rand(2, 32) > 0
    lowest = torch.finfo(F32).min
    for value, kernels in ((float("-inf"), {"triton.attention"}), (lowest, set())):
        (_, understood) = attention_contexts(q, q, padded(32, value), keep)
        assert understood.params["causal"]
        assert offered("triton", understood) == kernels
    (_, understood) = attention_contexts(q, q, lambda m: torch.where(m[:, None, None, :], 0.0, lowest), keep)
    assert offered("triton", understood) == {"triton.attention"}


@pytest.mark.parametrize("later", [False, True])
def test_one_query_that_sees_keys_from_a_position_on(later: bool) -> None:
    """What is written out for GPU kernels is the predicate, also where it has a first key but no last."""
    q, k, start = rand(3, 2, 1, 64), rand(3, 2, 33, 64), torch.tensor([0, 7, 20])
    every = lambda: torch.arange(33)[None, None, None, :]  # noqa: E731
    at = lambda s: s[:, None, None, None]  # noqa: E731
    (_, ctx) = attention_contexts(q, k, lambda s: every() >= at(s) if later else every() <= at(s), start)
    role = {"q": q, "k": k, "v": k, "position": start}
    added = attention._added(measure.EagerEmitter(), role, {**ctx.params, "dtype": "float32"})
    seen = semantics.visible(role, ctx.params)
    assert seen is not None
    assert torch.equal(added.expand(seen.shape) == 0, seen)
    assert torch.equal(seen[:, 0, 0], (torch.arange(33) >= start[:, None]) if later else (torch.arange(33) <= start[:, None]))


def test_part_of_a_batch_of_masks_is_kept() -> None:
    """A reading names the whole tensor: kernels would read the masks of more batches than there are."""
    q, keep = rand(2, 4, 32, 64), rand(5, 32) > 0
    contexts = attention_contexts(q, q, lambda m: m[:2, None, None, :], keep)
    for ctx in contexts:
        role = dict(zip(ctx.roles, (q, q, q, *([keep[:2, None, None, :]] if "mask" in ctx.roles else [keep[:2]])), strict=True))
        seen = semantics.visible(role, ctx.params)
        assert seen is None or seen.shape[0] == 2
        assert all(spec.shape[0] == 2 for spec in ctx.specs)


def test_depthwise_kernel_needs_channels_side_by_side() -> None:
    """One channel has no such layout: any strides count as channels last."""
    for channels, kernels in ((8, {"triton.depthwise_conv"}), (1, set())):
        case = Case("", lambda x, w: F.conv2d(x, w, groups=w.shape[0]), (rand(2, channels, 9, 9), rand(channels, 1, 3, 3)))
        assert offered("triton", trace(case).contexts[0]) == kernels


def strided_linears() -> Iterator[tuple[Tensor, ...]]:
    x, w, b = rand(4, 32), rand(16, 32), rand(16)
    yield x, rand(32, 16).t(), b
    yield x, w, rand(16, 2)[:, 0]


def test_skinny_products_read_rows() -> None:
    args = rand(4, 32), rand(16, 32), rand(16)
    contexts = lambda args: trace(Case("", F.linear, args)).contexts  # noqa: E731
    assert offered("triton", contexts(args)[0]) == {"triton.gemv"}
    for strided in strided_linears():
        assert offered("triton", contexts(strided)[0]) == set()


def test_epilogues_of_cublas() -> None:
    def images(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> set[str]:
        fn = lambda x, w, scale: act(F.conv2d(x, w) * scale)  # noqa: E731
        found = trace(Case("", fn, (rand(2, 8, 4, 4, dtype=dtype), rand(8, 8, 1, 1, dtype=dtype), rand(8, 1, 1, dtype=dtype)))).contexts
        return offered("cublas", next(ctx for ctx in found if ctx.params["act"]))

    assert images(F.relu, F32) == set()  # its epilogue starts with a bias, and a scale alone is none
    args = rand(4, 32), rand(16, 32), rand(16)
    for dtype, kernels in ((F32, set()), (BF16, {"cublas.addmm_activation"})):
        found = trace(Case("", lambda x, w, b: F.gelu(F.linear(x, w, b)), tuple(a.to(dtype) for a in args))).contexts
        assert offered("cublas", next(ctx for ctx in found if ctx.params["act"])) == kernels


def test_gated_units_do_not_broadcast() -> None:
    def gated(fn: Callable[..., Tensor]) -> int:
        args = (rand(4, 32), rand(16, 32), rand(16, 32))
        return sum(ctx.region.op == "gated_linear" for ctx in trace(Case("", fn, args, 1)).contexts)

    assert gated(lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b)) == 1
    assert gated(lambda x, a, b: F.silu(F.linear(x, a))[:, None] * F.linear(x, b)[:, None]) == 1
    assert gated(lambda x, a, b: F.silu(F.linear(x, a))[:, None] * F.linear(x, b)[None]) == 0
    assert gated(lambda x, a, b: F.silu(F.linear(x[:1], a))[None] * F.linear(x[:1], b)) == 0


STEPS: dict[str, tuple[int, Callable[..., Tensor], list[set[str]]]] = {
    "frozen": (8, lambda y, shift, c: y * c, [set(), {"onednn.conv_packed"}]),
    "computed": (8, lambda y, shift, c: y + shift, [{"onednn.conv_packed"}, {"onednn.conv"}]),
    "both": (8, lambda y, shift, c: y * c - c + shift, [set(), {"onednn.conv_packed"}, {"onednn.conv"}]),
    "squared": (3, lambda y, shift, c: y * y, [{"onednn.conv_packed"}]),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_frozen_weight_is_packed_with_the_steps_that_are_frozen_too(name: str) -> None:
    """What a call computes for each channel of one image (a time step's shift, say) must not keep the weight from being packed."""
    size, step, kernels = STEPS[name]
    fn = lambda x, shift, w, c: step(F.conv2d(x, w), shift, c)  # noqa: E731
    args = rand(1, 8, size, size), rand(1, 16, 1, 1), rand(16, 8, 3, 3), rand(16, 1, 1)
    assert [offered("onednn", ctx) for ctx in trace(Case("", fn, args, 2)).contexts] == kernels
