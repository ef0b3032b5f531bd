"""Estimated prices, and a measurement only while not measuring is expected to cost more than a tolerance.

Kernels have learned prices, or the roofline's where the learned model abstains; a Gaussian process (gaussian.py) says how far off they may
be, and learns from every measurement. In worlds drawn from it the plan is compared with rivals: the mean of what the best of them
saves is the plan's expected regret, the value of knowing everything (Raiffa and Schlaifer, Applied statistical decision theory, 1961; as
a rule of when to stop sampling: Chick and Inoue, Operations Research 2001). While it is more than the tolerance, that kernel is measured
which tells most about the difference between the plan and the rival that saves most in the mean; what both use cancels out.

Rivals are the best plans of drawn worlds (Thompson, Biometrika 1933) and of the optimistic one, and are kept from step to step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backends.base import SelectionContext
from ..types import Candidate, Cost, Problem, Rejection, Solution
from . import CostModel, Priced
from .features import Features, features
from .gaussian import Array, Posterior, prior
from .learned import Estimate, Learned
from .roofline import assumed_error

log = logging.getLogger(__name__)

TOLERANCE = 0.02  # of the plan's price, as expected regret
WORLDS = 64  # in which plans are compared
DRAWS = 2  # of them are solved for rivals whenever the known rivals leave nothing to measure
AT_ONCE = 50  # one of so many kernels, and one more, is measured before the next plan
NINETY = 1.645  # standard deviations are the half-width of a 90 % interval
SURE = 0.01  # no estimate has less of a standard deviation

Solve = Callable[[Problem], Solution]


@dataclass(frozen=True, slots=True)
class Guess:
    """`deviation`: of the logarithm of `ns`, which is the kernel alone; `traffic`: ns that using it costs elsewhere."""

    ctx: SelectionContext
    candidate: Candidate
    found: Features
    ns: float
    deviation: float
    traffic: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What it costs: `fixed` ns, and each kernel's price times `uses`."""

    uses: Array
    fixed: float


class Belief:
    """Prices of all kernels asked for, by key: an answer where there is one, else what the Gaussian process expects."""

    def __init__(self, guesses: dict[str, Guess], answers: dict[str, Priced], least: int) -> None:
        self.keys, self.guesses, self.least = list(guesses), list(guesses.values()), least
        self.index = {key: i for i, key in enumerate(self.keys)}
        self.log_ns = np.log([g.ns for g in self.guesses])
        self.traffic = np.array([g.traffic for g in self.guesses], dtype=np.float64)
        self.posterior: Posterior = prior([g.found for g in self.guesses], [g.deviation for g in self.guesses])
        self.normal = np.random.default_rng(0).standard_normal((WORLDS, len(self.keys)))
        self.exact = np.full(len(self.keys), np.nan)
        for key, answer in answers.items():
            self.learn(self.index[key], answer)

    def learn(self, i: int, answer: Priced) -> None:
        if isinstance(answer, Rejection):
            self.exact[i] = 0.0  # no plan uses it
            return
        self.exact[i] = answer[1].ns
        if answer[1].source == "measured":
            own = max(1.0, answer[1].ns - self.traffic[i])
            self.posterior.observe(i, math.log(own) - self.log_ns[i])

    def expected(self) -> Array:
        return self._prices(self.posterior.mean + self.posterior.variance() / 2)  # the mean of a log-normal

    def optimistic(self) -> Array:
        """All unmeasured kernels one standard deviation below their medians."""
        return self._prices(self.posterior.mean - np.sqrt(self.posterior.variance()))

    def pessimistic(self) -> Array:
        """All unmeasured kernels two standard deviations above their medians."""
        return self._prices(self.posterior.mean + 2 * np.sqrt(self.posterior.variance()))

    def worlds(self) -> Array:
        open_ = np.flatnonzero(np.isnan(self.exact))
        drawn = np.zeros((WORLDS, len(self.keys)))
        drawn[:, open_] = self.posterior.draw(open_, self.normal)
        return self._prices(drawn)

    def _prices(self, residual: Array) -> Array:
        ns = np.maximum(np.exp(self.log_ns + residual), self.least) + self.traffic
        return np.where(np.isnan(self.exact), np.maximum(np.round(ns), 1.0), self.exact)

    def telling(self, difference: Array) -> Array:
        """By how much (a standard deviation, in ns) a measurement of each kernel would move a difference between two plans."""
        slope = np.where(np.isnan(self.exact), difference * (self.expected() - self.traffic), 0.0)
        moved = np.abs(self.posterior.covariance @ slope) / np.sqrt(self.posterior.variance())
        return np.where(np.isnan(self.exact) & (difference != 0), moved, 0.0)


