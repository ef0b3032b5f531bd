"""What each way to do an all-reduce takes, measured by all ranks of a job together: once for a machine and a number of ranks.

One rank alone cannot run a collective, so these are no timings of regions but peaks of the machine, as its bandwidth is: a curve
for each kernel of the backend `collectives`, in ns by bytes, between whose points prices are interpolated. Only graphs that
contain collectives, or DTensors, make ranks measure; all of them do so at the same graph, right after they met there.
"""

from __future__ import annotations

import bisect
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from . import ops, torch_private
from .capture import tensors_in
from .target import environment, event_timed
from .timings import TimingStore
from .types import Plan

log = logging.getLogger(__name__)

KIND = "links"
OWN = "c10d.all_reduce"
SIZES = tuple(1 << n for n in range(12, 27, 2))  # bytes, 4 KiB to 64 MiB
CALLS, ROUNDS = 10, 7

Curve = Sequence[Sequence[int]]  # (bytes, ns), rising
Curves = Mapping[str, Curve]


def wanted(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the graph that Dynamo captured will contain collectives that GPUs of one job do."""
    tensors = (*tensors_in(inputs), *gm.parameters(), *gm.buffers())
    wrapped = any(torch_private.is_wrapper(t) for t in tensors)
    return (wrapped or present(gm.graph)) and torch_private.symmetric_memory()


def present(graph: fx.Graph) -> bool:
    """Whether a graph contains collectives."""
    return any(torch_private.is_collective(n.target) for n in graph.nodes)


def stored(store: TimingStore, ranks: int, graphs: bool) -> Curves | None:
    """What an earlier job measured here, or None."""
    curves = (store.get_record(KIND, _key(ranks, graphs)) or {}).get("curves")
    return curves if isinstance(curves, dict) and all(_is_curve(c) for c in curves.values()) else None


def keep(store: TimingStore, ranks: int, graphs: bool, curves: Curves) -> None:
    store.put_record(KIND, _key(ranks, graphs), {"curves": {name: [list(point) for point in curve] for name, curve in curves.items()}})


def _key(ranks: int, graphs: bool) -> str:
    return "|".join(f"{k}={v}" for k, v in sorted(environment("cuda").items())) + f"|{ranks=}|{graphs=}"


def _is_curve(value: Any) -> bool:
    points = isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value)
    return bool(points) and all(isinstance(n, int) and n > 0 for p in value for n in p) and all(a[0] < b[0] for a, b in pairwise(value))


def price(curve: Curve, nbytes: int) -> int:
    """ns for so many bytes: between two points along the line through them on logarithmic axes, beyond the last in proportion."""
    sizes = [size for size, _ in curve]
    i = bisect.bisect_left(sizes, nbytes)
    if i == 0:
        return curve[0][1]
    (a, low), (b, high) = curve[i - 1], curve[min(i, len(curve) - 1)]
    if i == len(curve):
        return round(low * nbytes / a)
    part = math.log(nbytes / a) / math.log(b / a)
    return round(math.exp((1 - part) * math.log(low) + part * math.log(high)))


def joined(found: Sequence[Curves]) -> dict[str, list[list[int]]]:
    """What all ranks together saw: of a kernel that was right on each, the slowest rank's time at each size."""
    names = set(found[0]).intersection(*found[1:])
    return {
        name: [[points[0][0], max(ns for _, ns in points)] for points in zip(*(curves[name] for curves in found), strict=True)]
        for name in sorted(names)
    }


def kernels(plans: Sequence[Plan]) -> list[str]:
    """What does the plans' all-reduces, in their order."""
    return [c.candidate.kernel for p in plans for c in p.choices if c.candidate.region.op == "all_reduce"]


def missing(plans: Sequence[Plan], links: Curves) -> str | None:
    """The first all-reduce of these plans that the ranks of this job cannot do, in words."""
    unknown = (kernel for kernel in kernels(plans) if kernel not in {OWN, *links})
    return next((f"{kernel} is not known to work between these ranks" for kernel in unknown), None)


def measure(group: str, graphs: bool) -> Curves:
    """This rank's curves. All ranks of the group must call this at the same time; a kernel whose sums are wrong has no curve."""
    with torch_private.real_tensors():
        ways: dict[str, Callable[[Tensor], Tensor]] = {OWN: lambda x: torch_private.all_reduced(x, group)}
        for variant in ("one_shot", "two_shot") if _agreed(_shares_memory(group), group) else ():
            ways[f"symm_mem.{variant}"] = lambda x, variant=variant: ops.all_reduce(x, variant, group)  # type: ignore[misc]
        right = {
            name: _agreed(_is_right(run, group, torch.bfloat16) & _is_right(run, group, torch.float32), group) for name, run in ways.items()
        }
        return {name: [[size, _ns(run, size, group, graphs)] for size in SIZES] for name, run in ways.items() if right[name]}


def _agreed(yes: bool, group: str) -> bool:
    """Whether all ranks say so: one that went another way than the others would leave them waiting in the next collective."""
    return not bool(torch_private.all_reduced(torch.tensor([float(not yes)], device="cuda"), group))


def _shares_memory(group: str) -> bool:
    try:
        torch_private.symmetric_buffer(group, SIZES[-1], torch.device("cuda", torch.cuda.current_device()))
    except torch_private.kernel_errors() as error:
        log.info("these GPUs share no memory: %s", error)
        return False
    return True


def _is_right(run: Callable[[Tensor], Tensor], group: str, dtype: torch.dtype) -> bool:
    """Lossless, and NaN of one rank comes out on all: twice in a row, since a wrong barrier shows in the second call."""
    generator, right = torch.Generator("cuda").manual_seed(torch.distributed.get_rank()), True
    for _ in range(2):
        x = torch.randn(SIZES[1] // 2, generator=generator, device="cuda").to(dtype)
        x[0] = math.nan if torch.distributed.get_rank() == 0 else 0.0
        exact = torch_private.all_reduced(x.double(), group)
        error, own = (float((y.double() - exact)[1:].abs().max()) for y in (run(x), torch_private.all_reduced(x, group)))
        nan = bool(run(x)[0].isnan())  # on every rank, whatever the error was
        right &= nan and error <= 2 * own + 4 * torch.finfo(dtype).eps * float(exact[1:].abs().max())
    return right


def _ns(run: Callable[[Tensor], Tensor], size: int, group: str, graphs: bool) -> int:
    """Median time of a call among others: in a CUDA graph, or with the host's time to launch it."""
    x = torch.randn(size // 2, device="cuda").to(torch.bfloat16)

    def several() -> None:
        for _ in range(CALLS):
            run(x)

    call = torch_private.capture(lambda: run(x), CALLS).replay if graphs else several
    call()
    samples = []
    for _ in range(ROUNDS):
        torch_private.all_reduced(x[:1], group)  # the ranks start together
        samples.append(event_timed(call))
    return max(1, round(statistics.median(samples) / CALLS * 1e9))
