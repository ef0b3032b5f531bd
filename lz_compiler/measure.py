"""Measuring a region's candidates against each other, and checking each against float64.

Method: inputs rotated past the last-level cache, warm, interleaved rounds, medians. On a CPU rounds are discarded in which the
process did not get its cores (wall time well above CPU time per thread, compared with the best), or the CPU was slow (pace.py).
On a GPU a sample is the replay of a CUDA graph of many calls, timed by events: host overhead stays out, and a kernel that cannot
be captured is found out.
"""

from __future__ import annotations

import logging
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
from .errors import DeviceLostError, UnjudgedError, first_line
from .pace import PACE
from .target import event_timed, last_level_cache
from .types import Candidate, Format

log = logging.getLogger(__name__)

ROUNDS = 9
MAX_COPIES = {"cpu": 4, "cuda": 12}
PLACE = ("values", "out_reshape", "mask", "square")  # parameters that say where in which model a region stands, not what runs
OUT_OF_MEMORY, UNJUDGED = "OutOfMemoryError", "unjudged"  # how errors begin that say nothing about a kernel
CONTENDED = 1.3  # times the best wall time over CPU time: the process had to wait for its cores
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

    def loop(self, op: Any, *args: Any) -> Any:
        return op(*args)

    def item(self, values: Any, index: int) -> Any:
        return values[index]

    def constant(self, make: Callable[..., Any], *values: Any) -> Any:
        return make(*values)

    def subgraph(self, function: Callable[..., Any], *examples: Tensor) -> Any:
        return function


class TimedEmitter(EagerEmitter):
    """Leaves out what TorchInductor fuses with other loops."""

    def loop(self, op: Any, *args: Any) -> Any:
        return args[0]


def measurable(ctx: SelectionContext) -> bool:
    """Whether there is something to time and to check: elements, of a real floating-point type, and no other rank's."""
    if ctx.region.op not in semantics.REFERENCES:
        return False
    specs = (*ctx.specs, *ctx.outputs)
    return semantics.torch_dtype(specs[-1].dtype).is_floating_point and all(0 not in spec.shape for spec in specs)


def inputs(ctx: SelectionContext, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(ctx.specs[0].device).manual_seed(seed)
    return {role: semantics.example(role, spec, generator, ctx.params) for role, spec in zip(ctx.roles, ctx.specs, strict=True)}


class Inputs:
    """One set of inputs, in every format that candidates ask for, each made once."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self._made: dict[tuple[str, Format], Tensor] = {}

    def formatted(self, candidate: Candidate, ctx: SelectionContext) -> dict[str, Tensor]:
        """The inputs in the candidate's formats (packing is the kernel's own `prepare`)."""
        return {role: self._in(role, fmt) for role, fmt in zip(ctx.roles, candidate.in_formats, strict=True)}

    def _in(self, role: str, fmt: Format) -> Tensor:
        if fmt.layout == "packed":
            return self.values[role]
        if (role, fmt) not in self._made:
            value = self.values[role].to(semantics.torch_dtype(fmt.dtype))
            if fmt.layout == "channels_last" and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self._made[role, fmt] = value
        return self._made[role, fmt]


class Bound:
    """A candidate's kernel, to be called on several sets of inputs; one that exists only in compiled graphs is compiled once."""

    def __init__(self, candidate: Candidate, ctx: SelectionContext) -> None:
        self.candidate, self.ctx, self.kernel = candidate, ctx, kernel(candidate.kernel)
        self.params = dict(candidate.params)
        self._compiled: Callable[[Values], Any] | None = None

    def on(self, inputs: Inputs, timed: bool = False) -> Callable[[], Any]:
        """The kernel on these inputs as a call without arguments, prepared. `timed`: without what ends in other loops."""
        emit, values = TimedEmitter() if timed else EagerEmitter(), inputs.formatted(self.candidate, self.ctx)
        ready = self.kernel.prepare(emit, values, self.params) if self.kernel.prepare else values
        if not self.kernel.compiled:
            return lambda: self.kernel.run(emit, ready, self.params)
        tensors = {role: v for role, v in ready.items() if isinstance(v, Tensor)}
        run = self._compiled or torch_private.compile_region(lambda t: self.kernel.run(emit, {**ready, **t}, self.params), tensors)
        if self.reusable:
            self._compiled = run
        return lambda: run(tensors)

    @property
    def reusable(self) -> bool:
        """Whether what was compiled serves other inputs: on a CPU, weights are constants in the code."""
        return self.ctx.specs[0].device == "cuda" or not torch_private.COMPILED_IN & {*self.ctx.roles}


