"""One graph to one Plan: recognise, enumerate, price, solve, check."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace

from . import backends, planner, torch_private
from .backends.base import SelectionContext
from .capture import GraphView
from .cost_models import CostModel, RefiningCostModel, cost_model
from .cost_models.measured import Measured
from .cost_models.roofline import Roofline
from .errors import PolicyError, SolverError
from .options import Options
from .plan_io import keep_problem
from .problem import CALL, LOOP, VIEW, Enumeration, add_defaults, build, enumerate_regions, refused_when_smaller
from .timings import TimingStore
from .trust.circuit import Quarantine
from .trust.first_use import FirstUse
from .trust.policy import Rule
from .trust.verdicts import Trust
from .types import EAGER, INDUCTOR, Candidate, Choice, Cost, Plan, Problem, Rejection, Solution, Status, Target

log = logging.getLogger(__name__)

# Rounding errors of kernels are independent, so they add in quadrature; and much of a network's error is added to a
# residual stream that dilutes it. The estimate is therefore optimistic on purpose: the whole plan's error is measured
# on the first real call, and that check, not the estimate, is what a user's error_budget rests on. A graph whose plan was
# over its budget is planned anew with the dilution that was measured.
DILUTION = 0.5


@dataclass(frozen=True, slots=True)
class Posed:
    """A graph's integer program, and what it takes to make a plan of a solution. `dilution`: what the whole plan's relative error is taken
    to be, over the root of the sum of its kernels' squared ones."""

    view: GraphView
    options: Options
    target: Target
    fingerprint: str
    kind: str
    model: CostModel
    found: Enumeration
    problem: Problem
    dilution: float
    first_use: FirstUse
    seconds: float = 0.0  # that solving it took


def make_plan(
    view: GraphView, options: Options, target: Target, store: TimingStore, *, fingerprint: str, kind: str, dilution: float = DILUTION,
) -> Plan:  # fmt: skip
    """Plan one functional ATen graph (`kind`: inference, forward or backward) for a target."""
    start = time.perf_counter()
    posed, solution = solved(pose(view, options, target, store, fingerprint=fingerprint, kind=kind, dilution=dilution))
    plan = decode(posed, solution)
    log.info(
        "%s graph: %d candidates, %d conversions, %s by %s, %.3f ms predicted, enumerated and priced in %.2f s, solved in %.2f s",
        kind, len(posed.problem.candidates), len(posed.problem.conversions), solution.status, solution.solver,
        solution.objective / 1e6, time.perf_counter() - start - posed.seconds, posed.seconds,
    )  # fmt: skip
    return plan


def pose(
    view: GraphView, options: Options, target: Target, store: TimingStore, *, fingerprint: str, kind: str, dilution: float = DILUTION,
) -> Posed:  # fmt: skip
    """Recognise, enumerate and price: all but the choice."""
    model = cost_model(options.cost_model, target, store, options.measure_budget_s)
    roofline = Roofline(target)
    trust, broken = Trust(store, target.environment), Quarantine(store, target.device)
    small = refused_when_smaller(view, options)
    found = enumerate_regions(
        view, options, model,
        lambda ctx, candidate: (
            trust.refusal(ctx, candidate) or broken.refusal(candidate) or small(ctx, candidate) or _unknown_link(target, candidate)
            or _unbuilt(options, trust, ctx, candidate)
        ),
    )  # fmt: skip
    add_defaults(view, found, roofline, lossy=options.error_budget > 0)
    problem = replace(build(view, found, options, roofline), error_budget=options.error_budget / dilution)
    return Posed(view, options, target, fingerprint, kind, model, found, problem, dilution,
                 FirstUse(view, options, target, store, trust))  # fmt: skip


def _unknown_link(target: Target, candidate: Candidate) -> Rejection | None:
    """Why another all-reduce than the graph's own may not be used, or None."""
    known = candidate.region.op != "all_reduce" or candidate.as_is or candidate.kernel in target.links
    return None if known else Rejection(candidate.kernel, "not_measured", "the ranks of this job have not measured it, or found it wrong")


def _unbuilt(options: Options, trust: Trust, ctx: SelectionContext, candidate: Candidate) -> Rejection | None:
    """Why a kernel that its library would compile meanwhile may not be used, or None: where the canary had it compiled, or
    the user names it."""
    name = backends.owners()[candidate.kernel]
    library = getattr(backends.all_backends()[name], "library", None)
    if library is None or not library.builds or name in (options.backends or ()):
        return None
    rules = [r for r in (options.policy.rules if options.policy else ()) if r.action in ("lock", "prefer")]
    if any(r.names(candidate.kernel, name) and {"kernel", "backend"} & dict(r.where).keys() for r in rules) or trust.passed(ctx, candidate):
        return None
    ahead = f"`lz canary --backend {name}` does so ahead; or name it in the option 'backends' or in a policy"
    why = f"{library.distribution} compiles it in its first call, which can take minutes: {ahead}"
    return Rejection(candidate.kernel, "not_built", why)


