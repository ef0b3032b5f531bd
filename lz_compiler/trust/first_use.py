"""Kernels that nobody has tried are tried before a plan uses them, whichever cost model chose them.

A kernel is proven where the store has its measurement (it is also the numeric check), where its capability passed the canary, or
by a check here, which is a record of kind `checked` under the measurement's key. In a graph of varying sizes it is checked at a few
others of each symbol's range as well, and neither the canary nor the example's measurement stands for these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .. import backends, torch_private
from ..backends.base import SelectionContext
from ..backends.third_party import ThirdParty
from ..capture import GraphView
from ..cost_models.measured import failed
from ..errors import DeviceLostError
from ..measure import checked, is_fact, measurable, signature
from ..options import Options
from ..patterns import Recogniser
from ..target import is_here
from ..timings import Timing, TimingStore
from ..types import Candidate, Rejection, Target
from .verdicts import Trust

log = logging.getLogger(__name__)

CHECKED = "checked"
LARGER = 2  # times the example's size: what is checked beside the lowest size and an odd one

Chosen = Mapping[int, tuple[SelectionContext, Candidate]]


class FirstUse:
    """The checks of one graph on one target; `checked` counts what was run."""

    def __init__(self, view: GraphView, options: Options, target: Target, store: TimingStore, trust: Trust) -> None:
        self.view, self.options, self.store, self.trust = view, options, store, trust
        self.here = is_here(target)
        self.environment = "|".join(f"{k}={v}" for k, v in sorted(target.environment.items()))
        self.checked = 0
        self._known: dict[str, str | None] = {}  # by key: what is wrong, or None
        self._others: list[dict[tuple[str, ...], list[SelectionContext]]] | None = None

    def refused(self, chosen: Chosen) -> dict[int, Rejection]:
        """Which of these candidates may not be used, and why. The graph as it stands must run at all, so it is not asked."""
        found: dict[int, Rejection] = {}
        for index, (ctx, candidate) in chosen.items() if self.here else ():
            if candidate.as_is:
                continue
            why = None if self.trust.passed(ctx, candidate) else self._fault(ctx, candidate)
            for other in () if why else self._elsewhere(ctx):
                params = tuple(sorted({**dict(candidate.params), **other.params}.items()))
                why = self._fault(other, replace(candidate, params=params))
                if why is not None:
                    break
            if why is not None:
                found[index] = failed(candidate, why)
        return found

    def _fault(self, ctx: SelectionContext, candidate: Candidate) -> str | None:
        own = not isinstance(backends.all_backends()[backends.owners()[candidate.kernel]], ThirdParty)
        if not measurable(ctx) or (own and backends.kernel(candidate.kernel).compiled):
            return None  # what TorchInductor makes is compiled for each check: seconds for each kernel
        key = signature(ctx, candidate, self.environment, backends.version_of(candidate.kernel))
        if key not in self._known:
            timing = self.store.get(key)
            passed = timing.error is None if timing is not None else self.store.get_record(CHECKED, key) is not None
            self._known[key] = timing.error if timing is not None else None if passed else self._run(ctx, candidate, key)
        return self._known[key]

    def _run(self, ctx: SelectionContext, candidate: Candidate, key: str) -> str | None:
        self.checked += 1
        try:
            error = checked(ctx, candidate).error
        except DeviceLostError as lost:
            self.store.put(Timing(key, candidate.kernel, None, 0, 0, lost.error, 0.0, ctx.region.op))
            raise
        if error is None:
            self.store.put_record(CHECKED, key, {})
        elif is_fact(error):
            self.store.put(Timing(key, candidate.kernel, None, 0, 0, error, 0.0, ctx.region.op))
        return error

    def _elsewhere(self, ctx: SelectionContext) -> Iterator[SelectionContext]:
        """The region at other sizes, where these change what it reads."""
        if self._others is None:
            self._others = list(self._at_other_sizes())
        for known in self._others:
            for other in known.get(ctx.region.nodes, ()):
                if other.roles == ctx.roles and other.region == ctx.region and other.specs != ctx.specs:
                    yield other

    def _at_other_sizes(self) -> Iterator[dict[tuple[str, ...], list[SelectionContext]]]:
        symbols = torch_private.symbols_of(n.meta.get("val") for n in self.view.graph.nodes if n.op == "placeholder")
        values = [size for size, _, _ in symbols.values()]
        for symbol, (size, low, high) in symbols.items():
            hint = torch_private.hint(size)
            odd = next(n for n in ((hint + 1) | 1, ((low + hint) // 2) | 1, low) if n <= high)
            for n in dict.fromkeys((low, odd, min(high, LARGER * hint))):
                if n == hint or not torch_private.permitted(values, **{symbol: n}):
                    continue
                found: dict[tuple[str, ...], list[SelectionContext]] = {}
                with torch_private.hints_at(values, **{symbol: n}):
                    for ctx in Recogniser(GraphView(self.view.graph, self.view.frozen), self.options).regions():
                        found.setdefault(ctx.region.nodes, []).append(ctx)
                yield found
