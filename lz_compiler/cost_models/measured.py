"""Measured prices: what the timings store knows, and a measurement (within the budget) of what it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from .. import backends, torch_private
from ..backends.base import SelectionContext
from ..errors import DeviceLostError
from ..measure import UNJUDGED, is_fact, measurable, measure, signature
from ..pace import PACE
from ..target import is_here
from ..timings import Timing, TimingStore
from ..types import Candidate, Cost, Rejection, Target
from . import Priced
from .roofline import Roofline, traffic_ns

log = logging.getLogger(__name__)


def failed(candidate: Candidate, error: str | None) -> Rejection:
    """What a measurement's error makes of its candidate."""
    code, _, detail = (error or "failed").partition(":")
    return Rejection(candidate.kernel, code if code in ("wrong", "nan", UNJUDGED) else "failed", detail.strip() or code)


def _anchor(ctx: SelectionContext, candidates: Sequence[Candidate], known: Sequence[Timing | None]) -> list[int]:
    """The fastest kernel of known time, to be timed once more among those of unknown time: a CPU is slower on some days than on others."""
    if ctx.specs[0].device != "cpu":
        return []
    timed = [(t.ns, i) for i, t in enumerate(known) if t is not None and t.ns is not None]
    return [i for _, i in sorted(timed) if not backends.kernel(candidates[i].kernel).compiled][:1]


def _scaled(timing: Timing, factor: float) -> Timing:
    return timing if timing.ns is None else replace(timing, ns=max(1, round(timing.ns * factor)), spread=round(timing.spread * factor))


class Measured:
    """Failures are facts too: a kernel that raised or was wrong stays rejected until its version or the machine changes.

    What has no timing, and cannot get one in the budget or on this machine, is no candidate; the graph as it stands is
    priced by the roofline then, and that is not remembered.
    """

    def __init__(self, target: Target, store: TimingStore, budget_s: float) -> None:
        self.target, self.store = target, store
        self.deadline = time.perf_counter() + budget_s
        self.roofline = Roofline(target)
        self.environment = "|".join(f"{k}={v}" for k, v in sorted(target.environment.items()))
        self.measures = is_here(target)
        self.measured = 0
        self.asked: set[str] = set()
        self.unmeasured: set[str] = set()  # of these: without a price of their own

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        if not measurable(ctx):
            return self.roofline.price(ctx, candidates)
        keys = [self.key(ctx, c) for c in candidates]
        self.asked.update(keys)
        known = self.store.get_many(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing and self.measures and time.perf_counter() < self.deadline:
            known |= self._measured(ctx, candidates, keys, known, missing)
        return [self._priced(ctx, c, key, known.get(key)) for c, key in zip(candidates, keys, strict=True)]

    def _measured(
        self, ctx: SelectionContext, candidates: Sequence[Candidate], keys: Sequence[str], known: Mapping[str, Timing],
        missing: Sequence[int],
    ) -> dict[str, Timing]:  # fmt: skip
        """Timings of the missing ones, as if they had been taken with the region's known ones."""
        anchor = _anchor(ctx, candidates, [known.get(key) for key in keys])
        asked, patience_s = [*anchor, *missing], PACE.patience_s
        self._set_up([candidates[i] for i in missing])
        try:
            found = measure(ctx, [candidates[i] for i in asked], self.deadline)
        except DeviceLostError as lost:
            i = asked[lost.index]
            self.store.put_many([Timing(keys[i], candidates[i].kernel, None, 0, 0, lost.error, 0.0, ctx.region.op)])
            raise
        self.deadline += patience_s - PACE.patience_s  # waiting for the CPU takes no region's turn
        timings = {
            i: Timing(
                key=keys[i], kernel=candidates[i].kernel, ns=m.ns, spread=m.spread,
                samples=m.samples, error=m.error, epsilon=m.epsilon, detail=ctx.region.op,
            )
            for i, m in ((asked[j], m) for j, m in found.items())
        }  # fmt: skip
        fresh = [timings[i] for i in missing if i in timings]
        for then, now in [(known[keys[i]].ns, timings[i].ns) for i in anchor if i in timings]:
            if then and now:
                fresh = [_scaled(t, then / now) for t in fresh]
        lasting = [t for t in fresh if is_fact(t.error)]
        self.measured += len(lasting)
        self.store.put_many(lasting)
        return {t.key: t for t in fresh}

    def _set_up(self, candidates: Sequence[Candidate]) -> None:
        """What is compiled once for a machine takes no region's turn: half a minute, for the attention in C++."""
        start = time.perf_counter()
        for setup in [backends.kernel(c.kernel).setup for c in candidates]:
            if setup is not None:
                with suppress(*torch_private.kernel_errors()):  # raised again where the kernel is tried, which says of which
                    setup()
        self.deadline += time.perf_counter() - start

    def key(self, ctx: SelectionContext, candidate: Candidate) -> str:
        """Under which the store has the kernel's timing."""
        return signature(ctx, candidate, self.environment, backends.version_of(candidate.kernel))

    def _priced(self, ctx: SelectionContext, candidate: Candidate, key: str, timing: Timing | None) -> Priced:
        if timing is None:
            self.unmeasured.add(key)
            if candidate.as_is:  # the graph as it stands must always have a price
                return candidate, self.roofline.cost(ctx, candidate)
            why = "the measuring budget was spent before its turn" if self.measures else "no stored timing, and the target is not here"
            return Rejection(candidate.kernel, "not_measured", why)
        if timing.ns is None and candidate.as_is:
            return candidate, self.roofline.cost(ctx, candidate)
        if timing.ns is None:
            return failed(candidate, timing.error)
        extra = traffic_ns(self.target, candidate.param("traffic", 0))
        ns = max(timing.ns, self.target.least_ns)
        return replace(candidate, key=key, epsilon=timing.epsilon), Cost(ns + extra, "measured", timing.spread)
