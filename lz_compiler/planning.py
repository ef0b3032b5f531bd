"""One graph to one Plan: recognise, enumerate, price, solve, check."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from . import planner, torch_private
from .capture import GraphView
from .cost_models import cost_model
from .cost_models.roofline import Roofline
from .errors import SolverError
from .options import Options
from .problem import CALL, LOOP, VIEW, Enumeration, add_defaults, build, enumerate_regions
from .timings import TimingStore
from .types import Candidate, Choice, Cost, Plan, Problem, Rejection, Solution, Target

log = logging.getLogger(__name__)

# Rounding errors of kernels are independent, so they add in quadrature; and much of a network's error is added to a
# residual stream that dilutes it. The estimate is therefore optimistic on purpose: the whole plan's error is measured
# on the first real call, and that check, not the estimate, is what a user's error_budget rests on.
DILUTION = 0.5


def make_plan(view: GraphView, options: Options, target: Target, store: TimingStore, *, fingerprint: str, kind: str) -> Plan:
    """Plan one functional ATen graph (`kind`: inference, forward or backward) for a target."""
    start = time.perf_counter()
    model = cost_model(options.cost_model, target, store, options.measure_budget_s)
    found = enumerate_regions(view, options, model)
    priced = time.perf_counter()
    problem = pose(view, found, options, target)
    solution = solve_within(problem, options, problem.error_budget)
    seconds = time.perf_counter() - priced
    plan = _decode(problem, solution, found, options, fingerprint, kind, target, seconds)
    torch_private.counters()["plans"] += 1
    log.info(
        "%s graph: %d candidates, %d conversions, %s by %s, %.3f ms predicted, enumerated and priced in %.2f s, solved in %.2f s",
        kind, len(problem.candidates), len(problem.conversions), solution.status, solution.solver,
        solution.objective / 1e6, priced - start, seconds,
    )  # fmt: skip
    return plan


def pose(view: GraphView, found: Enumeration, options: Options, target: Target) -> Problem:
    """The integer program of priced candidates, with one for every node that no backend was asked about."""
    roofline = Roofline(target)
    add_defaults(view, found, roofline, lossy=options.error_budget > 0)
    return replace(build(view, found, options, roofline), error_budget=options.error_budget / DILUTION)


def solve_within(problem: Problem, options: Options, budget: float) -> Solution:
    """Solve, and check the result independently of the solver."""
    problem = replace(problem, error_budget=budget)
    solution = planner.solve(problem, options.solver, options.solve_budget_s)
    if not solution.chosen and problem.sinks:
        solution = planner.solve(problem, "cp_sat", options.solve_budget_s)
        if not solution.chosen and solution.status == "infeasible":
            if problem.candidate_class:  # repeated blocks that cannot all take the same decision
                return solve_within(replace(problem, candidate_class=(), tensor_class={}), options, budget)
            raise SolverError(f"no valid plan: {solution.status} with solver={options.solver!r} and with 'cp_sat'.")
    violations = planner.check(problem, solution)
    assert not violations, f"the solver's plan breaks the problem's rules: {violations[:5]}"
    return solution


def _decode(
    problem: Problem, solution: Solution, found: Enumeration, options: Options, fingerprint: str, kind: str,
    target: Target, seconds: float,
) -> Plan:  # fmt: skip
    chosen = [(problem.candidates[i], problem.costs[i]) for i in solution.chosen]
    overlapping: dict[str, list[tuple[Candidate, Cost]]] = {}
    for candidate, cost in zip(problem.candidates, problem.costs, strict=True):
        for node in candidate.region.nodes:
            overlapping.setdefault(node, []).append((candidate, cost))
    choices = []
    for candidate, cost in chosen:
        if candidate.kernel in (VIEW, CALL):
            continue
        others: tuple[tuple[Candidate, Cost], ...] = ()
        rejected: tuple[Rejection, ...] = ()
        if candidate.kernel != LOOP:
            others = tuple(_alternatives(candidate, overlapping))
            rejected = tuple(_rejections(candidate, found.rejections))
        choices.append(Choice(candidate, cost, others, rejected))
    epsilon = DILUTION * sum(c.epsilon**2 for c, _ in chosen) ** 0.5
    conversions = tuple((problem.conversions[i], problem.conversion_costs[i]) for i in solution.converted)
    return Plan(
        fingerprint=fingerprint, kind=kind, environment=dict(target.environment), choices=tuple(choices),
        conversions=conversions, objective=solution.objective, bound=solution.bound, status=solution.status,
        solver=solution.solver, epsilon=epsilon, plan_s=seconds,
    )  # fmt: skip


def _alternatives(candidate: Candidate, overlapping: Mapping[str, list[tuple[Candidate, Cost]]]) -> list[tuple[Candidate, Cost]]:
    """Other candidates for the same region, cheapest first; then those for other regions around its first node."""
    seen = {id(other): (other, cost) for node in candidate.region.nodes for other, cost in overlapping[node]}
    rivals = [(o, c) for o, c in seen.values() if o is not candidate and o.kernel not in (LOOP, VIEW, CALL)]
    return sorted(rivals, key=lambda oc: (set(oc[0].region.nodes) != set(candidate.region.nodes), oc[1].ns))[:8]


def _rejections(candidate: Candidate, rejections: Mapping[tuple[str, ...], list[Rejection]]) -> list[Rejection]:
    nodes = set(candidate.region.nodes)
    found = {r: None for region, reasons in rejections.items() if nodes & set(region) for r in reasons}
    return list(found)
