"""The sweep that every kernel gets for free: each candidate that a backend offers for a real region must compute what the
graph computes, on odd shapes, in every epilogue, with NaN where eager has NaN. And the same kernels placed in a graph.

A new kernel is covered as soon as its backend offers it for one of the cases; `test_every_kernel_is_swept` fails until then.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from paged_pool import Pool
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lz_compiler import backend, backends, measure, ops, patterns, semantics, torch_private
from lz_compiler.backends.base import SelectionContext
from lz_compiler.backends.library import LibraryBackend
from lz_compiler.capture import GraphView
from lz_compiler.cost_models.roofline import Roofline
from lz_compiler.options import Options
from lz_compiler.types import Candidate, Cost, Rejection

F32, BF16 = torch.float32, torch.bfloat16
ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, **semantics.ACTIVATIONS, "gelu_new": patterns.gelu_new}
# Of one float32 or bfloat16 result, relative to the largest element: the check against float64 is the strict one.
CLOSE = {F32: 1e-5, BF16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A function with example inputs; inputs from `frozen` on are weights that never change."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Tensor, ...]
    frozen: int | None = None
    options: Options = field(default_factory=lambda: Options(freeze=True))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Traced:
    contexts: tuple[SelectionContext, ...]
    values: dict[str, Any]  # what each node of the graph computes on the example inputs


class _Recording(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def trace(case: Case) -> Traced:
    with torch.no_grad():
        table = torch_private.decompositions()  # as Inductor would
        gm = make_fx(lambda *args: case.fn(*args), decomposition_table=table, tracing_mode="fake")(*case.args)
        recording = _Recording(gm)
        recording.run(*case.args)
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    frozen = {} if case.frozen is None else dict(list(zip(places, case.args, strict=True))[case.frozen :])
    found = patterns.Recogniser(GraphView(gm.graph, frozen), case.options).regions()
    return Traced(tuple(found), recording.values)


def rand(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


# --- the cases --------------------------------------------------------------------------------------------------------------


def _linear(act: str | None, binary: str | None, transposed: bool) -> Callable[..., Tensor]:
    def fn(x: Tensor, *rest: Tensor) -> Tensor:
        other, rest = (rest[0], rest[1:]) if binary else (None, rest)
        weight, bias = rest[0].t() if transposed else rest[0], rest[1] if len(rest) > 1 else None
        y = F.linear(x, weight, bias)
        if other is not None:
            y = y + other if binary == "add" else y * other
        return ACTS[act](y)

    return fn


def linear_case(
    rows: tuple[int, ...], k: int, n: int, dtype: torch.dtype = F32, *, bias: bool = True, act: str | None = None,
    binary: str | None = None, transposed: bool = False, frozen: bool = True, **options: Any,
) -> Case:  # fmt: skip
    w = rand(n, k, dtype=dtype, scale=k**-0.5)
    others = (rand(*rows, n, dtype=dtype),) if binary else ()
    args = (rand(*rows, k, dtype=dtype), *others, w.t().contiguous() if transposed else w)
    args += (rand(n, dtype=dtype),) if bias else ()
    facts = [str(dtype)[6:], *(["bias"] if bias else []), act, binary, *(["transposed"] if transposed else [])]
    name = f"linear {rows}x{k}x{n} " + " ".join(filter(None, facts)) + (" frozen" if frozen else "")
    options_ = Options(freeze=True, **options)
    return Case(name + "".join(f" {k}={v}" for k, v in options.items()), _linear(act, binary, transposed), args,
                1 + len(others) if frozen else None, options_)  # fmt: skip


def linear_cases() -> Iterator[Case]:
    for dtype in (F32, BF16):
        for frozen in (True, False):
            for rows, k, n in ((1, 33, 7), (1, 128, 128), (7, 1, 33), (33, 7, 1), (33, 128, 33), (128, 33, 128)):
                for bias in (True, False):
                    yield linear_case((rows,), k, n, dtype, bias=bias, frozen=frozen)
            yield linear_case((7,), 33, 128, dtype, transposed=True, frozen=frozen)
            yield linear_case((1,), 33, 128, dtype, transposed=True, bias=False, frozen=frozen)
            for act in ACTS:
                yield linear_case((7,), 33, 128, dtype, act=act, bias=act != "silu", frozen=frozen)
            yield linear_case((2, 7), 33, 128, dtype, act="gelu", frozen=frozen)
            for binary in ("add", "mul"):
                yield linear_case((33,), 33, 7, dtype, binary=binary, frozen=frozen)
                yield linear_case((2, 7), 33, 128, dtype, binary=binary, bias=False, frozen=frozen)
    yield linear_case((7,), 33, 128, error_budget=0.05)
    yield linear_case((2, 7), 33, 128, binary="add", error_budget=0.05)
    yield Case("bmm", torch.bmm, (rand(3, 7, 33), rand(3, 33, 1)))
    yield Case("bmm bfloat16", lambda a, b: a @ b.mT, (rand(3, 7, 33, dtype=BF16), rand(3, 5, 33, dtype=BF16)))
    for dtype in (F32, BF16):
        for bias in (True, False):
            yield merged_case(dtype, bias)


def merged_case(dtype: torch.dtype, bias: bool) -> Case:
    def fn(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, biases = (rest[:3], rest[3:]) if bias else (rest, (None,) * 3)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    widths = (33, 7, 128)
    args = (rand(2, 7, 33, dtype=dtype), *(rand(n, 33, dtype=dtype, scale=0.2) for n in widths))
    args += tuple(rand(n, dtype=dtype) for n in widths) if bias else ()
    return Case(f"merged {str(dtype)[6:]}{' bias' if bias else ''}", fn, args, 1)


def conv_case(
    channels: tuple[int, int], kernel: tuple[int, int], dtype: torch.dtype = F32, *, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, bias: bool = True, act: str | None = None, norm: bool = False, residual: bool = False,
    frozen: bool = True, last: bool = False, size: tuple[int, int, int] = (2, 9, 7), norm_dtype: torch.dtype | None = None, **options: Any,
) -> Case:  # fmt: skip
    cin, cout = channels
    x = rand(size[0], cin, *size[1:], dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    w = rand(cout, cin // groups, *kernel, dtype=dtype, scale=(cin // groups * math.prod(kernel)) ** -0.5)
    steps = (rand(cout), rand(cout).abs() + 0.5, rand(cout) + 1, rand(cout)) if norm else ()
    steps = tuple(s.to(norm_dtype or dtype) for s in steps)
    geometry = (stride, padding, dilation, groups)
    with torch.no_grad():
        out = F.conv2d(x, w, None, *geometry).shape
    others = (rand(*out, dtype=dtype),) if residual else ()
    args = (x, *others, w, *((rand(cout, dtype=dtype),) if bias else ()), *steps)

    def fn(x: Tensor, *rest: Tensor) -> Tensor:
        rest = list(rest)  # type: ignore[assignment]
        other = rest.pop(0) if residual else None  # type: ignore[attr-defined]
        y = F.conv2d(x, rest.pop(0), rest.pop(0) if bias else None, *geometry)  # type: ignore[attr-defined]
        if norm:
            mean, var, weight, shift = rest
            y = F.batch_norm(y, mean, var, weight, shift)
        return ACTS[act](y if other is None else y + other)

    flags = {"norm_dtype": norm_dtype, "bias": bias, "norm": norm, "residual": residual, "frozen": frozen, "channels_last": last, **options}
    facts = " ".join(k if v is True else f"{k}={v}" for k, v in flags.items() if v)
    name = f"conv {channels}x{kernel} {size} s{stride} p{padding} d{dilation} g{groups} {str(dtype)[6:]} {act or ''} {facts}"
    return Case(name, fn, args, 1 + len(others) if frozen else None, Options(freeze=True, **options))


GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"channels": (5, 7), "kernel": (1, 1)},
    {"channels": (8, 33), "kernel": (1, 1), "stride": 2},
    {"channels": (8, 33), "kernel": (1, 1), "stride": (1, 2), "size": (1, 9, 7)},
    {"channels": (8, 8), "kernel": (1, 1), "groups": 4},
    {"channels": (8, 8), "kernel": (1, 1), "padding": 1},
    {"channels": (3, 7), "kernel": (3, 3), "padding": 1},
    {"channels": (1, 1), "kernel": (3, 3), "padding": 1},
    {"channels": (7, 8), "kernel": (3, 3), "stride": 2, "padding": 1, "size": (1, 9, 7)},
    {"channels": (8, 8), "kernel": (3, 3), "padding": 2, "dilation": 2},
    {"channels": (8, 16), "kernel": (3, 3), "padding": 1, "groups": 2},
    {"channels": (8, 8), "kernel": (3, 3), "padding": 1, "groups": 8},
    {"channels": (8, 16), "kernel": (3, 3), "stride": 2, "groups": 8},
    {"channels": (4, 6), "kernel": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    {"channels": (6, 5), "kernel": (2, 2), "stride": 2},
    {"channels": (16, 8), "kernel": (1, 1), "size": (2, 1, 1)},
)


def conv_cases() -> Iterator[Case]:
    for dtype in (F32, BF16):
        for frozen in (True, False):
            for i, geometry in enumerate(GEOMETRIES):
                yield conv_case(**geometry, dtype=dtype, frozen=frozen, bias=bool(i % 2), last=bool(i % 3))
            for kernel, padding in (((1, 1), 0), ((3, 3), 1)):
                shape = {"channels": (8, 12), "kernel": kernel, "padding": padding, "dtype": dtype, "frozen": frozen}
                for act in ACTS:
                    yield conv_case(**shape, act=act, bias=act != "silu")
                yield conv_case(**shape, residual=True)
                yield conv_case(**shape, residual=True, act="relu")
                yield conv_case(**shape, norm=True)
                yield conv_case(**shape, norm=True, bias=False, act="silu")
                yield conv_case(**shape, norm=True, bias=False, residual=True, act="relu", last=True)
        yield conv_case((8, 12), (1, 1), BF16, norm=True, norm_dtype=F32, frozen=frozen)
    yield conv_case((8, 12), (3, 3), error_budget=0.05)
    yield conv_case((8, 12), (1, 1), norm=True, act="silu", error_budget=0.05)
    yield conv_case((8, 12), (3, 3), layout_mode="strict")


def attention_case(
    shape: tuple[int, int, int, int, int], mask: str | None = None, dtype: torch.dtype = F32, *, groups: int | None = None,
    scale: float | None = None, heads_inside: bool = False, **options: Any,
) -> Case:  # fmt: skip
    batch, heads, length, keys, size = shape
    causal, gqa = mask == "causal", groups is not None
    k_heads = groups or heads

    def operand(h: int, n: int, seed: int) -> Tensor:
        if heads_inside:  # as a projection leaves it: (batch, length, heads, size)
            return (rand(batch, n, h, size + seed, dtype=dtype)[..., :size].contiguous()).transpose(1, 2)
        return rand(batch, h, n, size + seed, dtype=dtype)[..., :size].contiguous()

    args = [operand(heads, length, 0), operand(k_heads, keys, 1), operand(k_heads, keys, 2)]
    if mask == "bool":
        args.append(rand(batch, 1, length, keys) > -0.5)
    elif mask == "empty row":
        keep = rand(1, 1, length, keys) > -0.5
        keep[..., 0, :] = False
        args.append(keep)
    elif mask == "additive":
        args.append(rand(length, keys, dtype=dtype).masked_fill(rand(length, keys) > 1.0, -math.inf))
    elif mask == "additive empty row":
        term = rand(1, 1, length, keys, dtype=dtype)
        term[..., 0, :] = -math.inf
        args.append(term)
    elif mask == "expanded":
        args.append((rand(batch, 1, 1, keys) > -0.5).expand(batch, heads, length, keys))

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        return ops.sdpa(q, k, v, m, causal, scale, gqa)

    facts = f"{mask or ''} {str(dtype)[6:]} {f'groups={groups}' if gqa else ''} {scale or ''} {'BLHD' if heads_inside else ''}"
    extra = "".join(f" {k}={v}" for k, v in options.items())
    return Case(f"attention {shape} {facts}{extra}", fn, tuple(args), None, Options(**options))


def repeat_kv_case(dtype: torch.dtype) -> Case:
    """Grouped heads as models write them: k and v copied in front of attention."""

    def repeat(x: Tensor, n: int) -> Tensor:
        b, h, length, d = x.shape
        return x[:, :, None].expand(b, h, n, length, d).reshape(b, h * n, length, d)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.sdpa(q, repeat(k, 3), repeat(v, 3), None, False, None, False)

    args = (rand(2, 6, 7, 64, dtype=dtype), rand(2, 2, 33, 64, dtype=dtype), rand(2, 2, 33, 64, dtype=dtype))
    return Case(f"attention repeat_kv {str(dtype)[6:]}", fn, args)


def paged_case(dtype: torch.dtype, layout: str, queries: int) -> Case:
    pool = Pool(2, 64, 5, layout, dtype)
    q = rand(len(pool.lengths), queries, 6, 64, dtype=dtype).transpose(1, 2)
    args = (q, *pool.tensors())
    return Case(f"paged {layout} {queries} {dtype}", lambda *t: torch.ops.lz.paged_attention(*t, layout=layout), args)


def attention_cases() -> Iterator[Case]:
    for dtype in (F32, BF16):
        yield from (paged_case(dtype, "NHD", 1), paged_case(dtype, "HND", 3))
    for dtype in (F32, BF16):
        for shape in ((2, 3, 7, 7, 64), (1, 2, 33, 128, 80), (2, 2, 1, 33, 64), (1, 1, 1, 1, 80)):
            for mask in (None, "causal", "bool", "empty row", "additive", "additive empty row", "expanded"):
                yield attention_case(shape, mask, dtype)
        yield attention_case((2, 6, 7, 33, 64), None, dtype, groups=2)
        yield attention_case((2, 6, 33, 33, 80), "causal", dtype, groups=2, heads_inside=True)
        yield attention_case((2, 6, 7, 33, 64), "bool", dtype, groups=1)
        yield attention_case((2, 3, 33, 7, 64), "bool", dtype, heads_inside=True, scale=0.3)
        yield repeat_kv_case(dtype)
    yield attention_case((2, 3, 33, 33, 64), "bool", error_budget=0.05)
    yield attention_case((2, 3, 33, 33, 64), "additive", error_budget=0.05)


CASES = (*linear_cases(), *conv_cases(), *attention_cases())


# --- the sweep --------------------------------------------------------------------------------------------------------------


def leaves(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


def placed_values(ctx: SelectionContext, values: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """What a region reads and what it returns, in the graph."""
    read = {role: values[name] for role, name in zip(ctx.roles, ctx.params["values"], strict=True)}
    return read, tuple(values[name] for name in ctx.region.outputs)


def assert_same(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    found = found.reshape(expected.shape)
    assert found.dtype == expected.dtype, what
    scale = float(expected.double().abs().nan_to_num(posinf=0, neginf=0).max()) or 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_candidate_computes_its_region(case: Case) -> None:
    traced = trace(case)
    assert traced.contexts
    for ctx in traced.contexts:
        read, expected = placed_values(ctx, traced.values)
        with torch_private.real_tensors():
            what = f"{ctx.region.op} {dict(ctx.params)}"
            for y, x in zip(leaves(semantics.REFERENCES[ctx.region.op](read, ctx.params)), expected, strict=True):
                assert_same(y, x, CLOSE[x.dtype], f"the reference of {what}")
            truth = measure.truth_of(ctx)
            for answer in backends.answers(ctx):
                if isinstance(answer, Rejection):
                    assert answer.code, answer
                    assert answer.detail, answer
                    continue
                error, epsilon = measure.judged(measure.Bound(answer, ctx), ctx, truth)
                assert error is None, f"{answer.kernel} for {what}: {error}"
                lossy = any(f.dtype != s.dtype for f, s in zip(answer.out_formats, ctx.outputs, strict=True))
                assert (epsilon < 0.02) if lossy else (epsilon == 0.0), f"{answer.kernel} for {what}: {epsilon}"
                run = measure.Bound(answer, ctx).on(measure.Inputs(read))
                for y, x in zip(leaves(run()), expected, strict=True):
                    tolerance = max(CLOSE[x.dtype], CLOSE[y.dtype])
                    assert_same(y.to(x.dtype), x, tolerance, f"{answer.kernel} for {what}")


def test_a_lossy_kernel_is_never_free() -> None:
    """However small its error: what is quantised on purpose counts against the budget, and the whole plan is then checked."""
    ctx = next(c for case in CASES for c in trace(case).contexts if c.region.op == "linear")
    with torch_private.real_tensors():
        truth = measure.truth_of(ctx)
        answer = next(a for a in backends.answers(ctx) if not isinstance(a, Rejection) and a.kernel == "aten.mm")
        quantized = replace(answer, params=(*answer.params, ("lossy", "int8")))
        errors = [measure.judged(measure.Bound(candidate, ctx), ctx, truth) for candidate in (answer, quantized)]
    assert [error for error, _ in errors] == [None, None]
    assert errors[0][1] == 0.0 < errors[1][1]


ACROSS_RANKS = set(backends.all_backends()["collectives"].kernels)  # tests/test_collectives.py
ON_CUDA = {"cudnn.attention", "aten.flash_attention", "aten.efficient_attention"} | {
    name for library in backends.all_backends().values() if "cpu" not in library.devices for name in library.kernels
}


def test_every_kernel_is_swept() -> None:
    offered = {a.kernel for case in CASES for ctx in trace(case).contexts for a in backends.answers(ctx) if isinstance(a, Candidate)}
    here = [library for library in backends.all_backends().values() if not isinstance(library, LibraryBackend)]
    known = {name for library in here for name in library.kernels} - ON_CUDA - ACROSS_RANKS
    compiled = {name for name in known if backends.kernel(name).compiled}  # these have their own tests: they take a C++ compiler
    assert compiled == {"inductor.cpp_gemm", "flex.attention"}
    assert known - offered == compiled


def test_compiled_gemm_template() -> None:
    case = linear_case((7,), 64, 48, mode="max-autotune")
    (ctx, *_) = trace(case).contexts
    (template,) = (a for a in backends.answers(ctx) if a.kernel == "inductor.cpp_gemm")
    assert isinstance(template, Candidate)
    with torch_private.real_tensors():
        error, epsilon = measure.judged(measure.Bound(template, ctx), ctx, measure.truth_of(ctx))
    assert (error, epsilon) == (None, 0.0)


def test_a_wrong_kernel_is_found() -> None:
    """The sweep's own check: a kernel that forgets the bias, one that drops NaN, and one that raises."""
    (ctx, *_) = trace(linear_case((7,), 33, 16)).contexts
    (honest,) = (a for a in backends.answers(ctx) if isinstance(a, Candidate) and a.kernel == "onednn.linear_packed")
    real = backends.kernel(honest.kernel)
    broken: dict[str, Callable[[Any, Any, Any], Any]] = {
        "wrong": lambda emit, t, p: real.run(emit, {**t, "bias": None}, p),
        "nan": lambda emit, t, p: torch.nan_to_num(real.run(emit, t, p)),
    }
    for code, run in broken.items():
        fake = type(real)(real.name, run, real.prepare)
        with pytest.MonkeyPatch.context() as patch, torch_private.real_tensors():
            patch.setattr(measure, "kernel", lambda name, fake=fake: fake)
            error, _ = measure.judged(measure.Bound(honest, ctx), ctx, measure.truth_of(ctx))
        assert error is not None
        assert error.startswith(f"{code}: "), error


