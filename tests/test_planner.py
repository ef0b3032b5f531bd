"""The planner against an exhaustive search, the checker against damaged plans, and the checker's own rules by hand."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from lz_compiler import planner
from lz_compiler.errors import OptionError, SolverError
from lz_compiler.planner import SOLVERS, check, solve
from lz_compiler.types import Candidate, Conversion, Cost, Format, Problem, Region, Solution, Status

A, B, C = Format("strided", "float32"), Format("channels_last", "float32"), Format("strided", "bfloat16")
FORMATS = (A, B, C)
EPSILONS = (0.0, 0.0, 0.0, 3e-3, 4e-3)
BUDGETS = (0.0, 3e-3, 5e-3, 5e-3, 1e-2)  # 5e-3 is exactly a 3e-3 and a 4e-3
WORKSPACES = (0, 0, 0, 64, 128)
PLANS = (Status.OPTIMAL, Status.FEASIBLE)


def cost(ns: int) -> Cost:
    return Cost(ns, "assumed")


def kernel(nodes: str, inputs: dict[str, Format], outputs: dict[str, Format], epsilon: float = 0.0, workspace: int = 0) -> Candidate:
    region = Region("op", tuple(nodes.split()), tuple(inputs), tuple(outputs))
    ins, outs = tuple(inputs.values()), tuple(outputs.values())
    return Candidate(f"k_{nodes.replace(' ', '_')}", region, ins, outs, epsilon, workspace)


def problem(
    candidates: list[tuple[Candidate, int]],
    conversions: list[tuple[str, Format, Format, int]],
    sources: set[tuple[str, Format]],
    sinks: list[tuple[str, Format]],
    **more: object,
) -> Problem:
    return Problem(
        tuple(k for k, _ in candidates),
        tuple(cost(ns) for _, ns in candidates),
        tuple(Conversion(t, f, g) for t, f, g, _ in conversions),
        tuple(cost(ns) for *_, ns in conversions),
        frozenset(sources),
        tuple(sinks),
        **more,  # type: ignore[arg-type]
    )


# --- random problems --------------------------------------------------------------------------------------------------


def convex_sets(graph: nx.DiGraph, size: int) -> list[tuple[str, ...]]:
    """Sets of nodes that no path leaves and enters again; also unconnected ones, which is where cycles come from."""
    reach = {n: nx.descendants(graph, n) for n in graph}
    found = []
    for group in itertools.combinations(graph, size):
        outside = set(graph) - set(group)
        if not any(m in reach[a] and b in reach[m] for a in group for b in group for m in outside):
            found.append(group)
    return found


@st.composite
def dags(draw: st.DrawFn, low: int, high: int) -> nx.DiGraph:
    graph = nx.DiGraph()
    names = [f"n{i}" for i in range(draw(st.integers(low, high)))]
    for i, name in enumerate(names):
        graph.add_node(name)
        # Near neighbours mostly, so that chains, diamonds and parallel branches all turn up.
        earlier = names[max(0, i - 3) : i] if i else []
        for other in draw(st.lists(st.sampled_from(earlier), max_size=2, unique=True)) if earlier else []:
            graph.add_edge(other, name)
    return graph


MOVES = tuple((f, g) for f in FORMATS for g in FORMATS if f != g)


@st.composite
def problems(draw: st.DrawFn, low: int = 4, high: int = 9, groups: int = 5, tied: bool = False) -> Problem:
    """Three of four have a dear but certain plan: one exact kernel for each node, in one format throughout."""
    graph = draw(dags(low, high))
    safe = draw(st.sampled_from((True, True, True, False)))
    likely = st.sampled_from((A, A, B, B, C))
    entries = {f"in_{n}": None for n in graph if not graph.pred[n]}
    candidates: list[tuple[Candidate, int]] = []

    def add(nodes: tuple[str, ...], ns: int, exact: bool = False) -> None:
        reads = dict.fromkeys(p for n in nodes for p in (graph.pred[n] or [f"in_{n}"]) if p not in nodes)
        writes = [n for n in nodes if not graph.succ[n] or any(s not in nodes for s in graph.succ[n])]
        forms = st.just(A) if exact else likely
        epsilon, workspace = (0.0, 0) if exact else (draw(st.sampled_from(EPSILONS)), draw(st.sampled_from(WORKSPACES)))
        ins, outs = {t: draw(forms) for t in reads}, {t: draw(forms) for t in writes}
        candidates.append((kernel(" ".join(nodes), ins, outs, epsilon, workspace), ns))

    for node in graph:
        if safe:
            add((node,), draw(st.integers(15, 30)), exact=True)
        for _ in range(draw(st.integers(1, 2))):
            add((node,), draw(st.integers(0, 20)))
    pool = [group for size in (2, 2, 3) for group in convex_sets(graph, size)]
    for group in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=groups)) if pool else []:
        add(group, draw(st.integers(0, 7 * len(group))))
    tensors = [*graph, *entries]
    conversions = [(t, f, g, draw(st.integers(0, 6))) for t in tensors
                   for f, g in draw(st.lists(st.sampled_from(MOVES), min_size=1, max_size=4, unique=True))]  # fmt: skip
    exits = [n for n in graph if not graph.succ[n]]
    ends = [(t, A if safe else draw(likely)) for t in exits if draw(st.booleans())]
    # Also tensors that are read inside the graph, and one tensor in two formats.
    ends += draw(st.lists(st.tuples(st.sampled_from(list(graph)), st.sampled_from((A, A, B))), min_size=1, max_size=2))
    classes = list(range(len(candidates)))
    index = st.integers(0, len(classes) - 1)
    for i, j in draw(st.lists(st.tuples(index, index), min_size=2, max_size=4)) if tied else []:
        if set(candidates[i][0].region.nodes).isdisjoint(candidates[j][0].region.nodes):
            classes[i] = classes[j]
    return problem(
        candidates,
        conversions,
        {(t, A if safe else draw(likely)) for t in entries},
        ends,
        error_budget=draw(st.sampled_from(BUDGETS)),
        memory_limit=draw(st.sampled_from((None, None, 100))),
        candidate_class=tuple(classes) if tied else (),
        tensor_class={t: draw(st.integers(0, 3)) for t in tensors if draw(st.booleans())} if tied else {},
    )


def all_plans(given: Problem) -> Iterator[Solution]:
    """Every subset of candidates and conversions that the checker accepts: shares nothing with any solver."""
    n, m = len(given.candidates), len(given.conversions)
    for bits in itertools.product((False, True), repeat=n + m):
        chosen = tuple(i for i in range(n) if bits[i])
        converted = tuple(i for i in range(m) if bits[n + i])
        ns = sum(given.costs[k].ns for k in chosen) + sum(given.conversion_costs[c].ns for c in converted)
        plan = Solution(chosen, converted, ns, 0, Status.FEASIBLE, "brute")
        if not check(given, plan):
            yield plan


def agree(given: Problem, *solvers: str) -> Solution:
    """All solvers find the exhaustive optimum or agree that there is none; greedy finds a plan that is no better."""
    best = solve(given, "exhaustive", 60.0)
    assert best.status in (Status.OPTIMAL, Status.INFEASIBLE)
    assert check(given, best) == []
    for name in solvers:
        found = solve(given, name, 60.0)
        assert check(given, found) == [], name
        if name == "dynamic" and found.status is Status.NOT_APPLICABLE:
            continue
        if name == "greedy":
            assert found.status is Status.INFEASIBLE or found.objective >= best.objective
            assert best.status is Status.OPTIMAL or found.status is Status.INFEASIBLE
            continue
        assert (found.status, found.objective, found.bound) == (best.status, best.objective, best.bound), name
    return best


def agree_on_any(given: Problem) -> None:
    best = agree(given, "cp_sat", "highs", "dynamic", "greedy")
    event(f"{best.status}, conversions {bool(best.converted)}")
    event(f"fused {any(len(given.candidates[k].region.nodes) > 1 for k in best.chosen)}")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_solvers_agree(given: Problem) -> None:
    agree_on_any(given)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(problems())
def test_solvers_agree_on_many(given: Problem) -> None:
    agree_on_any(given)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(high=6, groups=3, tied=True))
def test_solvers_agree_on_tied_problems(given: Problem) -> None:
    event(f"{agree(given, 'cp_sat', 'highs', 'dynamic', 'greedy').status}")


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(problems(high=6, groups=3, tied=True))
def test_solvers_agree_on_many_tied_problems(given: Problem) -> None:
    agree(given, "cp_sat", "highs", "dynamic", "greedy")


def test_cp_sat_finds_the_optimum_that_its_presolve_loses() -> None:
    """What is left of a random problem for which ortools 9.15 proves 15 to be optimal (google/or-tools#5293)."""
    knapsack = (*((d, 24739011600) for d in (1, 6, 10, 11)), (13, 43980465067))
    rows = [
        (((0, 1), (8, 1)), 1),
        (((3, 1), (8, 1)), 1),
        (((1, -1), (6, 1)), 0),
        (((3, -1), (5, 1), (6, 1), (8, -1)), 0),
        (((5, -1), (6, -1), (9, 1), (10, 1), (11, 1)), 0),
        (((5, -1), (10, 1), (2, -1), (4, 1)), 0),
        (((6, -1), (11, 1), (2, 1), (4, -1)), 0),
        (((6, -1), (2, 1)), 0),
        (((0, -1), (1, -1), (8, -1)), -1),
        (((12, -1), (13, -1)), -1),
        (knapsack, 2**36),
    ]
    costs = [15 if d in (9, 12) else 0 for d in range(14)]
    answer = planner._cp_sat(costs, rows, 10.0, frozenset())
    assert answer.status is Status.OPTIMAL
    assert sum(costs[d] for d in answer.used or ()) == answer.bound == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(low=2, high=3, groups=1), st.data())
