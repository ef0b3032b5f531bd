"""Measuring a region's candidates against each other, and checking each against float64.

Method (design, section 5): inputs rotated past the last-level cache, warm, interleaved rounds, medians; on a CPU rounds in
which the process did not get its cores are discarded (wall time well above CPU time per thread, compared with the best).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import semantics, torch_private
from .backends import kernel
from .backends.base import SelectionContext, Values

from .target import last_level_cache
from .types import Candidate

ROUNDS = 9
MAX_COPIES = 6
SAMPLE_S = 0.0005  # a sample repeats short calls until it lasts about this long


@dataclass(frozen=True, slots=True)
class Measurement:
    """`error` is None for a kernel that ran and was right; `epsilon` its relative error beyond the reference's own."""

    ns: int | None
    spread: int
    samples: int
    epsilon: float
    error: str | None


class EagerEmitter:
    """Runs a kernel's operators on real tensors."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    def item(self, values: Any, index: int) -> Any:
        return values[index]

    def constant(self, make: Callable[..., Any], *values: Any) -> Any:
        return make(*values)


def inputs(ctx: SelectionContext, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {role: semantics.example(role, spec, generator) for role, spec in zip(ctx.roles, ctx.specs, strict=True)}


def formatted(candidate: Candidate, ctx: SelectionContext, values: Values) -> dict[str, Tensor]:
    """The inputs in the candidate's formats (packing is the kernel's own `prepare`)."""
    out = {}
    for role, fmt in zip(ctx.roles, candidate.in_formats, strict=True):
        value = values[role]
        if fmt.layout != "packed":
            value = value.to(semantics.torch_dtype(fmt.dtype))
        if fmt.layout == "channels_last" and value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        out[role] = value
    return out


def bind(candidate: Candidate, values: Values) -> Callable[[], Any]:
    """The kernel as a call without arguments, prepared."""
    chosen, params, emit = kernel(candidate.kernel), dict(candidate.params), EagerEmitter()
    ready = chosen.prepare(emit, values, params) if chosen.prepare else values
    if not chosen.compiled:
        return lambda: chosen.run(emit, ready, params)
    tensors = {role: v for role, v in ready.items() if isinstance(v, Tensor) and role not in ("w", "bias")}
    constants = {role: v for role, v in ready.items() if role in ("w", "bias")}
    run = torch_private.compile_region(lambda t, c: chosen.run(emit, {**t, **c}, params), tensors, constants)
    return lambda: run(tensors)


def _leaves(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


@dataclass(frozen=True, slots=True)
class _Truth:
    values: dict[str, Tensor]
    exact: tuple[Tensor, ...]
    eager_error: float
    scale: float


def _truth(ctx: SelectionContext) -> _Truth:
    """Reference in float64 and eager's own error on the same inputs."""
    values, reference = inputs(ctx, 0), semantics.REFERENCES[ctx.region.op]
    exact = _leaves(reference({r: v.double() if v.is_floating_point() else v for r, v in values.items()}, ctx.params))
    eager = _leaves(reference(values, ctx.params))
    error = max(_max_error(e, x) for e, x in zip(eager, exact, strict=True))
    return _Truth(values, exact, error, max(float(x.abs().nan_to_num().max()) for x in exact))


def _max_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double().reshape(exact.shape) - exact).abs().max())


def _wrong(candidate: Candidate, ctx: SelectionContext, truth: _Truth) -> tuple[str | None, float]:
    """(why the kernel may not be used, its relative error beyond the reference). The lossless rule of design, section 6:
    at most twice eager's error plus a few units in the last place."""
    results = _leaves(bind(candidate, formatted(candidate, ctx, truth.values))())
    own = max(_max_error(y, x) for y, x in zip(results, truth.exact, strict=True))
    ulp = torch.finfo(semantics.torch_dtype(ctx.outputs[0].dtype)).eps
    lossless = own <= 2 * truth.eager_error + 4 * ulp * truth.scale
    epsilon = 0.0
    if not lossless:
        difference = [(y.double().reshape(x.shape) - x).norm() / x.norm().clamp_min(1e-30) for y, x in zip(results, truth.exact, strict=True)]
        epsilon = float(max(difference))
    lossy = any(f.dtype != s.dtype for f, s in zip(candidate.out_formats, ctx.outputs, strict=True))
    if not math.isfinite(own) or (not lossless and not lossy):
        return f"wrong: error {own:.3g}, eager's is {truth.eager_error:.3g} at scale {truth.scale:.3g}", epsilon
    return _nan_differs(candidate, ctx, truth), epsilon