def solved(posed: Posed) -> tuple[Posed, Solution]:
    """The graph's own plan, with prices refined where the cost model does so. PolicyError where a policy leaves none."""
    start = time.perf_counter()
    try:
        problem, solution = refined(posed, posed.problem, lambda p: solve_within(p, posed.options))
    except SolverError:
        conflict = _conflict(posed.view, posed.found, posed.options, posed.problem.error_budget, Roofline(posed.target))
        if conflict is None:
            raise
        raise PolicyError(conflict) from None
    return replace(posed, problem=problem, seconds=time.perf_counter() - start), solution


def refined(posed: Posed, problem: Problem, solve: Callable[[Problem], Solution]) -> tuple[Problem, Solution]:
    """`solve`'s answer, with what its prices turned out to be where the cost model measures only what matters for it, and without
    kernels that prove to be wrong when they are to be used for the first time."""
    while True:
        if isinstance(posed.model, RefiningCostModel):
            problem, solution = posed.model.refine(problem, solve)
        else:
            solution = solve(problem)
        contexts = posed.found.contexts
        refused = posed.first_use.refused({i: (contexts[i], problem.candidates[i]) for i in solution.chosen if i in contexts})
        if not refused:
            return problem, solution
        problem = _without(posed.found, problem, refused)


def _without(found: Enumeration, problem: Problem, refused: Mapping[int, Rejection]) -> Problem:
    """The problem without some candidates, of which the enumeration says why."""
    candidates = list(problem.candidates)
    for i, why in refused.items():
        candidates[i] = found.candidates[i] = replace(candidates[i], epsilon=math.inf)  # no budget allows it: solvers leave it out
        found.rejections.setdefault(candidates[i].region.nodes, []).append(why)
    return replace(problem, candidates=tuple(candidates))


def solve_within(problem: Problem, options: Options, graphs: int = 1) -> Solution:
    """Solve, and check the result independently of the solver. `graphs`: how many are planned together, each has its time."""
    solution = planner.solve(problem, options.solver, options.solve_budget_s * graphs)
    if not solution.chosen and problem.sinks:
        solution = planner.solve(problem, "cp_sat", options.solve_budget_s * graphs)
        if not solution.chosen and solution.status == "infeasible":
            if problem.candidate_class:  # repeated blocks that cannot all take the same decision
                return solve_within(replace(problem, candidate_class=(), tensor_class={}), options, graphs)
            raise SolverError(f"no valid plan: {solution.status} with solver={options.solver!r} and with 'cp_sat'.")
    violations = planner.check(problem, solution)
    assert not violations, f"the solver's plan breaks the problem's rules: {violations[:5]}"
    return solution


def decode(posed: Posed, solution: Solution, notes: tuple[str, ...] = ()) -> Plan:
    view, problem, found, target = posed.view, posed.problem, posed.found, posed.target
    torch_private.counters()["plans"] += 1
    place = {node.name: i for i, node in enumerate(view.nodes)}
    chosen = sorted(solution.chosen, key=lambda i: min(place[n] for n in problem.candidates[i].region.outputs))
    overlapping: dict[str, list[tuple[Candidate, Cost]]] = {}
    for candidate, cost in zip(problem.candidates, problem.costs, strict=True):
        for node in candidate.region.nodes:
            overlapping.setdefault(node, []).append((candidate, cost))
    choices: list[Choice] = []
    made: dict[str, set[int]] = {}  # tensor -> the choices that it depends on, and no other choice between
    for index in chosen:
        candidate, cost = problem.candidates[index], problem.costs[index]
        after = set().union(*(made.get(tensor, set()) for tensor in candidate.region.inputs))
        through = candidate.kernel in (VIEW, CALL)
        made |= dict.fromkeys(candidate.region.outputs, after if through else {len(choices)})
        if through:
            continue
        others: tuple[tuple[Candidate, Cost], ...] = ()
        rejected: tuple[Rejection, ...] = ()
        if candidate.kernel != LOOP:
            others = tuple(_alternatives(candidate, overlapping))
            rejected = tuple(_rejections(candidate, found.rejections))
        choices.append(Choice(candidate, cost, others, rejected, *found.work.get(index, (0, 0)), tuple(sorted(after))))
    epsilon = posed.dilution * sum(problem.candidates[i].epsilon ** 2 for i in chosen) ** 0.5
    conversions = tuple((problem.conversions[i], problem.conversion_costs[i]) for i in solution.converted)
    folder = posed.options.problems
    return Plan(
        fingerprint=posed.fingerprint, kind=posed.kind, environment=dict(target.environment), choices=tuple(choices),
        conversions=conversions, objective=solution.objective, bound=solution.bound, status=solution.status,
        solver=solution.solver, epsilon=epsilon, plan_s=posed.seconds,
        notes=(*notes, *_unmeasured(posed.model), *_effects(posed.options, found)),
        barred=_barred(found), peaks={"bandwidth": target.bandwidth, **{k: v for k, v in target.flops.items() if k != "transcendental"}},
        modules={n: m for c in choices if c.candidate.kernel != LOOP for n in c.candidate.region.nodes if (m := view.module(n))},
        problem=keep_problem(problem, folder, posed.fingerprint, posed.kind) if folder is not None else "",
    )  # fmt: skip


