"""The planner's problem read once into integers, and the solvers that need no library: the baselines and the oracle.

`read` turns a Problem into an Instance: every (tensor, format) pair, tensor and node becomes a small integer, and every
class of tied candidates or tied conversions becomes one *decision*. What may never be used (its epsilon alone exceeds
the budget, its workspace exceeds the limit, it reads what it writes) is left out here, with its whole class, so that no
solver has to know those rules. Decisions below `Instance.nx` are classes of candidates, the others of conversions.

- `sweep`: what a per-op dispatcher does. Never looks at a neighbour.
- `dynamic`: exact for everything that a frontier can remember; says so when the answer depends on what it cannot.
- `exhaustive`: branches on every way to meet a demand. Its only cleverness is to stop when it is already too expensive,
  which makes it the oracle that the other solvers are tested against.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import SolverError
from .types import Candidate, Problem, Status

WEIGHT_SCALE = 1 << 36  # the error budget in integer units: rounding 10^4 candidates down loses less than 2e-7 of it
BUDGET_SLACK = 1e-9  # relative; sums of squares that meet the budget exactly must not fail by float noise
STATE_LIMIT = 20_000  # states of `dynamic` at one tensor, beyond which it gives up
EXHAUSTIVE_LIMIT = 96  # decisions of `exhaustive`, beyond which it refuses


@dataclass(frozen=True, slots=True)
class Instance:
    """A Problem in integers. Lists are indexed by candidate, conversion, pair, tensor, node or decision, as named."""

    problem: Problem
    sources: frozenset[int]
    sinks: tuple[int, ...]
    tensor: tuple[int, ...]  # of a pair
    pairs: tuple[tuple[int, ...], ...]  # of a tensor
    ins: tuple[tuple[int, ...], ...]  # pairs that a candidate reads, without repetition
    outs: tuple[tuple[int, ...], ...]  # pairs that it produces
    nodes: tuple[tuple[int, ...], ...]  # nodes that it covers
    src: tuple[int, ...]  # pair that a conversion reads
    dst: tuple[int, ...]  # pair that it makes
    decision: tuple[int, ...]  # of a candidate, -1 if it may not be used
    conversion: tuple[int, ...]  # decision of a conversion
    nx: int
    members: tuple[tuple[int, ...], ...]  # candidates or conversions of a decision
    cost: tuple[int, ...]  # of a decision: its members' sum
    weight: tuple[int, ...]  # of a decision: its members' squared epsilons, in units of budget^2 / WEIGHT_SCALE
    part: tuple[int, ...]  # of a decision: the graph whose error budget that is
    makers: tuple[tuple[int, ...], ...]  # usable candidates that produce a pair
    into: tuple[tuple[int, ...], ...]  # conversions that make a pair
    covering: tuple[tuple[int, ...], ...]  # usable candidates that cover a node

    def objective(self, used: Iterable[int]) -> int:
        return sum(self.cost[d] for d in used)

    def split(self, used: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The candidates and the conversions of the used decisions, ascending."""
        chosen = sorted(k for d in used if d < self.nx for k in self.members[d])
        converted = sorted(c for d in used if d >= self.nx for c in self.members[d])
        return tuple(chosen), tuple(converted)