def leaves(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a region computes on one set of inputs: in float64 (some channels), by eager, and by eager with a NaN put in."""

    inputs: Inputs
    exact: tuple[Tensor, ...]
    select: Callable[[Tensor], Tensor]
    eager_error: float
    scale: float
    poisoned: Inputs | None
    nans: tuple[Tensor, ...]


def truth_of(ctx: SelectionContext) -> Truth:
    """UnjudgedError where eager itself does not run, as for sizes that do not fit each other, or is not finite and float64 is."""
    op, params = ctx.region.op, ctx.params
    values, reference = inputs(ctx, 0), semantics.REFERENCES[op]
    some, select = semantics.sampled(op, values, params)
    try:
        exact = leaves(reference({r: v.double() if v.is_floating_point() else v for r, v in some.items()}, params))
        eager = leaves(reference(values, params))
    except RuntimeError as raised:
        if torch_private.out_of_memory(raised):
            raise
        raise UnjudgedError(f"eager itself does not run {_sized(ctx)}: {first_line(str(raised))}") from raised
    pairs = [(select(e), x) for e, x in zip(eager, exact, strict=True)]
    if any(bool((x.isfinite() & ~e.isfinite().reshape(x.shape)).any()) for e, x in pairs):
        raise UnjudgedError(f"eager's own result of {_sized(ctx)} is not finite where float64's is")
    error = max(max_error(e, x) for e, x in pairs)
    scale = max(float(x.abs().nan_to_num().max()) for x in exact)
    poisoned = _poisoned(ctx, values)
    nans = tuple(y.isnan() for y in leaves(reference(poisoned, params))) if poisoned else ()
    return Truth(Inputs(values), exact, select, error, scale, Inputs(poisoned) if poisoned else None, nans)


def _poisoned(ctx: SelectionContext, values: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The inputs with NaN in one corner of the first."""
    first = values[ctx.roles[0]]
    if not first.is_floating_point() or first.dim() < 2:
        return None
    spoiled = first.clone() if 0 in first.stride() else _clone(first)
    spoiled.select(0, 0).select(0, 0).fill_(math.nan)
    return {**values, ctx.roles[0]: spoiled}


def _sized(ctx: SelectionContext) -> str:
    return f"{ctx.region.op} of " + ", ".join(f"{role} {spec.shape}" for role, spec in zip(ctx.roles, ctx.specs, strict=True))


def rounding(ctx: SelectionContext) -> float:
    """Relative error that accumulating in float32 has in any order: sqrt(n) half-ulps for n terms (Higham and Mary, A new
    approach to probabilistic rounding error analysis, SISC 2019), and a few ulps of the output's dtype."""
    match ctx.region.op:
        case "conv":
            terms = math.prod(ctx.spec("w").shape[1:])
        case "attention":
            terms = ctx.spec("k").shape[-2] + ctx.spec("k").shape[-1]
        case "paged_attention":
            terms = ctx.params["keys"] + ctx.spec("q").shape[-1]
        case _:
            terms = ctx.specs[0].shape[-1]
    accumulated = 0.5 * math.sqrt(terms) * torch.finfo(torch.float32).eps
    return accumulated + 4 * torch.finfo(semantics.torch_dtype(ctx.outputs[0].dtype)).eps


def max_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double().reshape(exact.shape) - exact).abs().max())


