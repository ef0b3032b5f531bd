"""Which decisions differ between two plans, and between a problem's plan and that of the problem with rules added (what-if)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..deploy import offline
from ..deploy.export import ranges_text
from ..errors import OptionError, PlanError, SolverError, unknown
from ..options import Options
from ..plan_io import load_problem, problem_name, read_limited
from ..planning import solve_within
from ..problem import CALL, LOOP, VIEW
from ..types import Problem, Solution
from .drawing import unfolded
from .report import Report, explain_model_plan, milliseconds, plural

if TYPE_CHECKING:
    from ..deploy.offline import ModelPlan

BUDGET_S = 60.0

Conversions = dict[str, tuple[int, int]]  # of each kind, between formats in memory: how many, and their ns


class Decision(NamedTuple):
    """One region of a plan as it was decided."""

    nodes: tuple[str, ...]
    op: str
    kernel: str
    tuning: str
    ns: int
    source: str
    formats: str = ""  # that it reads and writes


def formats_text(reads: Iterable[object], writes: Iterable[object]) -> str:
    """Formats of tensors, each once: `strided:float32, packed:float32 > strided:float32`."""
    return " > ".join(", ".join(dict.fromkeys(map(str, side))) for side in (reads, writes))


def changes(before: Sequence[Decision], after: Sequence[Decision]) -> list[dict[str, Any]]:
    """Groups of regions that share nodes and are decided unlike, equal groups once with their number; dearest first.

    `ns` is what all of a group's regions cost before and after; loops between them are not in it, the objective has them.
    """
    found: dict[object, dict[str, Any]] = {}
    for old, new in _components(before, after):
        decided = [sorted((d.nodes, d.kernel, d.tuning, d.formats) for d in side) for side in (old, new)]
        if decided[0] == decided[1]:
            continue
        same = tuple(tuple(sorted((d.op, len(d.nodes), d.kernel, d.tuning, d.formats, d.ns) for d in side)) for side in (old, new))
        first = {
            "op": ", ".join(dict.fromkeys(d.op for d in (*old, *new))), "nodes": ", ".join(d.nodes[-1] for d in old or new), "count": 0,
            "before": _shown(old), "after": _shown(new), "ns": [0, 0],
        }  # fmt: skip
        group = found.setdefault(same, first)
        group["count"] += 1
        for side, members in enumerate((old, new)):
            group["ns"][side] += sum(d.ns for d in members)
    return sorted(found.values(), key=lambda g: -max(g["ns"]))


def _shown(side: Sequence[Decision]) -> list[dict[str, Any]]:
    """Decisions that look alike once, with their number."""
    counts = Counter((d.op, d.kernel, d.tuning, d.formats, d.ns, d.source, len(d.nodes)) for d in side)
    names = ("op", "kernel", "tuning", "formats", "cost_ns", "source", "nodes")
    return [{**dict(zip(names, values, strict=True)), "count": count} for values, count in counts.items()]


def _components(before: Sequence[Decision], after: Sequence[Decision]) -> Iterator[tuple[list[Decision], list[Decision]]]:
    """Regions of both sides that are connected by common nodes."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for decision in (*before, *after):
        for node in decision.nodes[1:]:
            parent[root(node)] = root(decision.nodes[0])
    groups: dict[str, tuple[list[Decision], list[Decision]]] = {}
    for side, decisions in enumerate((before, after)):
        for decision in decisions:
            groups.setdefault(root(decision.nodes[0]), ([], []))[side].append(decision)
    yield from groups.values()


# --- two files ------------------------------------------------------------------------------------------------------------