def test_optimum_is_the_cheapest_plan_that_the_checker_accepts(given: Problem, data: st.DataObject) -> None:
    keep = max(0, 11 - len(given.candidates))
    small = replace(given, conversions=given.conversions[:keep], conversion_costs=given.conversion_costs[:keep])
    best = min((plan.objective for plan in all_plans(small)), default=None)
    for name in ("cp_sat", "exhaustive"):
        found = solve(small, name)
        assert (found.objective if found.status is Status.OPTIMAL else None) == best, name


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_greedy_finds_a_plan_where_single_nodes_have_one(given: Problem) -> None:
    single = [len(k.region.nodes) == 1 for k in given.candidates]
    alone = replace(
        given,
        candidates=tuple(itertools.compress(given.candidates, single)),
        costs=tuple(itertools.compress(given.costs, single)),
    )
    assume(solve(alone, "exhaustive").status is Status.OPTIMAL)
    for each in (given, alone):
        found = solve(each, "greedy")
        assert found.status is Status.FEASIBLE
        assert check(each, found) == []


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
def test_damaged_plans_fail_the_check(given: Problem) -> None:
    good = solve(given, "exhaustive")
    assume(good.status is Status.OPTIMAL and good.chosen)
    assert check(given, good) == []

    def priced(chosen: tuple[int, ...], converted: tuple[int, ...]) -> Solution:
        ns = sum(given.costs[k].ns for k in chosen) + sum(given.conversion_costs[c].ns for c in converted)
        return replace(good, chosen=chosen, converted=converted, objective=ns, bound=0, status=Status.FEASIBLE)

    # The exhaustive search takes only what is demanded, so nothing in its plan can be spared.
    for k in good.chosen:
        assert check(given, priced(tuple(i for i in good.chosen if i != k), good.converted)), "a candidate less"
    for c in good.converted:
        assert check(given, priced(good.chosen, tuple(i for i in good.converted if i != c))), "a conversion less"
    covered = {n for k in good.chosen for n in given.candidates[k].region.nodes}
    for k, candidate in enumerate(given.candidates):
        if k not in good.chosen and covered.intersection(candidate.region.nodes):
            assert check(given, priced(tuple(sorted({*good.chosen, k})), good.converted)), "a node covered twice"
    produced = set(given.sources)
    for k in good.chosen:
        produced.update(zip(given.candidates[k].region.outputs, given.candidates[k].out_formats, strict=True))
    for c, conversion in enumerate(given.conversions):
        if (conversion.tensor, conversion.src) not in produced:
            assert check(given, priced(good.chosen, tuple(sorted({*good.converted, c})))), "a conversion from nothing"
    assert check(given, replace(good, objective=good.objective + 1, bound=good.objective + 1))
    assert check(given, replace(good, bound=good.objective - 1))
    assert check(given, replace(good, bound=good.objective + 1, status=Status.FEASIBLE))
    assert check(given, replace(good, chosen=good.chosen * 2))
    assert check(given, replace(good, chosen=(*good.chosen, len(given.candidates))))
    assert check(given, replace(good, status=Status.INFEASIBLE))
    used = [given.candidates[k] for k in good.chosen]
    if any(k.epsilon for k in used):
        assert check(replace(given, error_budget=2.9e-3), good)
    if any(k.workspace for k in used):
        assert check(replace(given, memory_limit=63), good)