def judged(bound: Bound, ctx: SelectionContext, truth: Truth) -> tuple[str | None, float]:
    """(why the kernel may not be used, its relative error beyond the reference). Lossless is an error of at most twice
    eager's, plus what any order of summation may cost; and a NaN must come out where eager's does."""
    results = [truth.select(y) for y in leaves(bound.on(truth.inputs)())]
    own = max(max_error(y, x) for y, x in zip(results, truth.exact, strict=True))
    lossless = own <= 2 * truth.eager_error + rounding(ctx) * truth.scale
    candidate = bound.candidate
    quantized = "lossy" in dict(candidate.params)
    lossy = quantized or any(f.dtype != s.dtype for f, s in zip(candidate.out_formats, ctx.outputs, strict=True))
    epsilon = 0.0
    if quantized or not lossless:  # int8 weights may hide within a few ulps of bfloat16, layer by layer
        pairs = [(y.double().reshape(x.shape), x) for y, x in zip(results, truth.exact, strict=True)]
        epsilon = max(float((y - x).norm() / x.norm().clamp_min(1e-30)) for y, x in pairs)
    if not math.isfinite(own) or (not lossless and not lossy):
        return f"wrong: error {own:.3g}, eager's is {truth.eager_error:.3g} at scale {truth.scale:.3g}", epsilon
    if truth.poisoned is not None:
        results = list(leaves(bound.on(truth.poisoned)()))
        if not all(torch.equal(y.isnan().reshape(n.shape), n) for y, n in zip(results, truth.nans, strict=True)):
            return "nan: a NaN in the input does not come out where eager's does", epsilon
    return None, epsilon


def measure(ctx: SelectionContext, candidates: Sequence[Candidate], deadline: float, timed: bool = True) -> dict[int, Measurement]:
    """Measure candidates of one region, interleaved, until done or `deadline` (time.perf_counter seconds).

    A kernel that raises, is wrong, or treats NaN unlike eager yields a Measurement with its error and no time. Indices
    not reached before the deadline are missing from the result. DeviceLostError for one after which nothing runs on the GPU.
    Not `timed`: a kernel that is right has neither.
    """
    found: dict[int, Measurement] = {}
    cuda = ctx.specs[0].device == "cuda"
    with torch_private.real_tensors():
        try:
            truth = truth_of(ctx)
            copies = _copies(truth.inputs, ctx.specs[0].device) if timed else []
        except (RuntimeError, MemoryError) as raised:
            if not isinstance(raised, UnjudgedError) and not torch_private.out_of_memory(raised):
                raise
            return {i: Measurement(None, 0, 0, 0.0, _failure(raised)) for i in range(len(candidates))}
        calls: dict[int, list[Callable[[], Any]]] = {}
        epsilons: dict[int, float] = {}
        for i, candidate in enumerate(candidates):
            if time.perf_counter() > deadline:
                break
            try:
                bound = Bound(candidate, ctx)
                error, epsilons[i] = judged(bound, ctx, truth)
                if error is None and timed:
                    one = bound.kernel.compiled and not bound.reusable
                    calls[i] = [bound.on(values, timed=True) for values in (copies[:1] if one else copies)]
                    if cuda:
                        calls[i] = _graph(calls[i])
            except torch_private.kernel_errors() as raised:
                calls.pop(i, None)
                error = _failure(raised)
                if cuda and not _is_alive():
                    lost = DeviceLostError(i, f"the kernel {candidate.kernel} ({_sized(ctx)})", error)
                    log.error("%s", lost)  # whoever cleans up above may ask CUDA for something, and raise its error instead
                    raise lost from raised
            if error is not None or not timed:
                found[i] = Measurement(None, 0, 0, epsilons.get(i, 0.0), error)
        sampled = _replays(calls) if cuda else _rounds(calls, deadline)
        for i, samples in sampled.items():
            ns = round(statistics.median(samples) * 1e9)
            ranked = sorted(samples)
            spread = round((ranked[int(0.8 * (len(ranked) - 1))] - ranked[int(0.2 * (len(ranked) - 1))]) * 1e9)
            found[i] = Measurement(max(1, ns), spread, len(samples), epsilons[i], None)
        calls.clear()
        if cuda:
            del truth, copies
            torch.cuda.empty_cache()
    return found


def checked(ctx: SelectionContext, candidate: Candidate) -> Measurement:
    """Whether one kernel is right for one region, without its time."""
    return measure(ctx, [candidate], math.inf, timed=False)[0]


