"""Prices of candidates and conversions. A cost model is a function from what is asked to a Cost, or to a Rejection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from ..backends.base import SelectionContext
from ..errors import OptionError, unknown
from ..timings import TimingStore
from ..types import Candidate, Cost, Problem, Rejection, Solution, Target

Priced = tuple[Candidate, Cost] | Rejection


class CostModel(Protocol):
    """Prices the candidates of one region together (they may be measured against each other)."""

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]: ...


@runtime_checkable
class RefiningCostModel(CostModel, Protocol):
    """One that improves its prices once it sees the whole problem."""

    def refine(self, problem: Problem, solve: Callable[[Problem], Solution]) -> tuple[Problem, Solution]:
        """The problem with the prices that count, and its solution."""


def cost_model(name: str | CostModel, target: Target, store: TimingStore, budget_s: float) -> CostModel:
    """A model by name (the ones here, or registered under the entry points `lz_compiler.cost_models`); an object is one itself."""
    if not isinstance(name, str):
        return name
    from .constant import Constant
    from .hybrid import Hybrid
    from .inductor import Inductor
    from .learned import Learned
    from .measured import Measured
    from .roofline import Roofline

    def hybrid(target: Target, store: TimingStore, budget_s: float) -> CostModel:
        exact = Measured(target, store, budget_s)
        return Hybrid(Learned(target), Measured(target, store, 0.0), exact, exact.key)

    known: dict[str, Callable[[Target, TimingStore, float], CostModel]] = {
        "measured": Measured,
        "roofline": lambda target, store, budget_s: Roofline(target),
        "inductor": lambda target, store, budget_s: Inductor(target),
        "constant": lambda target, store, budget_s: Constant(target),
        "learned": lambda target, store, budget_s: Learned(target),
        "hybrid": hybrid,
    }
    if name in known:
        return known[name](target, store, budget_s)
    registered = entry_points(group="lz_compiler.cost_models")
    if name not in registered.names:
        raise OptionError(unknown("cost_model", name, [*known, *registered.names]))
    entry = registered[name]
    try:
        made = entry.load()(target, store, budget_s)
    except (Exception, SystemExit) as error:  # it is foreign code, and may raise anything
        raise OptionError(
            f"cost_model {name!r}: {entry.value} raises {type(error).__name__}: {error}. Repair its package, or use another."
        ) from error
    if not callable(getattr(made, "price", None)):
        raise OptionError(f"cost_model {name!r}: {entry.value} makes a {type(made).__name__} without `price`: it is no cost model.")
    return made  # type: ignore[no-any-return]