# --- each rule by hand ------------------------------------------------------------------------------------------------


def two_knots() -> Problem:
    """a -> b and c -> d; {a, d} and {b, c} are both convex and both cheap, but each waits for the other."""
    return problem(
        [
            (kernel("a", {"x": A}, {"a": A}), 10),
            (kernel("b", {"a": A}, {"b": A}), 10),
            (kernel("c", {"x": A}, {"c": A}), 10),
            (kernel("d", {"c": A}, {"d": A}), 10),
            (kernel("a d", {"x": A, "c": A}, {"a": A, "d": A}), 5),
            (kernel("b c", {"a": A, "x": A}, {"b": A, "c": A}), 6),
        ],
        [],
        {("x", A)},
        [("b", A), ("d", A)],
    )


@pytest.mark.parametrize("name", ["cp_sat", "highs", "exhaustive"])
def test_candidates_that_wait_for_each_other_are_not_used_together(name: str) -> None:
    given = two_knots()
    found = solve(given, name)
    assert (found.chosen, found.objective, found.status) == ((1, 2, 4), 25, Status.OPTIMAL)
    assert check(given, found) == []
    both = Solution((4, 5), (), 11, 11, Status.OPTIMAL, "hand")
    assert any("wait for each other" in line for line in check(given, both))