# --- patterns ---------------------------------------------------------------------------------------------------------------


def acts(fn: Callable[..., Any], *args: Tensor) -> set[str]:
    found = trace(Case("", fn, args)).contexts
    return {ctx.params["act"] for ctx in found if ctx.params.get("act")}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("name", "fn"), patterns.PATTERNS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("shape", [(7, 33), (2, 7, 33)], ids=str)
def test_activation_is_recognised(name: str, fn: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: Any) -> None:
    x, w = rand(*shape, dtype=dtype), rand(16, 33, dtype=dtype)
    assert acts(lambda x, w: fn(F.linear(x, w)), x, w) == {name}


NEAR_MISSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any]]] = {
    "another constant in gelu": ("gelu", lambda y, z: 0.5 * y * (1 + torch.erf(y * 0.7))),
    "another cubic term": ("gelu_tanh", lambda y, z: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.05 * y**3)))),
    "another power": ("gelu_tanh", lambda y, z: 0.5 * y * (1 + torch.tanh(0.7978845608028654 * (y + 0.044715 * y**2)))),
    "gate of another tensor": ("silu", lambda y, z: z * torch.sigmoid(y)),
    "intermediate read elsewhere": ("silu", lambda y, z: (lambda s: (y * s, s + 1))(torch.sigmoid(y))),
    "product read elsewhere": ("relu", lambda y, z: (torch.relu(y), y + 1)),
    "clip is not relu": ("relu", lambda y, z: y.clamp(min=0.5)),
    "in another dtype": ("gelu", lambda y, z: F.gelu(y.double())),
    "of a transposed product": ("relu", lambda y, z: torch.relu(y.t() + 1)),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_miss_is_not_recognised(miss: str) -> None:
    name, fn = NEAR_MISSES[miss]
    assert name not in acts(lambda x, w, z: fn(F.linear(x, w), z), rand(7, 33), rand(16, 33), rand(7, 16))