class Hybrid:
    """`known` tells stored prices (or rejects as `not_measured`), `exact` measures. `measured` counts the kernels measured to
    decide, `checked` those measured because the plan uses them."""

    def __init__(self, learned: Learned, known: CostModel, exact: CostModel, identify: Callable[[SelectionContext, Candidate], str],
                 tolerance: float = TOLERANCE) -> None:  # fmt: skip
        self.learned, self.known, self.exact, self.identify = learned, known, exact, identify
        self.tolerance = tolerance
        self.measured = self.checked = 0
        self.least = learned.target.least_ns
        self._guesses: dict[str, Guess] = {}
        self._answers: dict[str, Priced] = {}

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        answers = self.known.price(ctx, candidates)
        return [self._guessed(ctx, c, a) for c, a in zip(candidates, answers, strict=True)]

    def _guessed(self, ctx: SelectionContext, candidate: Candidate, answer: Priced) -> Priced:
        key = self.identify(ctx, candidate)
        if isinstance(answer, Rejection) and answer.code != "not_measured":
            return answer
        guess = self._guesses.setdefault(key, self._guess(ctx, candidate, self.learned.estimate(ctx, candidate)))
        if not isinstance(answer, Rejection) and answer[1].source == "measured":
            self._answers[key] = answer
        if key in self._answers:
            return self._answers[key]
        return replace(assumed_error(candidate, ctx), key=key), Cost(max(1, round(guess.ns)) + guess.traffic, "learned")

    def _guess(self, ctx: SelectionContext, candidate: Candidate, estimate: Estimate) -> Guess:
        deviation = 1.0 if estimate.why else max(math.log(estimate.high / estimate.ns) / NINETY, SURE)
        found = features(ctx, candidate, self.learned.target)
        return Guess(ctx, candidate, found, estimate.ns, deviation, self.learned.traffic(candidate))

    def refine(self, problem: Problem, solve: Solve) -> tuple[Problem, Solution]:
        """Measure until the plan's expected regret is within the tolerance.

        What the plan then uses unmeasured is measured too, since a measurement is also the numerical check; the plan may
        change by it, and then it is asked again. Solving takes longer than measuring, so that several kernels are measured at a time.
        """
        belief = Belief(self._guesses, self._answers, self.least)
        problem, rivals = self._priced(problem, belief), list[Plan]()
        while True:
            solution = solve(problem)
            todo = self._worth(problem, solution, belief, rivals, solve)
            self.measured += len(todo)
            if not todo:
                todo = self._unchecked(problem, solution, belief)
                self.checked += len(todo)
            if not todo:
                log.info("%d kernels measured to decide, %d to check", self.measured, self.checked)
                return problem, solution
            changed = [i for i in todo if self._measure(belief, i)]
            rivals[:] = [plan for plan in rivals if not plan.uses[changed].any()]  # they may not be plans any more
            problem = self._priced(problem, belief)

    def _worth(self, problem: Problem, solution: Solution, belief: Belief, rivals: list[Plan], solve: Solve) -> list[int]:
        """The kernels to measure next: none if the plan's expected regret is within the tolerance."""
        worlds, plan = belief.worlds(), _plan(problem, solution, belief)
        rivals.append(plan)
        more = self._more(problem, belief, worlds, solve)
        while True:
            costs = worlds @ np.array([rival.uses for rival in rivals]).T + np.array([rival.fixed for rival in rivals])
            saved = np.maximum((worlds @ plan.uses + plan.fixed)[:, None] - costs, 0.0)
            if saved.max(1).mean() > self.tolerance * solution.objective:
                telling = belief.telling(plan.uses - rivals[int(saved.mean(0).argmax())].uses)
                if telling.any():
                    most = np.argsort(-telling, kind="stable")[: 1 + len(belief.keys) // AT_ONCE]
                    return [int(i) for i in most if telling[i]]
            rival = next(more, None)
            if rival is None:
                return []
            rivals.append(rival)

    def _more(self, problem: Problem, belief: Belief, worlds: Array, solve: Solve) -> Iterator[Plan]:
        for prices in (belief.optimistic(), *worlds[:DRAWS]):
            yield _plan(problem, solve(_with(problem, belief, prices)), belief)

    def _unchecked(self, problem: Problem, solution: Solution, belief: Belief) -> list[int]:
        """What the plan uses unmeasured. The graph as it stands needs no check, but where its price may be more than the tolerance
        it must be known: of a kernel that is far from its estimate no other measurement may tell."""
        needed = [problem.candidates[k] for k in solution.chosen]
        unsure = {belief.index[c.key] for c in needed if c.key in belief.index and np.isnan(belief.exact[belief.index[c.key]])}
        at_most = belief.pessimistic() * _plan(problem, solution, belief).uses
        free = {belief.index[c.key] for c in needed if c.key in belief.index and c.as_is}
        return sorted(i for i in unsure if i not in free or at_most[i] > self.tolerance * solution.objective)

    def _measure(self, belief: Belief, i: int) -> bool:
        """Whether the kernel's error is another than was assumed."""
        guess, key = belief.guesses[i], belief.keys[i]
        (answer,) = self.exact.price(guess.ctx, [guess.candidate])
        self._answers[key] = answer
        belief.learn(i, answer)
        return isinstance(answer, Rejection) or answer[0].epsilon != assumed_error(guess.candidate, guess.ctx).epsilon

    def _priced(self, problem: Problem, belief: Belief) -> Problem:
        """With all answers, and what is expected of the rest. The same object if nothing changes."""
        candidates, costs = list(problem.candidates), list(_with(problem, belief, belief.expected()).costs)
        for i, c in enumerate(candidates):
            answer = self._answers.get(c.key)
            if isinstance(answer, Rejection):
                candidates[i] = replace(c, epsilon=math.inf)  # no budget allows it: solvers leave it out, with its class
            elif answer is not None:
                candidates[i] = replace(c, epsilon=answer[0].epsilon)
                costs[i] = replace(answer[1], factor=costs[i].factor)
        new = replace(problem, candidates=tuple(candidates), costs=tuple(costs))
        return problem if new == problem else new


def _with(problem: Problem, belief: Belief, prices: Array) -> Problem:
    costs = list(problem.costs)
    for k, c in enumerate(problem.candidates):
        if c.key in belief.index:
            costs[k] = replace(costs[k], ns=int(prices[belief.index[c.key]]))
    return replace(problem, costs=tuple(costs))


def _plan(problem: Problem, solution: Solution, belief: Belief) -> Plan:
    uses, fixed = np.zeros(len(belief.keys)), float(sum(problem.conversion_costs[c].weighed for c in solution.converted))
    for k in solution.chosen:
        i = belief.index.get(problem.candidates[k].key)
        if i is None:
            fixed += problem.costs[k].weighed
        else:
            uses[i] += problem.costs[k].factor
    return Plan(uses, fixed)