def test_dynamic_and_greedy_on_a_cycle() -> None:
    assert solve(two_knots(), "dynamic").status is Status.NOT_APPLICABLE
    found = solve(two_knots(), "greedy")
    assert found.status is Status.FEASIBLE
    assert check(two_knots(), found) == []


def test_longer_cycles_are_cut_with_all_their_alternatives() -> None:
    """Two knots with a chain of three-way choices between them: a cut per choice would take 3^6 rounds."""
    steps = 6
    chain = [(kernel(f"m{i}", {f"m{i - 1}" if i else "a": A}, {f"m{i}": A}), 3 + j) for i in range(steps)
             for j in range(3)]  # fmt: skip
    last = f"m{steps - 1}"
    given = problem(
        [
            *chain,
            (kernel("a", {"x": A}, {"a": A}), 10),
            (kernel("b", {last: A}, {"b": A}), 10),
            (kernel("c", {"x": A}, {"c": A}), 10),
            (kernel("d", {"c": A}, {"d": A}), 10),
            (kernel("a d", {"x": A, "c": A}, {"a": A, "d": A}), 5),
            (kernel("b c", {last: A, "x": A}, {"b": A, "c": A}), 6),
        ],
        [],
        {("x", A)},
        [("b", A), ("d", A)],
    )
    found = solve(given, "cp_sat", 20.0)
    assert (found.status, found.objective) == (Status.OPTIMAL, 3 * steps + 25)
    assert found.wall_s < 5


