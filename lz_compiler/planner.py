"""The integer program that chooses kernels, formats and conversions for a whole graph, and the check of its answers.

Sets: candidates k, each covering the nodes S_k and reading and writing pairs (t, f) of a tensor and a format.

Variables, all 0 or 1:
    x_k     candidate k is used
    y_tfg   tensor t is converted from format f to g; paid once, shared by all readers
    a_tf    t is available in f; not stored, since it occurs only between the two sides of (2) and is substituted there
    p_tf    a source, or the sum of x_k over the k that write (t, f): produced; also substituted

(0) objective     minimise sum_k cost_k x_k + sum_tfg cost_tfg y_tfg                              `read` (solvers.py)
(1) cover         sum of x_k over the k with n in S_k <= 1, for each node n                       `_cover_rows`
(2) availability  x_k <= a_tf <= p_tf + sum_g y_tgf, for each (t, f) that k reads                 `_availability_rows`
(3) conversion    y_tfg <= p_tf: never from a merely converted format                             `_conversion_rows`
(4) sinks         1 <= p_tf + sum_g y_tgf, for each sink (t, f)                                   `_sink_rows`
(5) numerics      sum_k epsilon_k^2 x_k <= error_budget^2, for each part                          `_budget_rows`
(6) memory        x_k = 0 where workspace_k > memory_limit; likewise where epsilon_k > budget     `read` (solvers.py)
(7) order         sum of x_k over a cycle of n candidates <= n - 1                                `_cycle_cuts`
(8) ties          x_k = x_l, y_tfg = y_ufg inside a class: one variable, with the summed cost     `read` (solvers.py)

A node that no sink needs is not covered: need follows from (4), (2) and (3) alone. Selecting kernels by covering a
graph with convex candidates is Korch's formulation (arXiv 2406.09465); pricing formats by conversions goes back to PBQP
primitive selection (arXiv 1710.01079); one knapsack row for a quality budget is HAWQ-V3's (arXiv 2011.10680).

What makes it fast, none of which changes the optimum:
- (2) is written per *reader*: at most one candidate that covers a node is used, so all candidates that read (t, f)
  for one node share one row (the marginal form). With it goes a row without formats: who reads t needs a writer of t.
- A tensor with one reader is a flow: what comes into a format leaves it once, to the reader or into a conversion.
- Rows are written in shared variables, and equal rows are kept once: the rows of 32 tied layers are those of one.
- Cycles need candidates with several outputs and are rare, so (7) is added only where a solution has one. A cut counts,
  at each place of the cycle, all candidates that could stand there.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import heuristics, solvers
from .errors import OptionError, SolverError, unknown
from .solvers import WEIGHT_SCALE, Instance
from .types import Problem, Solution, Status

log = logging.getLogger(__name__)

SOLVERS = ("cp_sat", "highs", "greedy", "dynamic", "exhaustive", *heuristics.SOLVERS, "local_search")
REPAIR_S = 1.0  # at most this long for greedy to find any plan of single-node candidates when its sweeps fail

Row = tuple[tuple[tuple[int, int], ...], int]  # ((decision, coefficient), ...) <= bound


# --- the program, as rows ---------------------------------------------------------------------------------------------


class _Rows(dict[Row, None]):
    """An ordered set of rows `sum(plus) - sum(minus) <= bound`; a decision named twice counts twice."""

    def put(self, plus: Iterable[int], minus: Iterable[int], bound: int) -> None:
        terms = Counter(plus)
        terms.subtract(minus)
        if sum(c for c in terms.values() if c > 0) > bound:  # otherwise it always holds
            self[(tuple(sorted((d, c) for d, c in terms.items() if c)), bound)] = None


def _program(inst: Instance) -> _Rows:
    rows = _Rows()
    _cover_rows(inst, rows)
    _availability_rows(inst, rows)
    _conversion_rows(inst, rows)
    _sink_rows(inst, rows)
    _budget_rows(inst, rows)
    return rows


def _cover_rows(inst: Instance, rows: _Rows) -> None:
    """(1)"""
    for candidates in inst.covering:
        rows.put((inst.decision[k] for k in candidates), (), 1)


def _makers(inst: Instance, p: int) -> list[int]:
    return [inst.decision[k] for k in inst.makers[p]]


def _supply(inst: Instance, p: int) -> list[int]:
    """The right-hand side of (2) and (4) where the pair is not a source."""
    return _makers(inst, p) + [inst.conversion[c] for c in inst.into[p]]


def _readers(inst: Instance) -> list[list[list[int]]]:
    """For each tensor its readers: usable candidates in groups of which at most one is used, since they share a node.

    The node is the one that most readers of the tensor cover, which is the node that really reads it.
    """
    of_tensor: list[dict[int, None]] = [{} for _ in inst.pairs]
    for k, d in enumerate(inst.decision):
        if d >= 0:
            for p in inst.ins[k]:
                of_tensor[inst.tensor[p]][k] = None
    table = []
    for candidates in of_tensor:
        count = Counter(n for k in candidates for n in inst.nodes[k])
        groups: dict[int, list[int]] = {}
        for k in candidates:
            groups.setdefault(max(inst.nodes[k], key=lambda n: (count[n], -n)), []).append(k)
        table.append(list(groups.values()))
    return table


def _flows(inst: Instance, readers: list[list[list[int]]]) -> list[bool]:
    """Tensors whose conversions are a flow: one reader, in one format, and none tied to another tensor's conversion.

    A tied one can be there for the other tensor's sake. Any other that is not needed can be dropped, so that some
    optimum keeps the rows of a flow.
    """
    sinks = {inst.tensor[p] for p in inst.sinks}
    flows = []
    for t, groups in enumerate(readers):
        single = len(groups) == 1 and t not in sinks
        single = single and all(sum(inst.tensor[p] == t for p in inst.ins[k]) == 1 for k in groups[0])
        conversions = [c for p in inst.pairs[t] for c in inst.into[p]]
        flows.append(single and all(len(inst.members[inst.conversion[c]]) == 1 for c in conversions))
    return flows


def _outgoing(inst: Instance) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in inst.tensor]
    for c, p in enumerate(inst.src):
        out[p].append(inst.conversion[c])
    return out


def _availability_rows(inst: Instance, rows: _Rows) -> None:
    """(2), per reader, and the same summed over formats, where conversions cancel."""
    readers = _readers(inst)
    flows, outgoing = _flows(inst, readers), _outgoing(inst)
    for t, groups in enumerate(readers):
        anybody = {k: inst.decision[k] for p in inst.pairs[t] for k in inst.makers[p]}
        for group in groups:
            if inst.sources.isdisjoint(inst.pairs[t]):
                rows.put((inst.decision[k] for k in group), anybody.values(), 0)
            reads: dict[int, list[int]] = {p: [] for p in inst.pairs[t]} if flows[t] else {}
            for k in group:
                for p in inst.ins[k]:
                    if inst.tensor[p] == t:
                        reads.setdefault(p, []).append(inst.decision[k])
            for p, decisions in reads.items():
                leaves = outgoing[p] if flows[t] else []
                if flows[t] or p not in inst.sources:
                    rows.put(decisions + leaves, _supply(inst, p), int(p in inst.sources))


def _conversion_rows(inst: Instance, rows: _Rows) -> None:
    """(3)"""
    for c, p in enumerate(inst.src):
        if p not in inst.sources:
            rows.put((inst.conversion[c],), _makers(inst, p), 0)


def _sink_rows(inst: Instance, rows: _Rows) -> None:
    """(4)"""
    for p in inst.sinks:
        if p not in inst.sources:
            rows.put((), _supply(inst, p), -1)
            # Somebody has to write the tensor; conversions alone cannot.
            if inst.sources.isdisjoint(inst.pairs[inst.tensor[p]]):
                rows.put((), {inst.decision[k] for q in inst.pairs[inst.tensor[p]] for k in inst.makers[q]}, -1)


def _budget_rows(inst: Instance, rows: _Rows) -> None:
    """(5), in integers; see `WEIGHT_SCALE`."""
    for part in dict.fromkeys(inst.part):
        terms = tuple((d, w) for d, w in enumerate(inst.weight) if w and inst.part[d] == part)
        if sum(w for _, w in terms) > WEIGHT_SCALE:
            rows[(terms, WEIGHT_SCALE)] = None


def _cycle_cuts(inst: Instance, used: Iterable[int], rows: _Rows) -> None:
    """(7), one cut for each knot of candidates that wait for each other."""
    import networkx as nx

    graph = solvers.contracted(inst, used)
    if not solvers.is_cyclic(graph):
        return
    digraph = nx.DiGraph([(k, r) for k, targets in graph.items() for r in targets])
    for knot in nx.strongly_connected_components(digraph):
        if len(knot) > 1:
            ring = [(a, graph[a][b]) for a, b in nx.find_cycle(digraph.subgraph(sorted(knot)), min(knot))]
            plus: list[int] = []
            for i, (k, t) in enumerate(ring):
                plus += [inst.decision[j] for j in _alternatives(inst, k, ring[i - 1][1], t)]
            rows.put(plus, (), len(ring) - 1)


def _alternatives(inst: Instance, k: int, read: int, written: int) -> Sequence[int]:
    """Candidates that read and write the same two tensors as k and share one node, so that at most one is used."""
    alike = [
        [j for j in inst.covering[n]
         if any(inst.tensor[p] == read for p in inst.ins[j]) and any(inst.tensor[p] == written for p in inst.outs[j])]
        for n in inst.nodes[k]
    ]  # fmt: skip
    return max(alike, key=len, default=(k,))


# --- the two libraries that solve it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    status: Status  # FEASIBLE: stopped by the clock, with or without a solution
    used: frozenset[int] | None
    bound: float


Backend = Callable[[Sequence[int], Iterable[Row], float, frozenset[int]], _Answer]


def _cp_sat_model(costs: Sequence[int], rows: Iterable[Row], hint: frozenset[int]) -> tuple[Any, list[Any]]:
    """The rows, where `sum(plus) <= sum(minus)` becomes `either = sum(plus)` (exactly one, or not either) and a clause.

    The left sides of such rows exclude each other: candidates for one node, or the ways out of a format in a flow.
    Presolve splits the plain row into a clause per term, whose relaxation is so weak that a net of 300 nodes with three
    readers a tensor was not solved in 20 s (ortools 9.15, one core); in this form it takes 0.6 s.
    """
    from ortools.sat.python import cp_model

    model: Any = cp_model.CpModel()
    xs = [model.new_bool_var("") for _ in costs]
    either: dict[tuple[int, ...], Any] = {}
    for terms, bound in rows:
        plus, minus = tuple(d for d, c in terms if c > 0), [d for d, c in terms if c < 0]
        units = all(abs(c) == 1 for _, c in terms)
        if units and bound == 1 and not minus:
            model.add_at_most_one([xs[d] for d in plus])
        elif units and bound == 0 and len(plus) > 1:
            if plus not in either:
                either[plus] = model.new_bool_var("")
                model.add_exactly_one([either[plus].negated(), *(xs[d] for d in plus)])
            model.add_bool_or([either[plus].negated(), *(xs[d] for d in minus)])
        else:
            model.add(cp_model.LinearExpr.weighted_sum([xs[d] for d, _ in terms], [c for _, c in terms]) <= bound)
    if any(costs):
        model.minimize(cp_model.LinearExpr.weighted_sum(xs, list(costs)))
    if hint:
        for d, x in enumerate(xs):
            model.add_hint(x, d in hint)
        for plus, x in either.items():
            model.add_hint(x, not hint.isdisjoint(plus))
    return model, xs


def _cp_sat(costs: Sequence[int], rows: Iterable[Row], seconds: float, hint: frozenset[int]) -> _Answer:
    """One worker and a fixed seed: the same problem gives the same plan. More workers were not faster on chains."""
    from ortools.sat.python import cp_model

    model, xs = _cp_sat_model(costs, rows, hint)
    solver: Any = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    # Presolve of at most one in a knapsack cuts the optimum off (9.15, google/or-tools#5293); this skips that family of rules.
    solver.parameters.presolve_inclusion_work_limit = 0
    solver.parameters.max_time_in_seconds = seconds
    code = solver.solve(model)
    assert code != cp_model.MODEL_INVALID, model.validate()
    if code == cp_model.INFEASIBLE:
        return _Answer(Status.INFEASIBLE, None, 0.0)
    bound = solver.best_objective_bound if any(costs) else 0.0
    if code == cp_model.UNKNOWN:
        return _Answer(Status.FEASIBLE, None, bound)
    used = frozenset(d for d, x in enumerate(xs) if solver.boolean_value(x))
    return _Answer(Status.OPTIMAL if code == cp_model.OPTIMAL else Status.FEASIBLE, used, bound)


def _highs(costs: Sequence[int], rows: Iterable[Row], seconds: float, hint: frozenset[int]) -> _Answer:
    from ortools.math_opt.python import mathopt

    model: Any = mathopt.Model()
    xs = [model.add_binary_variable() for _ in costs]
    solvers.pose(model, xs, costs, rows)
    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=seconds),
        random_seed=0,  # `threads` is refused for HiGHS (ortools 9.15); its branch and bound is serial anyway
        relative_gap_tolerance=0.0,
        absolute_gap_tolerance=0.5,  # costs are integers: nothing lies between
    )
    hints = [mathopt.SolutionHint(variable_values={x: float(d in hint) for d, x in enumerate(xs)})] if hint else []
    start = mathopt.ModelSolveParameters(solution_hints=hints)
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters, model_params=start)
    reason, reasons = result.termination.reason, mathopt.TerminationReason
    if reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED):  # 0/1 variables are never unbounded
        return _Answer(Status.INFEASIBLE, None, 0.0)
    bound = result.termination.objective_bounds.dual_bound
    if not result.has_primal_feasible_solution():
        return _Answer(Status.FEASIBLE, None, bound)
    used = frozenset(d for d, value in enumerate(result.variable_values(xs)) if value > 0.5)
    return _Answer(Status.OPTIMAL if reason == reasons.OPTIMAL else Status.FEASIBLE, used, bound)


@dataclass(frozen=True, slots=True)
class _Result:
    status: Status
    used: set[int] | None
    bound: int


def _branch_and_cut(inst: Instance, rows: _Rows, costs: Sequence[int], backend: Backend, deadline: float, hint: frozenset[int]) -> _Result:
    """Solve, cut off what the rows did not forbid (cycles; a budget missed by a tolerance), and solve again."""
    bound = 0
    while (left := deadline - time.perf_counter()) > 0:
        if any(not terms for terms, _ in rows):  # 0 <= -1: a sink that nothing can produce
            return _Result(Status.INFEASIBLE, None, 0)
        answer = backend(costs, rows, left, hint)
        if answer.status is Status.INFEASIBLE:
            return _Result(Status.INFEASIBLE, None, 0)
        if math.isfinite(answer.bound):
            # A relaxation's bound holds for the whole. The tolerance is a solver's, its bound being a float.
            bound = max(bound, math.ceil(answer.bound - max(1e-4, 1e-9 * answer.bound)))
        if answer.used is None:
            break
        used = solvers.settle(inst, answer.used, None if not any(costs) else answer.used)
        assert used is not None, "a solution of the program does not decode"
        cuts = _Rows()
        _cycle_cuts(inst, used, cuts)
        if solvers.over_budget(inst, used):
            spent = [d for d in used if inst.weight[d]]
            cuts.put(spent, (), len(spent) - 1)
        if not cuts:
            if answer.status is Status.OPTIMAL:
                bound = sum(costs[d] for d in used)
            return _Result(answer.status, used, bound)
        log.debug("%d cuts after a solution of %d ns", len(cuts), inst.objective(used))
        assert not any(row in rows for row in cuts), "a cut did not hold"
        rows.update(cuts)
    return _Result(Status.FEASIBLE, None, bound)


# --- the solvers ------------------------------------------------------------------------------------------------------


def _greedy(inst: Instance, deadline: float) -> set[int] | None:
    """A sweep; one over single-node candidates only; at last any plan of single-node candidates, at whatever cost."""
    used = solvers.swept(inst)
    if used is not None:
        return used
    rows = _program(inst)
    for d in range(inst.nx):
        if any(len(inst.nodes[k]) > 1 for k in inst.members[d]):
            rows.put((d,), (), 0)
    limit = min(deadline, time.perf_counter() + REPAIR_S)
    return _branch_and_cut(inst, rows, [0] * len(inst.members), _cp_sat, limit, frozenset()).used


def _hinted(inst: Instance, hint: Solution | None) -> set[int] | None:
    """The decisions of a hint that is a valid plan of this problem."""
    if hint is None or hint.status not in (Status.OPTIMAL, Status.FEASIBLE):
        return None
    if min((*hint.chosen, *hint.converted), default=0) < 0:
        return None
    if max(hint.chosen, default=-1) >= len(inst.decision) or max(hint.converted, default=-1) >= len(inst.conversion):
        return None
    used = {inst.decision[k] for k in hint.chosen} | {inst.conversion[c] for c in hint.converted}
    claim = replace(hint, objective=inst.objective(used - {-1}), bound=0, status=Status.FEASIBLE)
    return None if check(inst.problem, claim) else used


def _exact(inst: Instance, backend: Backend, budget_s: float, hint: Solution | None) -> _Result:
    """The program, started from the best plan known beforehand, which also stands in if the clock runs out."""
    deadline = time.perf_counter() + budget_s
    plans = (_hinted(inst, hint), solvers.sweep(inst, False), solvers.sweep(inst, True))
    known = [used for used in plans if used is not None]
    start = min(known, key=inst.objective, default=set())
    result = _branch_and_cut(inst, _program(inst), inst.cost, backend, deadline, frozenset(start))
    if result.status is not Status.FEASIBLE:
        return result
    if not known and result.used is None:
        log.info("no plan in %.3g s; falling back on the greedy solver", budget_s)
        rest = _greedy(inst, time.perf_counter() + REPAIR_S)
        if rest is None:
            raise SolverError(f"no plan was found within {budget_s:g} s, nor proved impossible. Raise solve_budget_s.")
        known = [rest]
    found = known if result.used is None else [result.used, *known]
    return replace(result, used=min(found, key=inst.objective))


def _local_search(inst: Instance, deadline: float, hint: Solution | None, objective: Callable[[Solution], float] | None) -> set[int] | None:
    """From the hint's plan, else from greedy's."""

    def value(used: set[int]) -> float:
        priced = inst.objective(used)
        return priced if objective is None else objective(Solution(*inst.split(used), priced, 0, Status.FEASIBLE, "local_search"))

    start = _hinted(inst, hint) or _greedy(inst, deadline)
    return None if start is None else heuristics.local_search(inst, start, value, deadline)


def solve(
    problem: Problem, solver: str = "cp_sat", budget_s: float = 10.0, hint: Solution | None = None,
    objective: Callable[[Solution], float] | None = None,
) -> Solution:  # fmt: skip
    """The cheapest plan that the named solver finds within the budget, and what it proved about it.

    INFEASIBLE and NOT_APPLICABLE come with empty choices. A solver stopped by the clock returns the best plan known
    (FEASIBLE, with the bound proved so far); if none is known either, SolverError. `hint` is a plan to start from.
    `objective`: for `local_search`, what a plan costs, in any unit (seconds on the clock, say); the sum of its prices if None.
    """
    if solver not in SOLVERS:
        raise OptionError(unknown("solver", solver, SOLVERS))
    start = time.perf_counter()
    inst = solvers.read(problem)
    if solver == "greedy":
        used = _greedy(inst, start + budget_s)
        result = _Result(Status.INFEASIBLE if used is None else Status.FEASIBLE, used, 0)
    elif solver == "local_search":
        used = _local_search(inst, start + budget_s, hint, objective)
        result = _Result(Status.INFEASIBLE if used is None else Status.FEASIBLE, used, 0)
    elif solver in heuristics.SOLVERS:
        used, bound = heuristics.solve(inst, _program(inst), solver)
        used = _greedy(inst, start + budget_s) if used is None else used
        result = _Result(Status.INFEASIBLE if used is None else Status.FEASIBLE, used, bound)
    elif solver == "dynamic":
        reached, used = solvers.dynamic(inst)
        result = _Result(reached, used, inst.objective(used))
    elif solver == "exhaustive":
        finished, best = solvers.exhaustive(inst, start + budget_s)
        if best is None and not finished:
            raise SolverError(f"the exhaustive solver found no plan within {budget_s:g} s. Raise solve_budget_s.")
        status = Status.INFEASIBLE if best is None else Status.OPTIMAL if finished else Status.FEASIBLE
        result = _Result(status, best, inst.objective(best or ()) if finished else 0)
    else:
        result = _exact(inst, _cp_sat if solver == "cp_sat" else _highs, budget_s, hint)
    used = result.used or set()
    priced = inst.objective(used)
    if result.status is Status.FEASIBLE:
        result = replace(result, bound=min(result.bound, priced))
    chosen, converted = inst.split(used)
    wall_s = time.perf_counter() - start
    log.debug("%s: %s, objective %d ns, bound %d ns, %.3f s", solver, result.status, priced, result.bound, wall_s)
    return Solution(chosen, converted, priced, result.bound, result.status, solver, wall_s)


# --- the check, which shares nothing with the above -------------------------------------------------------------------


def check(problem: Problem, solution: Solution) -> list[str]:
    """Every rule that the solution breaks, as a sentence; [] if it is what it claims to be.

    Written from the rules alone, on the problem's own names. Optimality is not checked, only that a claim of it is
    consistent with the bound.
    """
    wrong = _check_claims(problem, solution)
    if not wrong and solution.status in (Status.OPTIMAL, Status.FEASIBLE):
        wrong += _check_cover_and_order(problem, solution)
        wrong += _check_formats(problem, solution)
        wrong += _check_limits(problem, solution)
        wrong += _check_ties(problem, solution)
    return wrong


def _check_claims(problem: Problem, solution: Solution) -> list[str]:
    wrong = []
    for what, indices, size in (
        ("chosen", solution.chosen, len(problem.candidates)),
        ("converted", solution.converted, len(problem.conversions)),
    ):
        if list(indices) != sorted(set(indices)) or any(not 0 <= i < size for i in indices):
            wrong.append(f"{what} is not an ascending list of indices below {size}: {list(indices)}")
    if wrong:
        return wrong
    total = sum(problem.costs[k].weighed for k in solution.chosen)
    total += sum(problem.conversion_costs[c].weighed for c in solution.converted)
    if total != solution.objective:
        wrong.append(f"the objective is {total} ns, not {solution.objective} ns")
    if solution.bound > solution.objective:
        wrong.append(f"the bound {solution.bound} ns is above the objective {solution.objective} ns")
    if solution.status is Status.OPTIMAL and solution.bound != solution.objective:
        wrong.append(f"claimed optimal with objective {solution.objective} ns but bound {solution.bound} ns")
    if solution.status not in (Status.OPTIMAL, Status.FEASIBLE) and (solution.chosen or solution.converted):
        wrong.append(f"claimed {solution.status}, yet something is chosen")
    return wrong


def _check_cover_and_order(problem: Problem, solution: Solution) -> list[str]:
    import networkx as nx

    wrong = []
    owner: dict[str, int] = {}
    for k in solution.chosen:
        for node in dict.fromkeys(problem.candidates[k].region.nodes):
            if node in owner:
                wrong.append(f"node {node} is covered by candidates {owner[node]} and {k}")
            owner[node] = k
    # Candidates and tensors are vertices of one graph: a cycle of the contracted graph is a cycle here.
    graph = nx.DiGraph()
    for k in solution.chosen:
        region = problem.candidates[k].region
        graph.add_edges_from((("tensor", t), ("candidate", k)) for t in region.inputs)
        graph.add_edges_from((("candidate", k), ("tensor", t)) for t in region.outputs)
    if not nx.is_directed_acyclic_graph(graph):
        names = " -> ".join(str(edge[0][1]) for edge in nx.find_cycle(graph))
        wrong.append(f"used candidates wait for each other: {names}")
    return wrong


def _check_formats(problem: Problem, solution: Solution) -> list[str]:
    wrong = []
    produced = set(problem.sources)
    for k in solution.chosen:
        candidate = problem.candidates[k]
        produced.update(zip(candidate.region.outputs, candidate.out_formats, strict=True))
    available = set(produced)
    for c in solution.converted:
        conversion = problem.conversions[c]
        if (conversion.tensor, conversion.src) not in produced:
            wrong.append(f"conversion {c} of {conversion.tensor} starts from {conversion.src}, which nothing produces")
        available.add((conversion.tensor, conversion.dst))
    for k in solution.chosen:
        candidate = problem.candidates[k]
        for tensor, form in zip(candidate.region.inputs, candidate.in_formats, strict=True):
            if (tensor, form) not in available:
                wrong.append(f"candidate {k} ({candidate.kernel}) reads {tensor} in {form}, which is not available")
    for tensor, form in problem.sinks:
        if (tensor, form) not in available:
            wrong.append(f"output {tensor} is not available in {form}")
    return wrong


def _check_limits(problem: Problem, solution: Solution) -> list[str]:
    wrong = []
    used = [problem.candidates[k] for k in solution.chosen]
    squares: dict[int, list[float]] = {}
    for index, k in zip(solution.chosen, used, strict=True):
        squares.setdefault(problem.part[index] if problem.part else 0, []).append(k.epsilon**2)
    for error in map(math.sqrt, map(math.fsum, squares.values())):
        if not error <= problem.error_budget * (1 + 1e-6):  # relative: float noise at the boundary, not a second budget
            wrong.append(f"the error {error:g} is above the budget {problem.error_budget:g}")
    if problem.memory_limit is not None:
        for k in used:
            if k.workspace > problem.memory_limit:
                wrong.append(f"{k.kernel} takes {k.workspace} bytes, the limit is {problem.memory_limit}")
    return wrong


def _check_ties(problem: Problem, solution: Solution) -> list[str]:
    wrong = []
    decided: dict[object, bool] = {}
    chosen = set(solution.chosen)
    for k, c in enumerate(problem.candidate_class):
        if decided.setdefault(c, k in chosen) is not (k in chosen):
            wrong.append(f"candidate {k} is decided unlike the others of its class {c}")
    decided = {}
    converted = set(solution.converted)
    for i, conversion in enumerate(problem.conversions):
        if conversion.tensor in problem.tensor_class:
            key = (problem.tensor_class[conversion.tensor], conversion.src, conversion.dst)
            if decided.setdefault(key, i in converted) is not (i in converted):
                wrong.append(f"conversion {i} ({conversion.tensor}) is decided unlike the others of class {key[0]}")
    return wrong