def is_fact(error: str | None) -> bool:
    """Whether what a kernel did would be the same again: not where memory ran out, or nothing could be said of it."""
    return not (error or "").startswith((OUT_OF_MEMORY, UNJUDGED))


def _failure(raised: Exception) -> str:
    if torch_private.out_of_memory(raised) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    unjudged = isinstance(raised, UnjudgedError)
    kind = UNJUDGED if unjudged else OUT_OF_MEMORY if torch_private.out_of_memory(raised) else type(raised).__name__
    return f"{kind}: {str(raised).splitlines()[0][:200] if str(raised) else ''}"


def _copies(first: Inputs, device: str) -> list[Inputs]:
    """Several sets of inputs, together past the last-level cache."""
    size = sum(t.numel() * t.element_size() for t in first.values.values())
    wanted = math.ceil((3 if device == "cuda" else 1) * last_level_cache(device) / max(size, 1))
    count = min(MAX_COPIES[device], max(2, wanted))
    return [first, *(Inputs({role: _clone(value) for role, value in first.values.items()}) for _ in range(count - 1))]


def _clone(value: Tensor) -> Tensor:
    """A copy with the padding between its rows."""
    return semantics.laid_out(value, value.stride(), value.dtype, value.device)


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
    paces = [PACE.now()]
    while (turn := len(paces) - 1) < ROUNDS or (len(PACE.brisk(paces)) < ROUNDS and PACE.patience_s > 0):
        start = time.perf_counter()
        for i, bound in calls.items():
            taken[i].append(_sample(bound, repeats[i], turn * repeats[i]))
        paces.append(PACE.now())
        if turn >= ROUNDS:
            PACE.patience_s -= time.perf_counter() - start
        if turn >= 3 and time.perf_counter() > deadline:
            break
    kept = PACE.briskest(paces)
    return {i: uncontended([samples[turn] for turn in kept], 3) for i, samples in taken.items()}


def _graph(calls: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """One call that replays a CUDA graph of the given calls, several times over if they are short.

    Raises RuntimeError where a call cannot be captured: such a kernel would break a plan that runs in CUDA graphs.
    """

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()
    seconds = min(event_timed(all_of_them) for _ in range(2))
    repeats = max(1, min(8, round(SAMPLE_S / seconds)))
    graph = torch_private.capture(all_of_them, repeats)

    def replay() -> None:
        graph.replay()
        assert calls  # their tensors live as long as the graph that reads them

    replay()
    torch.cuda.synchronize()  # what it does wrong is raised here, and is known to be its
    return [replay] * (repeats * len(calls))


def _is_alive() -> bool:
    """Whether the GPU still does anything for this process: after a fault of a kernel it never does."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _replays(graphs: dict[int, list[Callable[[], Any]]]) -> dict[int, list[float]]:
    """Seconds a call: a graph's list is as long as the calls in it."""
    return {i: [event_timed(replay[0]) / len(replay) for _ in range(ROUNDS)] for i, replay in graphs.items()}


def uncontended(samples: Sequence[tuple[float, float]], least: int = 1) -> list[float]:
    """Seconds of those samples (seconds, wall time over CPU time) in which the process had its cores; the shortest `least` of all where
    there are fewer."""
    best = min(ratio for _, ratio in samples)
    kept = [seconds for seconds, ratio in samples if ratio <= CONTENDED * best]
    return kept if len(kept) >= least else sorted(seconds for seconds, _ in samples)[:least]


def signature(ctx: SelectionContext, candidate: Candidate, environment: str, version: str) -> str:
    """The identity of a measurement: everything that decides what runs, and nothing about where in which model."""
    params = ",".join(f"{k}={v}" for k, v in candidate.params if k not in PLACE)
    specs = ";".join(f"{s.shape}{s.stride}{s.dtype}" for s in ctx.specs)
    formats = ";".join(map(str, (*candidate.in_formats, *candidate.out_formats)))
    return f"{candidate.kernel}#{kernel(candidate.kernel).version}|{version}|{specs}|{formats}|{params}|{environment}"