def test_no_conversion_starts_from_a_converted_format() -> None:
    given = problem(
        [(kernel("a", {"x": A}, {"a": A}), 1), (kernel("b", {"a": C}, {"b": A}), 1)],
        [("a", A, B, 1), ("a", B, C, 1)],
        {("x", A)},
        [("b", A)],
    )
    assert agree(given, "cp_sat", "highs", "dynamic", "greedy").status is Status.INFEASIBLE
    direct = replace(given, conversions=(*given.conversions, Conversion("a", A, C)),
                     conversion_costs=(*given.conversion_costs, cost(50)))  # fmt: skip
    assert agree(direct, "cp_sat", "highs", "dynamic").converted == (2,)


def test_conversions_do_not_hold_each_other_up() -> None:
    given = problem([], [("x", A, B, 0), ("x", B, A, 0)], set(), [("x", A)])
    assert agree(given, "cp_sat", "highs", "dynamic", "greedy").status is Status.INFEASIBLE


def test_a_conversion_is_paid_once_for_all_readers() -> None:
    readers = [(kernel(f"r{i}", {"a": B}, {f"r{i}": A}), 1) for i in range(4)]
    slow = [(kernel(f"r{i}", {"a": A}, {f"r{i}": A}), 5) for i in range(4)]
    given = problem(
        [(kernel("a", {"x": A}, {"a": A}), 1), *readers, *slow],
        [("a", A, B, 10)],
        {("x", A)},
        [(f"r{i}", A) for i in range(4)],
    )
    assert agree(given, "cp_sat", "highs", "dynamic").objective == 1 + 10 + 4


@pytest.mark.parametrize("name", ["cp_sat", "highs", "dynamic", "exhaustive"])
def test_a_tensor_is_read_and_returned_in_two_formats(name: str) -> None:
    """Here one format stays in use while a conversion starts from it, which a flow would forbid."""
    move, sources = ("a", A, B, 3), {("x", A)}
    make = (kernel("a", {"x": A}, {"a": A}), 1)
    returned = problem([make, (kernel("b", {"a": A}, {"b": A}), 1)], [move], sources, [("a", B), ("b", A)])
    twice = Candidate("twice", Region("op", ("b",), ("a", "a", "a"), ("b", "b")), (A, B, A), (A, A))
    other = (kernel("b", {"a": C}, {"b": A}), 1)
    for each in (returned, problem([make, (twice, 1), other], [move], sources, [("b", A), ("b", A)])):
        found = solve(each, name)
        assert (found.chosen, found.converted, found.objective) == ((0, 1), (0,), 5)
        assert check(each, found) == []


def test_a_tied_conversion_starts_from_a_produced_format_everywhere() -> None:
    given = problem(
        [(kernel("a", {"x": A}, {"a": A}), 1), (kernel("b", {"a": B}, {"b": A}), 1)],
        [("a", A, B, 1), ("z", A, B, 1), ("z", B, A, 1)],
        {("x", A), ("z", A)},
        [("b", A)],
        tensor_class={"a": 0, "z": 0},
    )
    assert agree(given, "cp_sat", "highs", "greedy").objective == 4  # z is converted along
    alone = Solution((0, 1), (0,), 3, 0, Status.FEASIBLE, "hand")
    assert any("unlike the others" in line for line in check(given, alone))
    assert check(replace(given, tensor_class={}), alone) == []
    without = replace(given, sources=frozenset({("x", A), ("z", B)}))
    assert agree(without, "cp_sat", "highs", "greedy").status is Status.INFEASIBLE


def test_greedy_loses_where_conversions_decide() -> None:
    """Each op alone is one nanosecond faster in the other format, and each conversion costs a hundred."""
    candidates = []
    for i in range(6):
        before = f"n{i - 1}" if i else "x"
        fast, slow = (B, A) if i % 2 else (A, B)
        candidates += [(kernel(f"n{i}", {before: f}, {f"n{i}": f}), ns) for f, ns in ((fast, 9), (slow, 10))]
    both = ((A, B), (B, A))
    moves = [(t, f, g, 100) for t in ("x", *(f"n{i}" for i in range(6))) for f, g in both]
    given = problem(candidates, moves, {("x", A)}, [("n5", A)])
    assert agree(given, "cp_sat", "highs", "dynamic").objective == 57
    greedy = solve(given, "greedy")
    assert greedy.objective == 54 + 600
    assert check(given, greedy) == []


