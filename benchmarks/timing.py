"""Fair timing of several callables against each other on a machine that may be shared.

All calls are timed in turn, in a fresh order each round, so that drift (clocks, neighbours, heat) hits all of them
alike. Compare only numbers of one `interleave`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

# A sample is contended when its wall time per CPU time is this much above what the same call reached at its best.
CONTENDED = 1.25
# Each sample follows untimed calls of its own, on a CPU for this long, at least one. The pool threads of whatever ran before
# spin on for milliseconds, and their CPU time is accounted only at a scheduler tick: neither may land in this sample.
# (On a GPU one call does: by time, thousands would be queued.)
LEAD_IN_NS = 10_000_000


@dataclass(frozen=True)
class Stats:
    """Milliseconds over the `kept` samples; `dropped` samples did not get their cores.

    `cores` is what the call got at its best: below that of a quiet machine, the whole run was contended.
    """

    median: float
    p20: float
    p80: float
    kept: int
    dropped: int
    cores: float


@dataclass(frozen=True)
class _Sample:
    wall_ms: float
    cpu_ms: float


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    *,
    device: str = "cpu",
    seed: int = 0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Stats]:
    """Times every call once per round, in an order shuffled per round (and reproducible by `seed`).

    `before` is run, untimed, before each call: what puts back state that a call moves on.
    """
    timed, lead_in_ns = (_timed_cuda, 0) if device.startswith("cuda") else (_timed_cpu, LEAD_IN_NS)
    for call in calls.values():
        for _ in range(warmup):
            before()
            call()
    order = list(calls)
    rng = random.Random(seed)
    samples: dict[str, list[_Sample]] = {name: [] for name in calls}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            _lead_in(calls[name], before, lead_in_ns)
            before()
            samples[name].append(timed(calls[name]))
    return {name: _summarize(taken) for name, taken in samples.items()}


def _summarize(samples: list[_Sample]) -> Stats:
    """Drops the samples in which the process waited for a core: wall time went by without CPU time.

    The bar is the call's own best ratio and not the number of threads: partly serial code never uses all threads, and
    that alone must not drop it. The best tenth is passed over, since late accounting makes the odd ratio too good.
    """
    best = sorted(map(_wall_per_cpu, samples))[len(samples) // 10]
    kept = sorted(sample.wall_ms for sample in samples if _wall_per_cpu(sample) <= CONTENDED * best)
    p20, p80 = (kept[round(fraction * (len(kept) - 1))] for fraction in (0.2, 0.8))
    return Stats(statistics.median(kept), p20, p80, kept=len(kept), dropped=len(samples) - len(kept), cores=1 / best)


def ratio(reference: Stats, other: Stats) -> float:
    """How many times faster `other` is than `reference`, by medians."""
    return reference.median / other.median


def geomean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def _wall_per_cpu(sample: _Sample) -> float:
    # Late accounting can credit a short sample with more CPU time than its threads can have used.
    return max(sample.wall_ms / max(sample.cpu_ms, 1e-6), 1 / torch.get_num_threads())


def _lead_in(call: Callable[[], object], before: Callable[[], object], duration_ns: int) -> None:
    end = time.perf_counter_ns() + duration_ns
    before()
    call()
    while time.perf_counter_ns() < end:
        before()
        call()


def _timed_cpu(call: Callable[[], object]) -> _Sample:
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    call()
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    return _Sample(wall / 1e6, cpu / 1e6)


def _timed_cuda(call: Callable[[], object]) -> _Sample:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    elapsed = start.elapsed_time(end)
    # The GPU is not shared by time slices as cores are, so no sample counts as contended.
    return _Sample(elapsed, elapsed)
