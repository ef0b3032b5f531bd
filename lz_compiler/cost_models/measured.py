"""Measured prices: what the timings store knows, and a measurement (within the budget) of what it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from .. import backends
from ..backends.base import SelectionContext
from ..errors import DeviceLostError
from ..measure import UNJUDGED, is_fact, measurable, measure, signature
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
            try:
                found = measure(ctx, [candidates[i] for i in missing], self.deadline)
            except DeviceLostError as lost:
                i = missing[lost.index]
                self.store.put_many([Timing(keys[i], candidates[i].kernel, None, 0, 0, lost.error, 0.0, ctx.region.op)])
                raise
            fresh = [
                Timing(
                    key=keys[missing[j]], kernel=candidates[missing[j]].kernel, ns=m.ns, spread=m.spread,
                    samples=m.samples, error=m.error, epsilon=m.epsilon, detail=ctx.region.op,
                )
                for j, m in found.items()
            ]  # fmt: skip
            known |= {t.key: t for t in fresh}
            fresh = [t for t in fresh if is_fact(t.error)]
            self.measured += len(fresh)
            self.store.put_many(fresh)
        return [self._priced(ctx, c, key, known.get(key)) for c, key in zip(candidates, keys, strict=True)]

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