def epilogues(fn: Callable[..., Any], *args: Tensor) -> set[str]:
    return {ctx.params["binary"] for ctx in trace(Case("", fn, args)).contexts if ctx.params.get("binary")}


def test_residual_needs_the_same_shape_and_no_second_reader() -> None:
    x, w, r = rand(7, 33), rand(16, 33), rand(7, 16)
    assert epilogues(lambda x, w, r: x @ w.t() + r, x, w, r) == {"add"}
    assert epilogues(lambda x, w, r: r * (x @ w.t()), x, w, r) == {"mul"}
    assert epilogues(lambda x, w, r: x @ w.t() + r, x, w, r[:1]) == set()  # broadcast
    assert epilogues(lambda x, w, r: x @ w.t() + r, x, w, r.double()) == set()  # promoted
    assert epilogues(lambda x, w, r: torch.add(x @ w.t(), r, alpha=2), x, w, r) == set()
    assert epilogues(lambda x, w, r: x @ w.t() - r, x, w, r) == set()
    assert epilogues(lambda x, w, r: (lambda y: (y + r, y))(x @ w.t()), x, w, r) == set()
    assert epilogues(lambda x, w, r: (lambda y: y * y)(x @ w.t()), x, w, r) == set()


def test_scaled_addmm_is_no_linear_layer() -> None:
    args = (rand(16), rand(7, 33), rand(33, 16))
    for scales in ({"beta": 0.5}, {"alpha": 2.0}):
        found = trace(Case("", lambda b, x, w, s=scales: torch.addmm(b, x, w, **s), args)).contexts
        assert all(ctx.region.op != "linear" for ctx in found if "bias" in ctx.roles), scales