def test_errors_add_in_squares_and_the_exact_budget_is_allowed() -> None:
    ops = []
    for i in range(9):
        before = f"n{i - 1}" if i else "x"
        ops.append((kernel(f"n{i}", {before: A}, {f"n{i}": A}, epsilon=0.1 / 3), 1))
        ops.append((kernel(f"n{i}", {before: A}, {f"n{i}": A}), 9))
    given = problem(ops, [], {("x", A)}, [("n8", A)], error_budget=0.1)
    for name in ("cp_sat", "highs", "exhaustive"):
        assert solve(given, name).objective == 9
        assert solve(replace(given, error_budget=0.0999), name).objective == 17
        assert solve(replace(given, error_budget=0.0), name).objective == 81
    assert solve(given, "dynamic").objective == 9
    assert solve(replace(given, error_budget=0.0999), "dynamic").status is Status.NOT_APPLICABLE


def chain(layers: int, ops: int = 5, ways: int = 4, tied: bool = True) -> Problem:
    """Identical layers: `ops` operators in a row, with a skip connection; `ways` kernels for each in three formats.

    A layer begins and ends in one format, so that the first and the last are like the others and ties cost nothing.
    """
    candidates: list[tuple[Candidate, int]] = []
    classes: list[int] = []
    moves = [("x", A, g, 11 + ops) for g in (B, C)]
    for i in range(layers * ops):
        inner = i % ops
        entry = f"t{i - inner - 1}" if i >= ops else "x"
        for way in range(ways):
            read, write = FORMATS[(way + inner) % 3], FORMATS[(way * 2 + inner) % 3] if inner < ops - 1 else A
            inputs = {f"t{i - 1}" if inner else entry: read} | ({entry: A} if inner == ops - 1 else {})
            candidates.append((kernel(f"t{i}", inputs, {f"t{i}": write}), 100 + (37 * (way + 1) * (inner + 3)) % 41))
            classes.append(inner * ways + way)
        moves += [(f"t{i}", f, g, 11 + inner + 1) for f in FORMATS for g in FORMATS if f != g]
    last = f"t{layers * ops - 1}"
    ties = {f"t{i}": i % ops for i in range(layers * ops - 1)} | {"x": ops - 1}
    return problem(
        candidates, moves, {("x", A)}, [(last, A)],
        candidate_class=tuple(classes) if tied else (), tensor_class=ties if tied else {},
    )  # fmt: skip


def test_ties_take_one_decision_for_all_layers() -> None:
    tied, free = chain(40), chain(40, tied=False)
    a, b = solve(tied), solve(free)
    assert (a.status, b.status) == (Status.OPTIMAL, Status.OPTIMAL)
    assert check(tied, a) == []
    assert check(free, a) == []
    assert check(free, b) == []
    assert a.objective == b.objective
    assert len({tied.candidate_class[k] for k in a.chosen}) == 5
    assert len(a.chosen) == 200
    assert a.converted
    assert a.wall_s < 2
    cheaper = a.objective - tied.costs[a.chosen[0]].ns
    less = replace(a, chosen=a.chosen[1:], objective=cheaper, bound=0, status=Status.FEASIBLE)
    assert any("unlike the others" in line for line in check(tied, less))