def compare_files(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> Report:
    """Two plans of `lz.solve(...).save`, or two outputs of `lz explain --json`, graph by graph; of unlike files only where each has one.

    PlanError for anything else."""
    (one, first), (two, second) = (_plans(path) for path in (before, after))
    sides, names = [first, second], [os.fspath(before), os.fspath(after)]
    if one != two and len(first) == len(second) == 1:
        label = f"{next(iter(first))} against {next(iter(second))}"
        sides = [{label: plan} for side in sides for plan in side.values()]
    elif one != two:
        raise PlanError(f"{names[0]!r} holds {one}, {names[1]!r} {two}: give two plans, or two outputs of `lz explain --json`.")
    graphs = []
    for label in dict.fromkeys((*sides[0], *sides[1])):
        if label not in sides[0] or label not in sides[1]:
            held = [side[label]["objective_ns"] if label in side else None for side in sides]
            graphs.append(_graph(label, held, ([], []), f"only in {names[0] if label in sides[0] else names[1]}"))
            continue
        old, new = sides[0][label], sides[1][label]
        other = old["fingerprint"] != new["fingerprint"]
        note = "these are plans of two different graphs: regions are matched by the names of their nodes" if other else None
        objectives = [old["objective_ns"], new["objective_ns"]]
        decided, converted = [list(_decisions(p)) for p in (old, new)], [_conversions(p) for p in (old, new)]
        graphs.append(_graph(label, objectives, decided, note, converted) | {"settings": _settings(old, new)})
    return _report(f"LayerZero: {names[0]} against {names[1]}", names, graphs)


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[list[str]]:
    """What the plans were made for and asked for, where that differs: name, before, after."""
    rows = []
    for title in ("environment", "options"):
        sides = [plan.get(title) for plan in (old, new)]
        if all(isinstance(side, Mapping) for side in sides):
            default = Options().as_data() if title == "options" else {}  # `lz explain` tells only what is not
            told = [{k: v for k, v in {**default, **side}.items() if v is not None} for side in sides if side is not None]
            names = sorted({*told[0], *told[1]})
            rows += [[name, *(_told(side.get(name)) for side in told)] for name in names if told[0].get(name) != told[1].get(name)]
    return rows


def _told(value: object) -> str:
    return "not said" if value is None else value if isinstance(value, str) else json.dumps(value)


def _plans(path: str | os.PathLike[str]) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """What a file holds, in words, and its plans."""
    try:
        data = json.loads(read_limited(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(
            f"cannot read {os.fspath(path)!r}: {error}. Give a plan of `lz solve`, or what `lz explain --json` printed."
        ) from error
    if isinstance(data, dict) and "layerzero_model_plan" in data:
        data = explain_model_plan(offline.load_plan(path)).data
    if isinstance(data, dict) and "layerzero_problem" in data:
        raise PlanError(f"{os.fspath(path)!r} is a problem, which has no plan yet: lz explain {os.fspath(path)} --what-if RULE.")
    try:
        if "cells" in data:
            what, options = "cells", data.get("options")
            found = [(ranges_text({s: tuple(e) for s, e in c["ranges"].items()}), c["plans"], options) for c in data["cells"]]
        elif "graphs" in data:
            what = "compiled graphs"
            found = [(f"graph {i}", graph["plans"], graph.get("options")) for i, graph in enumerate(data["graphs"])]
        else:
            what, found = "one plan", [("the plan", [data], None)]
        plans: dict[str, Mapping[str, Any]] = {
            f"{label}, {p['kind']} {i}" if i else label: {**p, "options": options}
            for label, members, options in found for i, p in enumerate(members)
        }  # fmt: skip
        for plan in plans.values():
            list(_decisions(plan))
        return what, plans
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlanError(f"{os.fspath(path)!r} is neither a plan of `lz solve` nor what `lz explain --json` prints. Give one.") from error


def _decisions(plan: Mapping[str, Any]) -> Iterator[Decision]:
    """Every instance of every region of an explained plan."""
    for row in unfolded(plan["rows"]):
        if row["kind"] == "region":
            r = plan["regions"][row["region"]]
            tuning = ", ".join(f"{k}={v}" for k, v in r["tuning"].items())
            for nodes in row["nodes"]:
                what = " + ".join((r["op"], *r["epilogue"]))
                yield Decision(tuple(nodes), what, r["kernel"], tuning, r["cost_ns"], r["source"], formats_text(*r["formats"]))


def _conversions(plan: Mapping[str, Any]) -> Conversions:
    """Conversions between formats in memory, of an explained plan."""
    found: Conversions = {}
    for row in unfolded(plan["rows"]):
        if row["kind"] == "conversion":
            _count(found, f"{row['src']} -> {row['dst']}", len(row["names"]), row["total_ns"])
    return found


def _count(found: Conversions, kind: str, count: int, ns: int) -> None:
    before = found.get(kind, (0, 0))
    found[kind] = (before[0] + count, before[1] + ns)


# --- what if --------------------------------------------------------------------------------------------------------------


def what_if(problem: Problem, rules: Sequence[str], solver: str = "cp_sat", label: str = "the problem") -> Report:
    """Solve a problem as it is and with rules added, each `deny=KERNEL_OR_BACKEND` or `lock=KERNEL_OR_BACKEND`, and compare.

    A lock refuses all other kernels for the regions for which the named one has a candidate. OptionError for a rule that is none,
    that names a kernel without a candidate in the problem, or that leaves no plan.
    """
    return _what_if({label: (problem, None)}, rules, solver)


def what_if_plan(plan: ModelPlan, problems: str | os.PathLike[str], rules: Sequence[str], solver: str = "cp_sat") -> Report:
    """`what_if` for every graph of a plan of `lz.solve`, whose problems are in the folder `problems`. PlanError where one is not, or is
    that of another solve."""
    found = {}
    for cell in plan.cells:
        for i, p in enumerate(cell.plans):
            label = f"{ranges_text(cell.ranges)}, {p.kind} {i}" if i else ranges_text(cell.ranges)
            if not p.problem:
                raise PlanError(f"the plan of {label} was solved without its problem. Solve again: lz solve ... --problems FOLDER.")
            found[label] = load_problem(Path(problems) / problem_name(p.fingerprint, p.kind, p.problem)), p.objective
    return _what_if(found, rules, solver)


def _what_if(problems: Mapping[str, tuple[Problem, int | None]], rules: Sequence[str], solver: str) -> Report:
    """Of each problem, the objective of the plan that was made of it, where that is known."""
    kernels = {c.kernel for problem, _ in problems.values() for c in problem.candidates} - {LOOP, VIEW, CALL}
    graphs = []
    for label, (problem, planned) in problems.items():
        changed = problem
        for rule in rules:
            changed = _ruled(changed, rule, kernels)
        first = _solution(problem, solver)
        try:
            second = _solution(changed, solver)
        except SolverError as error:
            raise OptionError(f"{', '.join(rules)} leaves no plan for {label}: {error}") from error
        note = f"solved by {first.solver}: {first.status}, then {second.status}"
        if planned is not None and planned != first.objective:
            note += f"; the plan itself has {milliseconds(planned)}: another solver made it, or all cells together"
        note += "".join(map(partial(_left_beside, changed, second, kernels), rules))
        decided = [list(_solved(p, s)) for p, s in ((problem, first), (changed, second))]
        converted = [_converted(p, s) for p, s in ((problem, first), (changed, second))]
        graphs.append(_graph(label, [first.objective, second.objective], decided, note, converted))
    return _report(f"LayerZero: what if {', '.join(rules)}", ["as it is", ", ".join(rules)], graphs)


def _solution(problem: Problem, solver: str) -> Solution:
    return solve_within(problem, Options.resolve({"solver": solver, "solve_budget_s": BUDGET_S}))


def _solved(problem: Problem, solution: Solution) -> Iterator[Decision]:
    for index in solution.chosen:
        c, cost = problem.candidates[index], problem.costs[index]
        if c.kernel not in (LOOP, VIEW, CALL):
            tuning = ", ".join(f"{k}={v}" for k, v in c.param("variant", ()))
            epilogue = [str(p) for k, p in c.params if k in ("act", "binary") and p]
            what, formats = " + ".join((c.region.op, *epilogue)), formats_text(c.in_formats, c.out_formats)
            yield Decision(c.region.nodes, what, c.kernel, tuning, cost.ns, cost.source, formats)


def _converted(problem: Problem, solution: Solution) -> Conversions:
    found: Conversions = {}
    for index in solution.converted:
        c = problem.conversions[index]
        if "fused" not in c.src.layout and "fused" not in c.dst.layout:
            _count(found, f"{c.src} -> {c.dst}", 1, problem.conversion_costs[index].ns)
    return found


def _left_beside(problem: Problem, solution: Solution, kernels: Set[str], rule: str) -> str:
    """Where a lock's own region was given up for another that overlaps it, which the lock does not forbid."""
    action, _, name = rule.partition("=")
    named = _named(name, kernels)
    places = {n for c in problem.candidates if c.kernel in named for n in c.region.nodes}
    chosen = [problem.candidates[i] for i in solution.chosen]
    others = Counter(c.kernel for c in chosen if c.kernel in kernels - named and places.intersection(c.region.nodes))
    if action != "lock" or not others:
        return ""
    listed = ", ".join(f"{n}x {kernel}" for kernel, n in sorted(others.items()))
    return f"; {rule} holds for the regions that {name} has kernels for: {listed} stay in others that overlap these"


def _named(name: str, kernels: Set[str]) -> set[str]:
    return {k for k in kernels if k == name or k.partition(".")[0] == name}


def _ruled(problem: Problem, rule: str, kernels: Set[str]) -> Problem:
    action, _, name = rule.partition("=")
    if action not in ("deny", "lock") or not name:
        raise OptionError(f"--what-if {rule!r} is neither deny=KERNEL_OR_BACKEND nor lock=KERNEL_OR_BACKEND")
    named = _named(name, kernels)
    if not named:
        raise OptionError(unknown("kernel or backend in this problem", name, {*kernels, *(k.partition(".")[0] for k in kernels)}))
    if action == "deny":
        return _filtered(problem, lambda c: c.kernel not in named)
    locked = {frozenset(c.region.nodes) for c in problem.candidates if c.kernel in named}
    return _filtered(problem, lambda c: c.kernel in named or frozenset(c.region.nodes) not in locked)


def _filtered(problem: Problem, keep: Callable[[Any], bool]) -> Problem:
    kept = [i for i, c in enumerate(problem.candidates) if keep(c)]
    tied = tuple(problem.candidate_class[i] for i in kept) if problem.candidate_class else ()
    candidates, costs = tuple(problem.candidates[i] for i in kept), tuple(problem.costs[i] for i in kept)
    return replace(problem, candidates=candidates, costs=costs, candidate_class=tied)


# --- the report -----------------------------------------------------------------------------------------------------------


def _graph(
    label: str, objectives: Sequence[int | None], decided: Sequence[Sequence[Decision]], note: str | None,
    conversions: Sequence[Conversions] = ({}, {}),
) -> dict[str, Any]:  # fmt: skip
    """`prices_ns` and `conversions_ns` are parts of the objectives; what is left is loops, memory traffic and calls."""
    kinds = sorted({*conversions[0], *conversions[1]})
    moved = [
        {"kind": k, "count": [c.get(k, (0, 0))[0] for c in conversions], "ns": [c.get(k, (0, 0))[1] for c in conversions]} for k in kinds
    ]
    return {
        "label": label, "objective_ns": list(objectives), "regions": len(decided[0]), "note": note, "changes": changes(*decided),
        "prices_ns": [sum(d.ns for d in side) for side in decided],
        "conversions_ns": [sum(ns for _, ns in c.values()) for c in conversions],
        "conversions": [m for m in moved if m["count"][0] != m["count"][1]], "settings": [],
    }  # fmt: skip


def _report(title: str, names: list[str], graphs: list[dict[str, Any]]) -> Report:
    lines = tuple(line for graph in graphs for line in _lines(graph))
    return Report(title, {"diff": {"names": names, "graphs": graphs}}, lines)


def _lines(graph: Mapping[str, Any]) -> Iterator[str]:
    yield headline(graph)
    if graph["note"]:
        yield f"  {graph['note']}"
    if None in graph["objective_ns"]:
        return
    yield f"  {parts(graph)}"
    yield from (f"  {line}" for line in settings_lines(graph))
    for c in graph["changes"]:
        sides = [" and ".join(name for name, _ in side) or "loops" for side in both_sides(c)]
        yield f"  {c['count']}x {c['op']} ({c['nodes']}): {sides[0]} -> {sides[1]}  {(c['ns'][1] - c['ns'][0]) / 1e6:+.3f} ms"
    for m in graph["conversions"]:
        yield f"  conversions {m['kind']}: {m['count'][0]} -> {m['count'][1]}  {(m['ns'][1] - m['ns'][0]) / 1e6:+.3f} ms"


def headline(graph: Mapping[str, Any]) -> str:
    """A graph's objectives, `-` for that of a side that lacks it, and how many decisions differ."""
    old, new = graph["objective_ns"]
    told = " -> ".join("-" if ns is None else milliseconds(ns) for ns in (old, new))
    if old is None or new is None:
        return f"{graph['label']}: objective {told}"
    share = f" ({(new - old) / old:+.1%})" if old else ""
    differ = sum(c["count"] for c in graph["changes"])
    return f"{graph['label']}: objective {told}{share}, {differ} decisions differ, of {plural(graph['regions'], 'region')}"


def parts(graph: Mapping[str, Any]) -> str:
    """What the objectives are made of: a kernel may cost less and its neighbours' memory traffic more."""
    rest = [o - p - c for o, p, c in zip(graph["objective_ns"], graph["prices_ns"], graph["conversions_ns"], strict=True)]
    named = {"kernels": graph["prices_ns"], "conversions": graph["conversions_ns"], "fused loops, their memory traffic, other calls": rest}
    return "; ".join(f"{name} {milliseconds(a)} -> {milliseconds(b)}" for name, (a, b) in named.items())


def settings_lines(graph: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}: {before} -> {after}" for name, before, after in graph["settings"])


def both_sides(change: Mapping[str, Any]) -> list[list[tuple[str, int]]]:
    """The kernels before and after, each with its ns: and what else tells them apart, where the names do not."""
    sides = [change["before"], change["after"]]
    alike = len({repr(sorted((d["kernel"], d["tuning"]) for d in side)) for side in sides}) == 1
    moved = len({repr(sorted(d["formats"] for d in side)) for side in sides}) == 2
    narrowed = all(sides) and len({repr(sorted(_dtypes(d["formats"]) for d in side)) for side in sides}) == 2

    def name(d: Mapping[str, Any]) -> str:
        more = d["formats"] if alike and moved else plural(d["nodes"], "node") if alike else _dtypes(d["formats"]) if narrowed else ""
        text = f"{d['kernel']} {d['tuning']}".rstrip() + (f" ({more})" if more else "")
        return f"{d['count']}x {text}" if d["count"] > 1 else text

    return [[(name(d), d["cost_ns"] * d["count"]) for d in side] for side in sides]


def _dtypes(formats: str) -> str:
    """`strided:float32, packed:float32 > strided:bfloat16` as `float32 > bfloat16`."""
    sides = (", ".join(dict.fromkeys(f.rpartition(":")[2] for f in side.split(", "))) for side in formats.split(" > "))
    return " > ".join(dict.fromkeys(sides))