def _unmeasured(model: CostModel) -> tuple[str, ...]:
    """What the plan could not know. (Elsewhere an unmeasured price is the cost model's purpose.)"""
    if not isinstance(model, Measured) or not model.unmeasured:
        return ()
    again = "raise measure_budget_s, and plan again after `lz cache clear verdict`"
    then = again if model.measures else "the target is not here, and its store lacks them"
    return (f"{len(model.unmeasured)} of {len(model.asked)} kernels are not measured: {then}",)


def _effects(options: Options, found: Enumeration) -> tuple[str, ...]:
    """What each rule of the policy did to this graph: one without effect may be a mistake."""
    rules = options.policy.rules if options.policy else ()
    did = {"lock": "candidates refused", "deny": "candidates refused"}
    return tuple(f"policy: {r}: {found.ruled[r] or 'no'} {did.get(r.action, 'prices weighed')}" for r in rules)


def _barred(found: Enumeration) -> tuple[str, ...]:
    """Finalists that would use what the policy forbids. Eager, and Inductor alone, run the graph as it stands; and Inductor its own kernels
    wherever it sees fit."""
    denied = [c for c, _ in found.denied]
    as_is = any(c.as_is for c in denied)
    own = any(backends.owners()[c.kernel] == "inductor" for c in denied)
    return (INDUCTOR, EAGER) if as_is else (INDUCTOR,) if own else ()


def _conflict(view: GraphView, found: Enumeration, options: Options, budget: float, roofline: Roofline) -> str | None:
    """Which rules leave no plan: a minimal infeasible core, by deletion (Chinneck, Feasibility and infeasibility in optimization,
    2008): a rule without which there is still no plan is not needed for the conflict. None if the policy is not the reason."""

    def infeasible(rules: Set[Rule]) -> bool:
        free = [c for c, refusing in found.denied if rules.isdisjoint(refusing)]
        trial = Enumeration([*found.candidates, *free], [Cost(0, "assumed")] * (len(found.candidates) + len(free)))
        problem = replace(build(view, trial, options, roofline), candidate_class=(), tensor_class={}, error_budget=budget)
        return planner.solve(problem, "cp_sat", options.solve_budget_s).status is Status.INFEASIBLE

    core = {rule: None for _, refusing in found.denied for rule in refusing}
    if not infeasible(core.keys()) or infeasible(set()):
        return None
    for rule in list(core):
        if infeasible(core.keys() - {rule}):
            del core[rule]
    left = {node for c in found.candidates for node in c.region.nodes}
    bare = dict.fromkeys(
        f"{c.region.op} {c.region.nodes[0]}" for c, _ in found.denied if len(c.region.nodes) == 1 and c.region.nodes[0] not in left
    )
    where = f" Nothing is left for {', '.join(list(bare)[:3])}{' and others' if len(bare) > 3 else ''}." if bare else ""
    one = "any one of these rules" if len(core) > 1 else "it"
    return (
        f"the policy leaves no plan for this graph: {'; '.join(map(str, core))}. Without {one} there is one.{where}{_unlocked(found, core)}"
    )


def _unlocked(found: Enumeration, core: Iterable[Rule]) -> str:
    """Why kernels that are locked to cannot run, in words: what they were rejected for, beside the policy."""
    locks, owners = [rule for rule in core if rule.action == "lock"], backends.owners()
    meant = {name for rule in locks for kernel, owner in owners.items() if rule.names(kernel, owner) for name in (kernel, owner)}
    told = dict.fromkeys(
        f" {r.kernel} cannot run: {r.detail} ({r.code})."
        for rejected in found.rejections.values() for r in rejected if r.kernel in meant and r.code != "policy"
    )  # fmt: skip
    return "".join(list(told)[:3])


def _alternatives(candidate: Candidate, overlapping: Mapping[str, list[tuple[Candidate, Cost]]]) -> list[tuple[Candidate, Cost]]:
    """Other candidates for the same region, cheapest first, and then the cheapest for each other region around its nodes."""
    seen = {id(other): (other, cost) for node in candidate.region.nodes for other, cost in overlapping[node]}
    usable = ((o, c) for o, c in seen.values() if o is not candidate and o.epsilon != math.inf)
    rivals = sorted(((o, c) for o, c in usable if o.kernel not in (LOOP, VIEW, CALL)), key=lambda oc: oc[1].weighed)
    own = frozenset(candidate.region.nodes)
    around: dict[frozenset[str], tuple[Candidate, Cost]] = {}
    for rival in rivals:
        around.setdefault(frozenset(rival[0].region.nodes), rival)
    around.pop(own, None)
    same = [rival for rival in rivals if frozenset(rival[0].region.nodes) == own]
    return [*same[:8], *sorted(around.values(), key=lambda oc: (not own.issuperset(oc[0].region.nodes), oc[1].weighed))[:8]]


def _rejections(candidate: Candidate, rejections: Mapping[tuple[str, ...], list[Rejection]]) -> list[Rejection]:
    nodes = set(candidate.region.nodes)
    found = {r: None for region, reasons in rejections.items() if nodes & set(region) for r in reasons}
    return list(found)