def test_batch_norm_folds_only_if_nothing_else_reads_the_convolution() -> None:
    case = conv_case((8, 12), (3, 3), norm=True)
    steps = {ctx.params["affine"] for ctx in trace(case).contexts}
    assert ("sub", "mul", "mul", "add") in steps

    def twice(*args: Tensor) -> Any:
        y = F.conv2d(*args[:3])
        return F.batch_norm(y, *args[3:]), y.relu()

    assert {ctx.params["affine"] for ctx in trace(Case("", twice, case.args)).contexts} == {()}


def test_transposed_and_1d_convolutions_are_left_alone() -> None:
    x, w = rand(2, 8, 9, 7), rand(8, 4, 3, 3)
    assert trace(Case("", F.conv_transpose2d, (x, w))).contexts == ()
    assert trace(Case("", F.conv1d, (rand(2, 8, 9), rand(4, 8, 3)))).contexts == ()


# --- placed in a graph ------------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """Each epilogue of a product once, on odd sizes; a shared input for merged products."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(33, 33, bias=i % 2 == 0) for i in range(len(ACTS) + 2))
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = [act(layer(x)) for layer, act in zip(self.layers, ACTS.values(), strict=False)]
        return (*out, self.layers[-2](x) + x, (self.layers[-1](x) * x).mT, out[0].flatten())