def hard() -> Problem:
    """Hundreds of independent errors against one budget, in formats that all have to be brought together."""
    ops, moves = [], []
    for i in range(300):
        before = {f"n{j}": FORMATS[(i + j) % 3] for j in (i - 1, i - 7, i - 19) if j >= 0} or {"x": A}
        for way in range(4):
            inputs = {t: FORMATS[(FORMATS.index(f) + way) % 3] for t, f in before.items()}
            ops.append((kernel(f"n{i}", inputs if i else {"x": A}, {f"n{i}": FORMATS[way % 3]}, epsilon=1e-3 * way),
                        1000 - 97 * way - (i * 61 + way * 29) % 89))  # fmt: skip
        moves += [(f"n{i}", f, g, 150 + (i * 31) % 47) for f in FORMATS for g in FORMATS if f != g]
    return problem(ops, moves, {("x", A)}, [("n299", A)], error_budget=1.2e-2)


@pytest.mark.parametrize("name", ["cp_sat", "highs"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_time_out_is_feasible_with_an_honest_bound(name: str, seconds: float) -> None:
    given = hard()
    found = solve(given, name, seconds)
    assert found.status is Status.FEASIBLE
    assert found.chosen
    assert check(given, found) == []
    assert 0 <= found.bound < found.objective
    assert found.gap > 0
    assert found.objective <= solve(given, "greedy").objective
    better = solve(given, name, 0.0, hint=found)
    assert better.objective <= found.objective


def test_a_wrong_hint_is_harmless() -> None:
    given = two_knots()
    for hint in (Solution((4, 5), (), 11, 11, Status.OPTIMAL, "x"), Solution((99,), (7,), 0, 0, Status.OPTIMAL, "x")):
        for name in ("cp_sat", "highs"):
            assert solve(given, name, hint=hint).objective == 25


@settings(max_examples=80, deadline=None)
@given(problems(tied=True), st.integers(0, 2**16))
def test_local_search_is_valid_and_never_worse_than_its_start(given: Problem, seed: int) -> None:
    """Also by an objective of the caller's, which knows nothing of prices."""
    greedy = solve(given, "greedy")
    assume(greedy.status is Status.FEASIBLE)
    exact = solve(given, "cp_sat")
    found = solve(given, "local_search")
    assert not check(given, found)
    assert exact.objective <= found.objective <= greedy.objective
    event("better than greedy" if found.objective < greedy.objective else "as greedy")
    assert solve(given, "local_search", hint=exact).objective == exact.objective
    asked: dict[tuple[object, ...], float] = {}

    def clock(plan: Solution) -> float:
        assert not check(given, plan)
        where = plan.chosen, plan.converted
        assert where not in asked
        return asked.setdefault(where, random.Random(repr((seed, where))).random())

    other = solve(given, "local_search", objective=clock)
    assert not check(given, other)
    assert asked[other.chosen, other.converted] == min(asked.values())
    assert (greedy.chosen, greedy.converted) in asked


def test_the_same_problem_gives_the_same_plan() -> None:
    flat = problem(  # many equally good plans
        [(kernel(f"n{i}", {f"n{i - 1}" if i else "x": A}, {f"n{i}": A}), 5) for i in range(30) for _ in range(4)],
        [],
        {("x", A)},
        [("n29", A)],
    )
    for each in (flat, chain(6, tied=False)):
        for name in SOLVERS[:4]:
            first, second = solve(each, name), solve(each, name)
            assert replace(first, wall_s=0.0) == replace(second, wall_s=0.0)


def test_trivial_and_refused_problems() -> None:
    given = problem([], [], {("x", A)}, [("x", A)])
    for name in SOLVERS:
        found = solve(given, name)
        assert (found.chosen, found.objective) == ((), 0)
        assert found.status in PLANS
    for name in SOLVERS:
        assert solve(replace(given, sinks=(("x", B),)), name).status is Status.INFEASIBLE
    with pytest.raises(OptionError, match="cp_sat"):
        solve(given, "cpsat")
    with pytest.raises(SolverError, match="at most"):
        solve(chain(10, tied=False), "exhaustive")
    with pytest.raises(SolverError, match="negative"):
        solve(problem([(kernel("a", {}, {"a": A}), -1)], [], set(), []), "greedy")


def test_importing_the_planner_is_light() -> None:
    code = f"import sys; import {planner.__name__}; print([m for m in ('ortools', 'networkx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
