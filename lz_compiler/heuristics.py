"""Baselines that look at more than one op, or at no price at all: what the integer program is compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from .cost_models.constant import rank
from .solvers import Instance, node_order, pose, sweep, swept

SOLVERS = ("lp_rounding", "one_layout", "priority")


def solve(inst: Instance, rows: Iterable[Any], solver: str) -> tuple[set[int] | None, int]:
    """The decisions used (None if the heuristic finds no plan), and a lower bound on the objective in ns."""
    if solver == "lp_rounding":
        return lp_rounding(inst, rows)
    return (one_layout(inst) if solver == "one_layout" else priority(inst)), 0


def lp_rounding(inst: Instance, rows: Iterable[Any]) -> tuple[set[int] | None, int]:
    """Solve with fractions allowed; then node by node the candidate of the largest fraction, and what conversions that takes.

    The fractional optimum is a lower bound of every plan.
    """
    from ortools.math_opt.python import mathopt

    model: Any = mathopt.Model()
    xs = [model.add_variable(lb=0.0, ub=1.0) for _ in inst.cost]
    pose(model, xs, inst.cost, rows)
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if not result.has_primal_feasible_solution():
        return None, 0
    values = result.variable_values(xs)
    used = swept(inst, [-round(value, 6) for value in values])
    return used, max(0, math.ceil(result.objective_value() - max(1e-4, 1e-9 * result.objective_value())))


def one_layout(inst: Instance) -> set[int] | None:
    """The cheaper of two plans that never mix the layouts of images: all as eager has them, or all channels last."""
    plans = []
    for banned in ("channels_last", "strided"):
        mixed = [any(_is_image(inst, d) and banned in f for f in _layouts(inst, d)) for d in range(inst.nx)]
        plans.append(swept(inst, [math.inf if m else 0.0 for m in mixed]))
    return min((p for p in plans if p is not None), key=inst.objective, default=None)


def _layouts(inst: Instance, d: int) -> set[str]:
    """Of what a candidate reads and writes; a fused loop over eager's layout counts as strided."""
    k = inst.problem.candidates[inst.members[d][0]]
    formats = (k.in_formats[0], *k.out_formats) if k.in_formats else k.out_formats
    return {"strided" if f.layout == "fused" else f.layout for f in formats}


def _is_image(inst: Instance, d: int) -> bool:
    return inst.problem.candidates[inst.members[d][0]].region.op == "conv"


def priority(inst: Instance) -> set[int] | None:
    """The first library of a fixed order that can, whatever it costs (see `cost_models.constant`)."""
    return swept(inst, [float(rank(inst.problem.candidates[inst.members[d][0]].kernel)) for d in range(inst.nx)])


def local_search(inst: Instance, start: set[int], value: Callable[[set[int]], float], deadline: float) -> set[int]:
    """Hill climbing: force one decision into the plan, repair it by a sweep that keeps all others where it can, keep what is better.

    Moves are tried from the most promising price on, and a better plan is gone on from at once (first improvement). `value`: what a
    plan costs, in any unit. It is asked once for each plan, `start` first. Ends where no move is better, or on the deadline.
    """
    best, least, seen, order = start, value(start), {frozenset(start)}, node_order(inst)
    spots = [{n for k in inst.members[d] for n in inst.nodes[k]} for d in range(inst.nx)]

    def replaced(d: int) -> set[int]:
        return {e for e in best if e < inst.nx and not spots[e].isdisjoint(spots[d])}

    improved = True
    while improved:
        improved = False
        gains = {d: inst.objective(replaced(d)) - inst.cost[d] for d in range(inst.nx) if d not in best}
        for d in sorted(gains, key=lambda d: (-gains[d], d)):
            if time.perf_counter() > deadline:
                return best
            kept = (best - replaced(d)) | {d}
            plan = sweep(inst, False, [0.0 if e in kept else 1.0 for e in range(inst.nx)], order)
            if plan is None or frozenset(plan) in seen:
                continue
            seen.add(frozenset(plan))
            cost = value(plan)
            if cost < least:
                best, least, improved = plan, cost, True
    return best