class Convs(nn.Module):
    def __init__(self, dtype: torch.dtype, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.strided = nn.Conv2d(8, 12, kernel, stride=2, padding=kernel // 2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        with torch.no_grad():
            for value in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                assert value is not None
                value.uniform_(0.5, 1.5)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(self.norm(self.first(x)))
        return self.strided(y), self.depthwise(y) + x, torch.tanh(self.first(x)).flatten(1), y.sum((2, 3))


class Attentions(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, term: Tensor) -> tuple[Tensor, ...]:
        plain = F.scaled_dot_product_attention(q, k, v, scale=0.2)
        added = F.scaled_dot_product_attention(q, k, v, attn_mask=term)
        return plain.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1), added


def _attention_args(dtype: torch.dtype, length: int = 7) -> tuple[Tensor, ...]:
    qkv = (rand(2, length, 3, 64 + i, dtype=dtype)[..., :64].contiguous().transpose(1, 2) for i in range(3))
    return (*qkv, rand(length, length, dtype=dtype))


PLACED: dict[str, tuple[Callable[[torch.dtype], nn.Module], Callable[[torch.dtype], tuple[Tensor, ...]], dict[str, Any], int]] = {
    "mkl.linear_packed": (Linears, lambda d: (rand(2, 7, 33, dtype=d),), {"freeze": True}, 5),
    "onednn.linear": (Linears, lambda d: (rand(2, 7, 33, dtype=d),), {}, 5),
    "onednn.linear_packed": (Linears, lambda d: (rand(2, 7, 33, dtype=d),), {"freeze": True}, 5),
    "onednn.merged_linear_packed": (Linears, lambda d: (rand(2, 7, 33, dtype=d),), {"freeze": True}, 2),
    "inductor.gemv": (Linears, lambda d: (rand(1, 33, dtype=d),), {}, 5),
    "onednn.conv": (lambda d: Convs(d, 3), lambda d: (rand(2, 8, 9, 7, dtype=d),), {}, 3),
    "onednn.conv_packed": (lambda d: Convs(d, 3), lambda d: (rand(2, 8, 9, 7, dtype=d),), {"freeze": True}, 3),
    "onednn.conv1x1": (lambda d: Convs(d, 1), lambda d: (rand(2, 8, 9, 7, dtype=d),), {}, 2),
    "aten.conv": (lambda d: Convs(d, 3), lambda d: (rand(2, 8, 9, 7, dtype=d),), {}, 3),
    "aten.flash_attention_cpu": (lambda d: Attentions(), _attention_args, {}, 2),
    "attention.brgemm": (lambda d: Attentions(), lambda d: _attention_args(d, 77), {}, 2),
    "aten.sdpa_math": (lambda d: Attentions(), lambda d: _attention_args(d, 77), {}, 2),
    "inductor.attention": (lambda d: Attentions(), lambda d: _attention_args(d, 77), {}, 2),
}  # fmt: skip
FLOAT32_ONLY = ("mkl.linear_packed", "inductor.gemv", "inductor.attention", "attention.brgemm")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
AS_IS = {"aten.mm", "aten.bmm", "aten.sdpa", "aten.paged_attention"}  # the graph as it stands: nothing is placed


def prefer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Price one kernel far below everything else, so that the plan uses it wherever it is offered."""

    def cost(self: Roofline, ctx: SelectionContext, candidate: Candidate) -> Cost:
        wanted = candidate.kernel == name and not dict(candidate.params).get("as_is")
        return Cost(1 if wanted else 10**9, "assumed")

    monkeypatch.setattr(Roofline, "cost", cost)


HERE = [n for n in PLACED if AVX512 or n != "attention.brgemm"]
PLACEMENTS = [(n, d) for n in HERE for d in (F32, BF16) if d is F32 or n not in FLOAT32_ONLY]


@pytest.mark.parametrize(("name", "dtype"), PLACEMENTS, ids=str)
def test_kernel_in_a_graph(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs, options, least = PLACED[name]
    torch.manual_seed(0)
    module, args = make(dtype), inputs(dtype)
    prefer(monkeypatch, name)
    torch._dynamo.reset()
    options = {"race": False, "cost_model": "roofline", **options}
    compiled = torch.compile(module, backend="layerzero", options=options)
    with torch.no_grad():
        expected, found = module(*args), compiled(*args)
    (plan,) = backend.RECORDS[-1].plans
    placed = [c.candidate for c in plan.choices if c.candidate.kernel == name]
    assert len(placed) >= least, [c.candidate.kernel for c in plan.choices]
    for y, x in zip(found, expected, strict=True):
        assert_same(y, x, CLOSE[x.dtype] * 2, name)
        assert y.shape == x.shape
        assert y.stride() == x.stride()


class Residuals(nn.Module):
    """Each sum is read by a convolution and by the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x) + x)
        return x


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the own attention kernel needs AVX-512")
def test_own_attention_reads_any_strides() -> None:
    """Inductor may hand over repeated heads with the heads innermost, whatever the graph's strides were."""
    q, k, v, mask = rand(1, 2, 16, 16), rand(1, 2, 16, 16), rand(1, 2, 16, 16), rand(1, 1, 16, 16)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, mask)

    def inside_out(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, (512, 1, 32, 2)[: x.dim()]).copy_(x)

    op = ops.attention_brgemm()
    turned = mask.mT.contiguous().mT
    for given in ((inside_out(q), k, v, mask), (q, inside_out(k), v, mask), (q, k, inside_out(v), mask), (q, k, v, turned)):
        torch.testing.assert_close(op(*given, False, 0.25), exact, rtol=1e-5, atol=1e-5)


