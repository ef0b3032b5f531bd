"""Learned prices, and a measurement only where their uncertainty could change the decision.

Every unmeasured kernel has an interval. A plan's worst regret is what it could lose to any other plan: its own kernels at their
upper ends, all others at their lower ends (Kouvelis and Yu, Robust discrete optimization, 1997: for a fixed plan this is the
worst scenario, and finding it is one more solve). While that is more than the tolerance, the kernels in which the plan and its
worst rival differ are measured, and the plan is solved again; what both use cannot change the decision, and is left alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..backends.base import SelectionContext
from ..types import Candidate, Cost, Problem, Rejection, Solution
from . import CostModel, Priced
from .learned import Estimate, Learned
from .roofline import assumed_error

log = logging.getLogger(__name__)

TOLERANCE = 0.01  # of the plan's price
CAUTION = 0.3  # of an interval's half-width counts: the errors of many kernels do not all lie at their ends together
WIDEST = 0.5  # of the kernels that a plan and its rival differ in, this part (the most uncertain) is measured at once
ABSTAINED = 20.0  # how far above the roofline an unknown kernel may be

Solve = Callable[[Problem], Solution]


class Hybrid:
    """`known` tells stored prices (or rejects as `not_measured`), `exact` measures. `measured` counts the kernels measured to
    decide, `checked` those measured because the plan uses them."""

    def __init__(self, learned: Learned, known: CostModel, exact: CostModel, identify: Callable[[SelectionContext, Candidate], str],
                 tolerance: float = TOLERANCE, caution: float = CAUTION, checks: bool = True) -> None:  # fmt: skip
        self.learned, self.known, self.exact, self.identify = learned, known, exact, identify
        self.tolerance, self.caution, self.checks = tolerance, caution, checks
        self.measured = self.checked = 0
        self._open: dict[str, tuple[SelectionContext, Candidate, int, int]] = {}  # by key: interval's ends in ns, traffic included
        self._failed: dict[str, Rejection] = {}

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        answers = self.known.price(ctx, candidates)
        return [self._guessed(ctx, c) if _is_open(a) else a for c, a in zip(candidates, answers, strict=True)]

    def _guessed(self, ctx: SelectionContext, candidate: Candidate) -> Priced:
        key = self.identify(ctx, candidate)
        if key in self._failed:
            return self._failed[key]
        guess = self.learned.estimate(ctx, candidate)
        if guess.why:
            guess = Estimate(guess.ns * math.sqrt(ABSTAINED), guess.ns, guess.ns * ABSTAINED)
        else:
            guess = Estimate(
                guess.ns, guess.ns * (guess.low / guess.ns) ** self.caution, guess.ns * (guess.high / guess.ns) ** self.caution
            )
        extra = self.learned.traffic(candidate)
        low, middle, high = (max(1, round(v)) + extra for v in (guess.low, guess.ns, guess.high))
        self._open[key] = ctx, candidate, low, high
        return replace(assumed_error(candidate, ctx), key=key), Cost(middle, "learned", high - low)

    def refine(self, problem: Problem, solve: Solve) -> tuple[Problem, Solution]:
        """Measure until no unmeasured price can make another plan better by more than the tolerance.

        What the plan then uses unmeasured is measured too if `checks`, since a measurement is also the numerical check.
        """
        while True:
            problem, solution = self._decide(problem, solve)
            unchecked = {problem.candidates[k].key for k in solution.chosen if not dict(problem.candidates[k].params).get("as_is")}
            todo = sorted(unchecked & self._open.keys()) if self.checks else []
            log.info("%d kernels measured to decide, %d to check", self.measured, self.checked)
            if not todo:
                return problem, solution
            self.checked += len(todo)
            for key in todo:
                problem = self._measure(problem, key)

    def _decide(self, problem: Problem, solve: Solve) -> tuple[Problem, Solution]:
        solution = solve(problem)
        while True:
            rival, lost = self._worst(problem, solution, solve)
            if lost <= self.tolerance * solution.objective:
                return problem, solution
            differ = {problem.candidates[k].key for k in set(solution.chosen) ^ set(rival.chosen)}
            todo = sorted((key for key in differ if key in self._open), key=lambda key: self._stake(problem, key), reverse=True)
            if not todo:  # a solver that proves no optimum may have missed the rival: nothing to measure decides between them
                return problem, rival
            todo = todo[: math.ceil(WIDEST * len(todo))]
            self.measured += len(todo)
            for key in todo:
                problem = self._measure(problem, key)
            solution = solve(problem)

    def _worst(self, problem: Problem, solution: Solution, solve: Solve) -> tuple[Solution, int]:
        """The plan that could beat this one by most, and by how much, in ns."""
        chosen = {problem.candidates[k].key for k in solution.chosen}
        costs = []
        for candidate, cost in zip(problem.candidates, problem.costs, strict=True):
            if candidate.key in self._open:
                _, _, low, high = self._open[candidate.key]
                cost = replace(cost, ns=high if candidate.key in chosen else low)
            costs.append(cost)
        worst = replace(problem, costs=tuple(costs))
        rival = solve(worst)
        own = sum(costs[k].weighed for k in solution.chosen) + sum(problem.conversion_costs[c].weighed for c in solution.converted)
        return rival, own - rival.objective

    def _stake(self, problem: Problem, key: str) -> int:
        """Width of the interval, over all places where the kernel stands."""
        _, _, low, high = self._open[key]
        return (high - low) * sum(c.key == key for c in problem.candidates)

    def _measure(self, problem: Problem, key: str) -> Problem:
        ctx, candidate, _, _ = self._open.pop(key)
        (answer,) = self.exact.price(ctx, [candidate])
        candidates, costs = list(problem.candidates), list(problem.costs)
        for i, c in enumerate(candidates):
            if c.key == key and isinstance(answer, Rejection):
                self._failed[key] = answer
                candidates[i] = replace(c, epsilon=math.inf)  # no budget allows it: solvers leave it out, with its class
            elif c.key == key and not isinstance(answer, Rejection):
                candidates[i] = replace(c, epsilon=answer[0].epsilon)
                costs[i] = replace(answer[1], factor=costs[i].factor)
        return replace(problem, candidates=tuple(candidates), costs=tuple(costs))


def _is_open(answer: Priced) -> bool:
    """Neither a stored price nor a stored failure."""
    if isinstance(answer, Rejection):
        return answer.code == "not_measured"
    return answer[1].source != "measured"