def _nan_differs(candidate: Candidate, ctx: SelectionContext, truth: _Truth) -> str | None:
    """Put one NaN into the first input: it must come out where eager's does."""
    first = ctx.roles[0]
    poisoned = dict(truth.values)
    if not poisoned[first].is_floating_point():
        return None
    poisoned[first] = poisoned[first].clone()
    poisoned[first].select(0, 0).select(0, 0).fill_(math.nan) if poisoned[first].dim() > 1 else poisoned[first].fill_(math.nan)
    expected = _leaves(semantics.REFERENCES[ctx.region.op](poisoned, ctx.params))
    results = _leaves(bind(candidate, formatted(candidate, ctx, poisoned))())
    same = all(torch.equal(y.reshape(e.shape).isnan(), e.isnan()) for y, e in zip(results, expected, strict=True))
    return None if same else "nan: a NaN in the input does not come out where eager's does"


def measure(ctx: SelectionContext, candidates: Sequence[Candidate], deadline: float) -> dict[int, Measurement]:
    """Measure candidates of one region, interleaved, until done or `deadline` (time.perf_counter seconds).

    A kernel that raises, is wrong, or treats NaN unlike eager yields a Measurement with its error and no time. Indices
    not reached before the deadline are missing from the result.
    """
    found: dict[int, Measurement] = {}
    with torch_private.real_tensors():
        truth = _truth(ctx)
        calls: dict[int, list[Callable[[], Any]]] = {}
        epsilons: dict[int, float] = {}
        for i, candidate in enumerate(candidates):
            if time.perf_counter() > deadline:
                break
            try:
                error, epsilons[i] = _wrong(candidate, ctx, truth)
                if error is None:
                    calls[i] = _rotated(candidate, ctx)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as raised:
                error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:200] if str(raised) else ''}"
            if error is not None:
                found[i] = Measurement(None, 0, 0, epsilons.get(i, 0.0), error)
        for i, samples in _rounds(calls, deadline).items():
            ns = round(statistics.median(samples) * 1e9)
            ranked = sorted(samples)
            spread = round((ranked[int(0.8 * (len(ranked) - 1))] - ranked[int(0.2 * (len(ranked) - 1))]) * 1e9)
            found[i] = Measurement(max(1, ns), spread, len(samples), epsilons[i], None)
        calls.clear()
    gc.collect()
    if ctx.specs[0].device == "cuda":
        torch.cuda.empty_cache()
    return found


def _rotated(candidate: Candidate, ctx: SelectionContext) -> list[Callable[[], Any]]:
    """The kernel bound to several sets of inputs, together past the last-level cache."""
    size = sum(math.prod(s.shape) * torch.empty((), dtype=semantics.torch_dtype(s.dtype)).itemsize for s in ctx.specs)
    copies = min(MAX_COPIES, max(2, math.ceil(last_level_cache() / max(size, 1))))
    if kernel(candidate.kernel).compiled:
        copies = 1
    return [bind(candidate, formatted(candidate, ctx, inputs(ctx, seed))) for seed in range(copies)]


def _sample(calls: Sequence[Callable[[], Any]], repeats: int, turn: int) -> tuple[float, float]:
    """(seconds a call, wall time over CPU time) of `repeats` calls."""
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(repeats):
        calls[(turn + i) % len(calls)]()
    wall = time.perf_counter() - wall
    return wall / repeats, wall / max(time.process_time() - cpu, 1e-9)


def _rounds(calls: dict[int, list[Callable[[], Any]]], deadline: float) -> dict[int, list[float]]:
    repeats: dict[int, int] = {}
    for i, bound in calls.items():
        for call in bound:  # every copy once: first-call costs stay out
            call()
        once, _ = _sample(bound, 1, 0)
        repeats[i] = max(1, min(50, round(SAMPLE_S / max(once, 1e-7))))
    taken: dict[int, list[tuple[float, float]]] = {i: [] for i in calls}
    for turn in range(ROUNDS):
        for i, bound in calls.items():
            taken[i].append(_sample(bound, repeats[i], turn * repeats[i]))
        if turn >= 3 and time.perf_counter() > deadline:
            break
    return {i: _uncontended(samples) for i, samples in taken.items()}


def _uncontended(samples: list[tuple[float, float]]) -> list[float]:
    best = min(ratio for _, ratio in samples)
    kept = [seconds for seconds, ratio in samples if ratio <= 1.3 * best]
    return kept if len(kept) >= 3 else sorted(seconds for seconds, _ in samples)[:3]


def signature(ctx: SelectionContext, candidate: Candidate, environment: str, version: str) -> str:
    """The identity of a measurement: everything that decides what runs, and nothing about where in which model."""
    params = ",".join(f"{k}={v}" for k, v in candidate.params if k not in ("values", "out_reshape"))
    specs = ";".join(f"{s.shape}{s.stride}{s.dtype}" for s in ctx.specs)
    formats = ";".join(map(str, (*candidate.in_formats, *candidate.out_formats)))
    return f"{candidate.kernel}#{kernel(candidate.kernel).version}|{version}|{specs}|{formats}|{params}|{environment}"