def test_repeated_heads_of_one_key_head() -> None:
    """The whole way of a case in which Inductor chose such strides: one key head for two queries' heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = (k * 1.5)[:, :, None].expand(1, 1, 2, 16, 16).reshape(1, 2, 16, 16)
        v = v[:, :, None].expand(1, 1, 2, 16, 16).reshape(1, 2, 16, 16)
        return nn.functional.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True)

    args = rand(1, 2, 16, 16), rand(1, 1, 16, 16), rand(1, 1, 16, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(attend, backend="layerzero", options={"race": False, "cost_model": "roofline"})(*args)
        torch.testing.assert_close(found, attend(*args), rtol=1e-5, atol=1e-5)


def test_what_two_kernels_read_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.utils import run_and_get_code

    prefer(monkeypatch, "onednn.conv_packed")
    torch._dynamo.reset()
    options = {"race": False, "cost_model": "roofline", "freeze": True}
    run = torch.compile(Residuals().eval(), backend="layerzero", options=options)
    with torch.no_grad():
        _, (code,) = run_and_get_code(run, rand(1, 16, 9, 9))
    reads = re.findall(r"async_compile.cpp_pybinding\(\[(.*)\]", code)
    assert code.count("_convolution_pointwise") == 5
    assert max(types.count("*'") for types in reads) <= 3  # one sum: two inputs, one output


def test_every_kernel_is_placed() -> None:
    here = [library for library in backends.all_backends().values() if not isinstance(library, LibraryBackend)]
    known = {name for library in here for name in library.kernels} - ON_CUDA - ACROSS_RANKS
    assert set(PLACED) | AS_IS | {"inductor.cpp_gemm", "flex.attention"} == known  # these two are placed in tests of their own


@pytest.mark.parametrize("shapes", [((4, 3, 8), (4, 4, 6, 8)), ((2, 3, 7, 8), (1, 3, 5, 8)), ((2, 3, 7, 8), (2, 1, 5, 8))], ids=str)
def test_attention_that_broadcasts_stays_as_it_is(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The kernels behind torch's operator take equal batches only."""
    q, k = (rand(*shape) for shape in shapes)
    own = rand(*q.shape[:-2], *k.shape[-2:])
    for keys, values in ((k, k), (k, own), (own, k)):
        case = Case("", lambda q, k, v: ops.sdpa(q, k, v, None, False, None, False), (q, keys, values))
        (ctx,) = trace(case).contexts
        assert {a.kernel for a in backends.answers(ctx) if isinstance(a, Candidate)} == {"aten.sdpa"}


@functools.cache
def _library_names() -> tuple[str, ...]:
    return tuple(backends.all_backends())


@pytest.mark.parametrize("library", _library_names())
def test_allow_list_keeps_other_libraries_out(library: str) -> None:
    """ATen is always allowed: a graph must run at all."""
    case = linear_case((7,), 33, 16, backends=(library,))
    kernels = {a.kernel for ctx in trace(case).contexts for a in backends.answers(ctx)} - {library}  # by which an absent one is rejected
    allowed = {n for name, b in backends.all_backends().items() if name in (library, "aten") for n in b.kernels}
    assert kernels <= allowed