class _Ids(dict[Hashable, int]):
    """Numbers things in the order in which they are first seen."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


def _unusable(problem: Problem, k: Candidate) -> bool:
    limit = problem.memory_limit
    return (
        not k.epsilon <= problem.error_budget * (1 + BUDGET_SLACK)  # written so that NaN is unusable too
        or (limit is not None and k.workspace > limit)
        or not set(k.region.inputs).isdisjoint(k.region.outputs)
    )


def _weight(problem: Problem, epsilon: float) -> int:
    """Rounded down, so that whatever is within the budget stays within it; see BUDGET_SLACK for the other side."""
    if epsilon == 0.0:
        return 0
    return math.floor(WEIGHT_SCALE * (epsilon / problem.error_budget) ** 2 * (1 - BUDGET_SLACK))


def _decisions(problem: Problem) -> tuple[list[int], list[int], list[tuple[int, ...]], int]:
    """Classes of candidates without an unusable member, then classes of conversions, in order of appearance."""
    tied: Sequence[Hashable] = problem.candidate_class or range(len(problem.candidates))
    barred = {c for c, k in zip(tied, problem.candidates, strict=True) if _unusable(problem, k)}
    ids = _Ids()
    decision = [-1 if c in barred else ids[("candidate", c)] for c in tied]
    nx = len(ids)
    by_name = problem.tensor_class
    conversion = [ids[("conversion", by_name.get(c.tensor, c.tensor), c.src, c.dst)] for c in problem.conversions]
    members: list[list[int]] = [[] for _ in ids]
    for of in (decision, conversion):
        for index, d in enumerate(of):
            if d >= 0:
                members[d].append(index)
    return decision, conversion, [tuple(m) for m in members], nx


def _inverse(rows: Iterable[tuple[int, Iterable[int]]], size: int) -> tuple[tuple[int, ...], ...]:
    table: list[list[int]] = [[] for _ in range(size)]
    for index, row in rows:
        for item in row:
            table[item].append(index)
    return tuple(tuple(row) for row in table)


def read(problem: Problem) -> Instance:
    """Linear in the size of the problem."""
    candidates, conversions = problem.candidates, problem.conversions
    assert len(problem.costs) == len(candidates)
    assert len(problem.conversion_costs) == len(conversions)
    if any(c.ns < 0 for c in (*problem.costs, *problem.conversion_costs)):
        raise SolverError("a cost is negative; every cost must be 0 ns or more. Correct the cost model.")
    pair, node = _Ids(), _Ids()
    reads = [zip(k.region.inputs, k.in_formats, strict=True) for k in candidates]
    writes = [zip(k.region.outputs, k.out_formats, strict=True) for k in candidates]
    ins = [tuple(dict.fromkeys(pair[p] for p in row)) for row in reads]
    outs = [tuple(dict.fromkeys(pair[p] for p in row)) for row in writes]
    nodes = [tuple(dict.fromkeys(node[n] for n in k.region.nodes)) for k in candidates]
    src = tuple(pair[(c.tensor, c.src)] for c in conversions)
    dst = tuple(pair[(c.tensor, c.dst)] for c in conversions)
    sinks = tuple(dict.fromkeys(pair[p] for p in problem.sinks))
    sources = frozenset(pair[p] for p in sorted(problem.sources))  # a set of strings has no order of its own
    tensors = _Ids()
    tensor = tuple(tensors[p[0]] for p in pair)  # type: ignore[index]
    decision, conversion, members, nx = _decisions(problem)
    usable = [k for k, d in enumerate(decision) if d >= 0]
    prices = [problem.costs if d < nx else problem.conversion_costs for d in range(len(members))]
    return Instance(
        problem, sources, sinks, tensor, _inverse(((p, (t,)) for p, t in enumerate(tensor)), len(tensors)),
        tuple(ins), tuple(outs), tuple(nodes), src, dst, tuple(decision), tuple(conversion), nx, tuple(members),
        cost=tuple(sum(price[m].weighed for m in ms) for price, ms in zip(prices, members, strict=True)),
        weight=tuple(sum(_weight(problem, candidates[m].epsilon) for m in ms) if d < nx else 0
                     for d, ms in enumerate(members)),
        part=tuple(problem.part[ms[0]] if d < nx and problem.part else 0 for d, ms in enumerate(members)),
        makers=_inverse(((k, outs[k]) for k in usable), len(pair)),
        into=_inverse(((c, (p,)) for c, p in enumerate(dst)), len(pair)),
        covering=_inverse(((k, nodes[k]) for k in usable), len(node)),
    )  # fmt: skip


def settle(inst: Instance, used: Iterable[int], allowed: frozenset[int] | None = None) -> set[int] | None:
    """What of the used candidates the sinks need, with the cheapest conversions (among `allowed`) that this takes.

    None if a need cannot be met. Dropping what nobody needs never breaks a constraint, whole classes at a time.
    """
    live = {d for d in used if d < inst.nx}
    produced = set(inst.sources).union(*(inst.outs[k] for d in live for k in inst.members[d]))
    keep: set[int] = set()
    seen: set[int] = set()
    todo = list(inst.sinks)
    while todo:
        p = todo.pop()
        if p in seen or p in inst.sources:
            continue
        seen.add(p)
        if p in produced:
            d = min(inst.decision[k] for k in inst.makers[p] if inst.decision[k] in live)
            needs = [q for k in inst.members[d] for q in inst.ins[k]]
        else:
            options = {inst.conversion[c] for c in inst.into[p]}
            options = {d for d in options if allowed is None or d in allowed}
            options = {d for d in options if all(inst.src[c] in produced for c in inst.members[d])}
            if not options:
                return None
            d = min(options, key=lambda d: (0 if d in keep else inst.cost[d], d))
            needs = [inst.src[c] for c in inst.members[d]]
        keep.add(d)
        todo += needs
    return keep


def over_budget(inst: Instance, used: Iterable[int]) -> bool:
    spent: Counter[int] = Counter()
    for d in used:
        spent[inst.part[d]] += inst.weight[d]
    return any(weight > WEIGHT_SCALE for weight in spent.values())


def contracted(inst: Instance, used: Iterable[int]) -> dict[int, dict[int, int]]:
    """The graph in which each used candidate is one vertex: producer -> {consumer: a tensor between them}."""
    chosen = [k for d in sorted(used) if d < inst.nx for k in inst.members[d]]
    readers: dict[int, list[int]] = {}
    for k in chosen:
        for p in inst.ins[k]:
            readers.setdefault(inst.tensor[p], []).append(k)
    return {k: {r: t for t in {inst.tensor[p]: None for p in inst.outs[k]} for r in readers.get(t, ())} for k in chosen}


def is_cyclic(graph: dict[int, dict[int, int]]) -> bool:
    degree = Counter(r for targets in graph.values() for r in targets)
    ready = [k for k in graph if not degree[k]]
    left = len(graph)
    while ready:
        left -= 1
        for r in graph[ready.pop()]:
            degree[r] -= 1
            if not degree[r]:
                ready.append(r)
    return left > 0


def tensor_order(inst: Instance) -> list[int]:
    """Position of each tensor in a topological order: depth first, from what a tensor is computed from.

    A candidate with several nodes and outputs says nothing certain about the order of those (one output may be needed
    for an input of another's), so it is asked only where no simpler candidate makes the tensor.
    """
    makers = [sorted({k for p in ps for k in inst.makers[p]}) for ps in inst.pairs]
    plain = [[k for k in ks if len(inst.nodes[k]) == 1 or len(inst.outs[k]) == 1] or ks for ks in makers]
    before = [list(dict.fromkeys(inst.tensor[p] for k in ks for p in inst.ins[k])) for ks in plain]
    position = [-1] * len(inst.pairs)
    count = 0
    entered = [False] * len(inst.pairs)
    for root in range(len(inst.pairs)):
        stack = [root]
        while stack:
            t = stack[-1]
            if not entered[t]:
                entered[t] = True
                stack += [u for u in reversed(before[t]) if not entered[u]]
                continue
            stack.pop()
            if position[t] < 0:
                position[t] = count
                count += 1
    return position


def node_order(inst: Instance) -> list[int]:
    """Nodes in the topological order of the first tensor that each makes."""
    position = tensor_order(inst)
    key: dict[int, tuple[bool, int]] = {}
    for n, ks in enumerate(inst.covering):
        spots = [(len(inst.nodes[k]) > 1, position[inst.tensor[p]]) for k in ks for p in inst.outs[k]]
        key[n] = min(spots, default=(True, len(position)))
    return sorted(key, key=lambda n: (key[n][1], n))


def sweep(inst: Instance, single_nodes: bool, rank: Sequence[float] | None = None, order: Sequence[int] | None = None) -> set[int] | None:
    """Node by node in topological order, the candidate that costs least per node, whatever the neighbours need.

    A candidate is passed over only where an input exists already and cannot be brought into its format. Conversions are
    paid afterwards. None if the result is not a valid plan. `rank`: of each decision, what counts before its cost (least first);
    infinity bars it. `order`: `node_order(inst)`, where it is known.
    """
    formats: list[set[int]] = [set() for _ in inst.pairs]
    for p in inst.sources:
        formats[inst.tensor[p]].add(p)
    covered: set[int] = set()
    used: set[int] = set()
    room = dict.fromkeys(inst.part, WEIGHT_SCALE)

    def fits(k: int) -> bool:
        d = inst.decision[k]
        spots = [n for m in inst.members[d] for n in inst.nodes[m]]
        if len(set(spots)) < len(spots) or not covered.isdisjoint(spots) or inst.weight[d] > room[inst.part[d]]:
            return False
        if single_nodes and len(spots) > len(inst.members[d]):
            return False
        if rank is not None and rank[d] == math.inf:
            return False
        known = ((p, formats[inst.tensor[p]]) for p in inst.ins[k])
        return all(not have or p in have or any(inst.src[c] in have for c in inst.into[p]) for p, have in known)

    def share(d: int) -> tuple[float, float, int]:
        first = 0.0 if rank is None else rank[d]
        return first, inst.cost[d] / sum(len(inst.nodes[m]) for m in inst.members[d]), d

    for n in node_order(inst) if order is None else order:
        options = [] if n in covered else [inst.decision[k] for k in inst.covering[n] if fits(k)]
        if options:
            d = min(options, key=share)
            used.add(d)
            room[inst.part[d]] -= inst.weight[d]
            for m in inst.members[d]:
                covered.update(inst.nodes[m])
                for p in inst.outs[m]:
                    formats[inst.tensor[p]].add(p)
    plan = settle(inst, used)
    return None if plan is None or is_cyclic(contracted(inst, plan)) else plan


def swept(inst: Instance, rank: Sequence[float] | None = None) -> set[int] | None:
    """A sweep; if that fails, one over candidates of single nodes only."""
    plan = sweep(inst, False, rank)
    return sweep(inst, True, rank) if plan is None else plan


def pose(model: Any, xs: Sequence[Any], costs: Sequence[int], rows: Iterable[Any]) -> None:
    """The program (planner.py) in the variables of a MathOpt model."""
    for terms, bound in rows:
        scale = 1 / bound if bound > 1 else 1.0  # the budget row has coefficients up to WEIGHT_SCALE
        row = model.add_linear_constraint(ub=bound * scale)
        for d, c in terms:
            row.set_coefficient(xs[d], c * scale)
    for x, c in zip(xs, costs, strict=True):
        if c:
            model.objective.set_linear_coefficient(x, c)


@dataclass(frozen=True, slots=True)
class _State:
    """What the tensors before the frontier need to know of those behind it."""

    demands: frozenset[int]  # pairs that were asked for
    covered: frozenset[int]  # nodes that are taken and that an undecided candidate could still take
    given: frozenset[int]  # pairs that a candidate decided at a later output of its own produces


_Step = tuple[int, _State | None, tuple[int, ...], tuple[int, ...]]  # cost, state it came from, candidates, conversions


def _moves(inst: Instance, state: _State, t: int, options: Sequence[int]) -> Iterable[tuple[int | None, list[int]]]:
    """The ways to leave tensor t behind: a candidate or none, and the cheapest conversions for what is demanded."""
    wanted = [p for p in inst.pairs[t] if p in state.demands]
    for k in (None, *options):
        if k is not None and (not state.covered.isdisjoint(inst.nodes[k]) or not (wanted or len(inst.outs[k]) > 1)):
            continue
        made = () if k is None else inst.outs[k]
        have = {p for p in inst.pairs[t] if p in made or p in state.given or p in inst.sources}
        paid = []
        for p in wanted:
            ways = [c for c in inst.into[p] if inst.src[c] in have]
            if p not in have and ways:
                paid.append(min(ways, key=lambda c: inst.problem.conversion_costs[c].ns))
            elif p not in have:
                break
        else:
            yield k, paid


def _decided_at(inst: Instance, position: list[int]) -> list[list[int]] | None:
    """Candidates by the last of their outputs, where they are decided.

    None where one pass from the last tensor to the first does not see everything: a candidate that reads what comes
    after its outputs, or a tensor that two candidates could write together, or that is a source and written.
    """
    at: list[list[int]] = [[] for _ in inst.pairs]
    for k, d in enumerate(inst.decision):
        if d >= 0 and inst.outs[k]:
            last = max((inst.tensor[p] for p in inst.outs[k]), key=position.__getitem__)
            if any(position[inst.tensor[p]] >= position[last] for p in inst.ins[k]):
                return None
            at[last].append(k)
    for ps in inst.pairs:
        makers = sorted({k for p in ps for k in inst.makers[p]})
        if makers and not inst.sources.isdisjoint(ps):
            return None
        if any(set(inst.nodes[a]).isdisjoint(inst.nodes[b]) for i, a in enumerate(makers) for b in makers[:i]):
            return None
    return at


def _frontiers(inst: Instance, position: list[int], at: list[list[int]]) -> list[dict[_State, _Step]] | None:
    """All states after each tensor, last tensor first, each with the cheapest way into it; None beyond STATE_LIMIT."""
    home = {k: position[t] for t, ks in enumerate(at) for k in ks}
    undecided = [min((home[k] for k in cover if k in home), default=len(position)) for cover in inst.covering]
    layers: list[dict[_State, _Step]] = [{_State(frozenset(inst.sinks), frozenset(), frozenset()): (0, None, (), ())}]
    for t in sorted(range(len(position)), key=position.__getitem__, reverse=True):
        here, gone = position[t], set(inst.pairs[t])
        following: dict[_State, _Step] = {}
        for state, (cost, *_) in layers[-1].items():
            for k, paid in _moves(inst, state, t, at[t]):
                total = cost + sum(inst.problem.conversion_costs[c].ns for c in paid)
                ins, outs, nodes = ((), (), ()) if k is None else (inst.ins[k], inst.outs[k], inst.nodes[k])
                total += 0 if k is None else inst.problem.costs[k].ns
                new = _State(
                    state.demands.union(ins) - gone,
                    frozenset(n for n in state.covered.union(nodes) if undecided[n] < here),
                    state.given.union(outs) - gone,
                )
                if new not in following or total < following[new][0]:
                    following[new] = (total, state, () if k is None else (k,), tuple(paid))
        if len(following) > STATE_LIMIT:
            return None
        layers.append(following)
    return layers


def dynamic(inst: Instance) -> tuple[Status, set[int]]:
    """Dynamic programming from the sinks back, tensor by tensor, over the states of the frontier.

    A frontier does not remember the error spent, the other layers' decisions, or who waits for whom. So this solves the
    problem without the error budget, the ties and the rule against cycles. Its optimum is the optimum where it happens
    to keep them, and nothing is claimed (NOT_APPLICABLE) where it does not.
    """
    position = tensor_order(inst)
    at = _decided_at(inst, position)
    layers = None if at is None else _frontiers(inst, position, at)
    if layers is None:
        return Status.NOT_APPLICABLE, set()
    if not layers[-1]:
        return Status.INFEASIBLE, set()
    state: _State | None = min(layers[-1], key=lambda s: layers[-1][s][0])
    chosen: set[int] = set()
    converted: set[int] = set()
    for layer in reversed(layers):
        assert state is not None
        _, state, candidates, conversions = layer[state]
        chosen.update(candidates)
        converted.update(conversions)
    used = {inst.decision[k] for k in chosen} | {inst.conversion[c] for c in converted}
    tied = sum(len(inst.members[d]) for d in used) == len(chosen) + len(converted)
    if not tied or over_budget(inst, used) or is_cyclic(contracted(inst, used)):
        return Status.NOT_APPLICABLE, set()
    return Status.OPTIMAL, used


class _Search:
    """Depth-first search over demands: (pair, whether a kernel or source must have produced it)."""

    def __init__(self, inst: Instance, deadline: float) -> None:
        self.inst = inst
        self.deadline = deadline
        self.best: set[int] | None = None
        self.best_cost = math.inf
        self.used: dict[int, None] = {}
        self.barred: set[int] = set()
        self.covered: set[int] = set()
        self.produced: Counter[int] = Counter(inst.sources)
        self.made: Counter[int] = Counter()
        self.steps = 0
        self.stopped = False
        members = range(len(inst.members))
        self.spots = [[n for k in inst.members[d] for n in inst.nodes[k]] if d < inst.nx else [] for d in members]
        errors = [[inst.problem.candidates[k].epsilon for k in inst.members[d]] if d < inst.nx else [] for d in members]
        self.squares = [math.fsum(e**2 for e in row) for row in errors]
        self.limit = inst.problem.error_budget**2 * (1 + BUDGET_SLACK)

    def options(self, p: int, produced: bool) -> list[int]:
        inst = self.inst
        ways = {inst.decision[k] for k in inst.makers[p]}
        if not produced:
            ways |= {inst.conversion[c] for c in inst.into[p]}
        return sorted(ways, key=lambda d: (inst.cost[d], d))

    def usable(self, d: int, cost: int) -> bool:
        if d in self.barred or cost + self.inst.cost[d] >= self.best_cost:
            return False
        spots = self.spots[d]
        if len(set(spots)) < len(spots) or not self.covered.isdisjoint(spots):
            return False
        part = self.inst.part
        return math.fsum([self.squares[d], *(self.squares[u] for u in self.used if part[u] == part[d])]) <= self.limit

    def visit(self, demands: list[tuple[int, bool]], cost: int) -> None:
        self.steps += 1
        self.stopped = self.stopped or (self.steps % 256 == 0 and time.perf_counter() > self.deadline)
        if self.stopped:
            return
        at = 0
        while at < len(demands):
            p, produced = demands[at]
            if not (self.produced[p] or (not produced and self.made[p])):
                break
            at += 1
        else:
            if not is_cyclic(contracted(self.inst, self.used)):
                self.best, self.best_cost = set(self.used), cost
            return
        tried = []
        for d in self.options(*demands[at]):
            if self.usable(d, cost):
                self.take(d, demands[at:], cost)
            if d not in self.barred:
                # Whatever contains d was just looked at, or is too expensive, or impossible.
                self.barred.add(d)
                tried.append(d)
        self.barred.difference_update(tried)

    def take(self, d: int, demands: list[tuple[int, bool]], cost: int) -> None:
        inst, members = self.inst, self.inst.members[d]
        if d < inst.nx:
            gives, table = [p for k in members for p in inst.outs[k]], self.produced
            needs = [(p, False) for k in members for p in inst.ins[k]]
        else:
            gives, table = [inst.dst[c] for c in members], self.made
            needs = [(inst.src[c], True) for c in members]
        self.used[d] = None
        self.covered.update(self.spots[d])
        table.update(gives)
        self.visit(demands + needs, cost + inst.cost[d])
        table.subtract(gives)
        self.covered.difference_update(self.spots[d])
        del self.used[d]


def exhaustive(inst: Instance, deadline: float) -> tuple[bool, set[int] | None]:
    """Whether the search ran to its end, and the best plan. No cost is negative, so only what is demanded is tried."""
    if len(inst.members) > EXHAUSTIVE_LIMIT:
        raise SolverError(
            f"the exhaustive solver takes at most {EXHAUSTIVE_LIMIT} decisions, this problem has {len(inst.members)}. "
            "Use solver='cp_sat' or 'highs'."
        )
    search = _Search(inst, deadline)
    search.visit([(p, False) for p in inst.sinks], 0)
    return not search.stopped, search.best
