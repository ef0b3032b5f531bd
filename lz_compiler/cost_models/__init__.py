"""Prices of candidates and conversions. A cost model is a function from what is asked to a Cost, or to a Rejection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol

from ..backends.base import SelectionContext
from ..errors import OptionError, unknown
from ..timings import TimingStore
from ..types import Candidate, Cost, Rejection, Target

Priced = tuple[Candidate, Cost] | Rejection


class CostModel(Protocol):
    """Prices the candidates of one region together (they may be measured against each other)."""

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]: ...


def cost_model(name: str, target: Target, store: TimingStore, budget_s: float) -> CostModel:
    """`measured`, `roofline`, or one registered under the entry points `lz_compiler.cost_models`."""
    from .measured import Measured
    from .roofline import Roofline

    known: dict[str, Callable[[Target, TimingStore, float], CostModel]] = {
        "measured": Measured,
        "roofline": lambda target, store, budget_s: Roofline(target),
    }
    for entry in entry_points(group="lz_compiler.cost_models"):
        known[entry.name] = entry.load()
    if name not in known:
        raise OptionError(unknown("cost_model", name, known))
    return known[name](target, store, budget_s)
