"""What a plan's kernels take inside real calls, by torch's profiler: the clock beside each price.

A profile knows operators by name and in time's order; a plan knows, for each kernel, by what names Inductor's code calls it. The calls of
one name are given to the regions that use it in the graph's order. Where their numbers do not fit (a region that Inductor made a loop),
these regions stay without a time. Loops have no operator: they are in what is left of the whole call.

On a GPU an operator's time is that of the kernels that it launched. A CUDA graph's replay has no operators: there the kernels are profiled
outside the graph, and the call is timed with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .. import torch_private
from ..errors import OptionError
from ..problem import LOOP
from ..types import LOSSLESS, PLANNED, Choice

if TYPE_CHECKING:
    from ..backend import GraphRecord

WARM, CALLS = 3, 9


@dataclass(frozen=True, slots=True)
class Profile:
    """Medians of `CALLS` calls: nanoseconds of one call, what profiling adds to it, and the kernels of each plan, by its fingerprint and
    the name of a region."""

    call_ns: int
    kernels: Mapping[str, Mapping[str, int]]
    overhead_ns: int = 0


def name_of(choice: Choice) -> str:
    return ", ".join(choice.candidate.region.outputs)


def profile(records: Sequence[GraphRecord], run: Callable[[], object]) -> None:
    """Profile `run`, which calls what was compiled (and its backward pass, if that was planned too), into the records whose plan runs.

    OptionError where that would show nothing.
    """
    planned = [r for r in records if r.winner in (PLANNED, LOSSLESS)]
    if not planned:
        raise OptionError("nothing to profile: no graph of this module runs LayerZero's plan. print(lz.explain(compiled)) says what runs.")
    users: dict[str, list[tuple[str, str]]] = {}  # operator -> (plan, region) of each call, in order
    for record in planned:
        for plan in record.plans:
            for choice in plan.choices:
                for operator, count in _operators(choice, record.calls).items() if choice.candidate.kernel != LOOP else ():
                    users.setdefault(operator, []).extend([(plan.fingerprint, name_of(choice))] * count)
    found: dict[str, list[int]] = {}
    gpu = any(plan.environment.get("device") != "cpu" for r in planned for plan in r.plans)
    _timed(run, gpu, WARM)
    alone = _timed(run, gpu)
    activity = torch.profiler.ProfilerActivity
    with torch_private.ungraphed() if gpu else nullcontext():
        plain = _timed(run, gpu) if gpu else alone  # outside a CUDA graph
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if gpu else [activity.CPU]) as profiler:
            whole = _timed(run, gpu)
    events = [e for e in profiler.events() or () if e.device_type.name == "CPU"]  # a GPU's kernels are under these
    for event in sorted(events, key=lambda e: e.time_range.start):
        name = _known(event.name, users)
        if name and not _within(event, users):
            found.setdefault(name, []).append(round(1e3 * (event.device_time_total if gpu else event.time_range.elapsed_us())))
    kernels: dict[str, dict[str, int]] = {plan.fingerprint: {} for record in planned for plan in record.plans}
    for operator, regions in users.items():
        each, odd = divmod(len(found.get(operator, ())), CALLS * len(regions))
        if odd or not each:
            continue
        calls = [found[operator][i :: each * len(regions)] for i in range(each * len(regions))]
        for i, times in enumerate(calls):
            fingerprint, region = regions[i // each]
            kernels[fingerprint][region] = kernels[fingerprint].get(region, 0) + round(median(times))
    for record in planned:
        record.profile = Profile(alone, kernels, max(0, whole - plain))


def _timed(run: Callable[[], object], gpu: bool, calls: int = CALLS) -> int:
    """Median nanoseconds of a call."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        run()
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter_ns() - start)
    return round(median(taken))


def _operators(choice: Choice, calls: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """As what a profile names the calls of a chosen kernel, and how many there are in one region."""
    candidate = choice.candidate
    if candidate.as_is:  # a node of the graph is named after its operator
        return {f"aten::{re.sub(r'(_default)?(_[0-9]+)?$', '', candidate.region.nodes[-1])}": 1}
    names = calls.get(candidate.kernel, {}).items()
    found = ((re.sub(r"^extern_kernels\.", "aten::", name.removeprefix("torch.ops.")), times) for name, times in names)
    return {name.replace(".", "::", 1): times for name, times in found}


def _known(name: str, users: Collection[str]) -> str | None:
    """The operator or function that an event is a call of: Inductor numbers the Triton functions that it launches."""
    return next((n for n in (name, re.sub(r"_\d+$", "", name)) if n in users), None)


def _within(event: Any, users: Collection[str]) -> bool:
    """Whether another counted operator made this call."""
    parent = event.cpu_parent
    while parent is not None:
        if _known(parent.name, users):
            return True
        parent = parent.cpu_parent
    return False
