"""Reports: what was planned, why, what was decided against, and how the prediction compares with the clock.

One Report is text (`str`), JSON (`to_json`) and a rich display; the text is made from the same data as the JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deploy.export import ranges_text
from ..errors import PlanError
from ..options import Options
from ..problem import LOOP
from ..types import EAGER, INDUCTOR, Candidate, Choice, Cost, Plan, Region
from .drawing import drawing, identity, module_of, unfolded
from .profiling import name_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..backend import GraphRecord
    from ..deploy.offline import CellPlan, ModelPlan
    from .profiling import Profile


@dataclass(frozen=True, slots=True)
class Report:
    """A title, plain data, and the same as lines of text."""

    title: str
    data: Mapping[str, Any]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((self.title, *self.lines))

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.data, indent=indent, sort_keys=True)

    def html(self) -> str:
        """One page that needs nothing else: markup, style and script of report.html, and this report's data as JSON in it."""
        data = json.dumps({"title": self.title, "text": self.lines, "data": self.data}, separators=(",", ":"))
        return _template().replace("/*DATA*/null", data.replace("<", "\\u003c"))  # no `</script>` or `<!--` in a name

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write `html()`. PlanError where that is not possible."""
        try:
            Path(path).write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write the page to {os.fspath(path)!r}: {error}. Give a file in a folder that is writable.") from error

    def _repr_html_(self) -> str:
        """The page in a notebook's cell, in a frame: its style and script touch nothing else."""
        from html import escape

        frame = "width:100%;height:720px;border:1px solid #8884;border-radius:8px"
        return f'<iframe sandbox="allow-scripts" style="{frame}" srcdoc="{escape(self.html())}"></iframe>'

    def __rich__(self) -> RenderableType:
        """Tables, for a terminal; what has none is text."""
        from .tables import tables

        return tables(self.title, self.data, self.lines)


@cache
def _template() -> str:
    return Path(__file__).with_name("report.html").read_text(encoding="utf-8")


def milliseconds(ns: float) -> str:
    return f"{ns / 1e6:.3f} ms"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _floor(choice: Choice, peaks: Mapping[str, float]) -> int | None:
    """Nanoseconds below which no kernel in these formats can be on this device (roofline), without a launch; None if not known."""
    rate = peaks.get(choice.candidate.in_formats[0].dtype if choice.candidate.in_formats else "float32", peaks.get("float32"))
    if not choice.nbytes or not rate or not peaks.get("bandwidth"):
        return None
    return round(max(choice.flops / rate, choice.nbytes / peaks["bandwidth"]) * 1e9)


def _rival(candidate: Candidate, cost: Cost, region: Region) -> dict[str, Any]:
    formats = {str(f) for f in (*candidate.in_formats, *candidate.out_formats)}
    return {
        "kernel": candidate.kernel, "cost_ns": cost.ns, "source": cost.source, "spread_ns": cost.spread, "factor": cost.factor,
        "epsilon": candidate.epsilon, "formats": sorted(formats), "tuning": dict(candidate.param("variant", ())),
        "lossy": candidate.param("lossy"), "nodes": len(candidate.region.nodes), "same_region": candidate.region.nodes == region.nodes,
    }  # fmt: skip


def _runner_up(choice: Choice) -> dict[str, Any] | None:
    """The best that was decided against for the same nodes: another kernel or dtype, rather than another tuning of the same; or kernels
    that cover these nodes between them, if that is cheaper or nothing else does it in one."""
    own = set(choice.candidate.region.nodes)
    rivals = [o for o in choice.alternatives if set(o[0].region.nodes) == own]
    best = next((o for o in rivals if _way(o[0]) != _way(choice.candidate)), rivals[0] if rivals else None)
    cover = _cover(own, [o for o in choice.alternatives if set(o[0].region.nodes) < own])
    left = len(own.difference(*(c.region.nodes for c, _ in cover)))
    if best and not (cover and not left and sum(k.weighed for _, k in cover) < best[1].weighed):
        cover, left = (best,), 0
    if not cover:
        return None
    named = Counter(c.kernel for c, _ in cover)
    kernels = [f"{n}x {kernel}" if n > 1 else kernel for kernel, n in sorted(named.items())]
    return {
        "kernel": " + ".join(kernels), "cost_ns": sum(k.ns for _, k in cover), "loops": left,
        "source": ", ".join(sorted({k.source for _, k in cover})), "factor": cover[0][1].factor,
        "dtype": _way(cover[0][0])[1] if best in cover and _way(cover[0][0])[1] != _way(choice.candidate)[1] else None,
    }  # fmt: skip


def _way(candidate: Candidate) -> tuple[str, str]:
    """Kernel, and the dtype that it reads."""
    return candidate.kernel, candidate.in_formats[0].dtype if candidate.in_formats else ""


def _cover(nodes: Set[str], parts: Sequence[tuple[Candidate, Cost]]) -> tuple[tuple[Candidate, Cost], ...]:
    """The cheapest of `parts` (at most 8 regions) that together cover what any of them must: nodes outside are left to fused loops."""
    regions = [frozenset(c.region.nodes) for c, _ in parts]
    needed = frozenset[str]().union(*(r for r in regions if not any(other < r for other in regions)))
    best: tuple[tuple[Candidate, Cost], ...] = ()
    for size in range(1, len(parts) + 1):
        for trial in combinations(parts, size):
            covered = [n for c, _ in trial for n in c.region.nodes]
            price = sum(k.weighed for _, k in trial)
            if len(covered) == len(set(covered)) and needed.issubset(covered) and (not best or price < sum(k.weighed for _, k in best)):
                best = trial
    return best


def runner_up_text(up: Mapping[str, Any]) -> str:
    dtype, loops = f" in {up['dtype']}" if up["dtype"] else "", f", without {plural(up['loops'], 'fused node')}" if up["loops"] else ""
    return f"{up['kernel']}{dtype}{loops}"


def describe_choice(choice: Choice, count: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    c = choice.candidate
    return {
        "op": c.region.op, "kernel": c.kernel, "count": count, "nodes": list(c.region.nodes),
        "formats": [[str(f) for f in c.in_formats], [str(f) for f in c.out_formats]],
        "cost_ns": choice.cost.ns, "source": choice.cost.source, "spread_ns": choice.cost.spread, "factor": choice.cost.factor,
        "epsilon": c.epsilon, "floor_ns": _floor(choice, peaks), "flops": choice.flops, "bytes": choice.nbytes,
        "tuning": dict(c.param("variant", ())), "mask": c.param("mask"),
        "reads_mask": "mask" in c.param("roles", ()),
        "epilogue": [p for k, p in c.params if k in ("act", "binary") and p],
        "runner_up": _runner_up(choice),
        "candidates": [_rival(o, cost, c.region) for o, cost in choice.alternatives],
        "rejections": [{"kernel": r.kernel, "code": r.code, "detail": r.detail} for r in choice.rejections],
    }  # fmt: skip


def _weighed(factor: float) -> str:
    return "" if factor == 1.0 else f" x{factor:g} by the policy"


def _grouped(choices: Sequence[Choice]) -> dict[Hashable, list[Choice]]:
    """Choices of repeated layers together."""
    groups: dict[Hashable, list[Choice]] = {}
    for choice in choices:
        if choice.candidate.kernel != LOOP:
            groups.setdefault(identity(choice), []).append(choice)
    return groups


def describe_plan(plan: Plan, profile: Profile | None = None) -> dict[str, Any]:
    """`profile`: what the clock said inside a call, for `profiled_ns` of regions and rows; None where it said nothing."""
    timed = {} if profile is None else profile.kernels.get(plan.fingerprint, {})
    loops = [c for c in plan.choices if c.candidate.kernel == LOOP]
    groups = _grouped(plan.choices)
    shown = sum(c.cost.ns for c in plan.choices) + sum(cost.ns for _, cost in plan.conversions)
    regions = [describe_choice(members[0], len(members), plan.peaks) for members in groups.values()]
    for region, members in zip(regions, groups.values(), strict=True):
        times = [timed.get(name_of(choice)) for choice in members]
        found = (module_of(plan, c.candidate.region.nodes) for c in members)
        region["modules"] = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", m) for m in found if m))
        region["profiled_ns"] = None if None in times else round(sum(t for t in times if t is not None) / len(times))
    rows = drawing(plan, {same: i for i, same in enumerate(groups)})
    for row in unfolded(rows) if timed else ():
        row["profiled_ns"] = sum(timed.get(name, 0) for name in row["names"]) or None
    return {
        "kind": plan.kind, "fingerprint": plan.fingerprint, "environment": dict(plan.environment),
        "status": str(plan.status), "solver": plan.solver, "predicted_ns": plan.predicted,
        "objective_ns": plan.objective, "bound_ns": plan.bound,
        "gap": plan.gap, "plan_s": plan.plan_s, "epsilon": plan.epsilon, "notes": list(plan.notes),
        "measured_ns": sum(c.cost.ns for c in plan.choices if c.cost.source == "measured"),
        "regions": regions, "rows": rows, "peaks": dict(plan.peaks),
        "fused_nodes": len(loops), "loops_ns": sum(c.cost.ns for c in loops), "calls_ns": plan.predicted - shown,
        "conversions": {
            "count": len(plan.conversions), "cost_ns": sum(cost.ns for _, cost in plan.conversions),
            "kinds": dict(Counter(f"{c.src} -> {c.dst}" for c, _ in plan.conversions)),
        },
    }  # fmt: skip


def measured_part(plan: Mapping[str, Any]) -> str:
    """How much of a described plan's prediction was measured: the rest is loops, conversions, and prices of a model."""
    return f", {plan['measured_ns'] / plan['predicted_ns']:.0%} of it measured" if plan["predicted_ns"] else ""


def _plan_lines(plan: Plan, profile: Profile | None = None) -> Iterator[str]:
    d = describe_plan(plan, profile)
    yield (
        f"  {plan.kind} graph: {milliseconds(plan.predicted)} predicted, {plan.status} by {plan.solver} "
        f"(bound {milliseconds(plan.bound)}, gap {plan.gap:.1%}), planned in {plan.plan_s:.2f} s{measured_part(d)}"
    )
    for r in d["regions"]:
        epilogue = f" + {' + '.join(r['epilogue'])}" if r["epilogue"] else ""
        times = f"{r['count']}x " if r["count"] > 1 else ""
        cost = f"{milliseconds(r['cost_ns'])} ({r['source']}, +-{milliseconds(r['spread_ns'])}){_weighed(r['factor'])}"
        clock = "" if r["profiled_ns"] is None else f", {milliseconds(r['profiled_ns'])} in a profiled call"
        yield f"    {times}{r['op']}{epilogue}: {r['kernel']}  {cost}{clock}"
        if r["modules"]:
            yield f"        in {', '.join(r['modules'])}"
        if r["mask"]:
            yield f"        mask {r['mask']}"
        up = r["runner_up"]
        if up:
            yield f"        runner-up {runner_up_text(up)}  {milliseconds(up['cost_ns'])} ({up['source']}){_weighed(up['factor'])}"
        names = dict.fromkeys(f"{x['kernel']} ({x['code']})" for x in r["rejections"])
        if names:
            yield f"        not {', '.join(names)}"
    yield f"    {plural(d['fused_nodes'], 'node')} in loops fused by TorchInductor"
    seen = [x for r in d["regions"] for x in r["rejections"]]
    reasons = {(x["code"], x["kernel"] if x["code"] in ("policy", "quarantined") else ""): x["detail"] for x in seen}
    yield from (f"    {f'{code}: {kernel}'.rstrip(': ')}: {detail}" for (code, kernel), detail in sorted(reasons.items()))
    yield from (f"    {note}" for note in plan.notes)
    for kind, count in d["conversions"]["kinds"].items():
        if "fused" not in kind:
            yield f"    {count}x conversion {kind}"


def stated(options: Options) -> dict[str, Any]:
    """The options that differ from their defaults, as plain values."""
    default = Options()
    found = {f.name: getattr(options, f.name) for f in fields(Options) if getattr(options, f.name) != getattr(default, f.name)}
    values = options.as_data()
    return {name: values.get(name, value) for name, value in found.items() if name not in ("cache_dir", "problems")}


def describe_record(record: GraphRecord) -> dict[str, Any]:
    predicted = sum(p.predicted for p in record.plans) / 1e9
    measured = record.times.get("layerzero")
    return {
        "graph": record.compile_id, "key": record.key, "winner": record.winner, "decided": record.decided,
        "options": stated(record.options), "times_s": dict(record.times), "predicted_s": predicted, "measured_s": measured,
        "additive_error": (measured - predicted) / measured if measured else None,
        "ranks": record.ranks or None, "error": record.error, "error_budget": record.options.error_budget, "notes": list(record.notes),
        "profiled": _profiled(record), "plans": [describe_plan(p, record.profile) for p in record.plans],
    }  # fmt: skip


def _profiled(record: GraphRecord) -> dict[str, int] | None:
    """Nanoseconds of a call, of this graph's kernels in it, and what the profiler adds."""
    if record.profile is None:
        return None
    kernels = sum(ns for plan in record.plans for ns in record.profile.kernels.get(plan.fingerprint, {}).values())
    return {"call_ns": record.profile.call_ns, "kernels_ns": kernels, "overhead_ns": record.profile.overhead_ns}


def _apart(error: float) -> str:
    """An additive error, in words: a bare sign can be read either way."""
    if error < -1:
        return f"the prices add up to {1 - error:.1f} times that"
    return f"{error:.1%} of it not explained by the prices" if error >= 0 else f"the prices are {-error:.1%} of it too high"


def _record_lines(record: GraphRecord) -> Iterator[str]:
    d = describe_record(record)
    racing = record.options.race and not record.options.deterministic
    state = "race not decided yet (it runs over the first calls); in the lead:" if racing and not record.decided else "runs"
    yield f"graph {record.compile_id}: {state} {record.winner}"
    for name, seconds in sorted(record.times.items(), key=lambda item: item[1]):
        yield f"  {name}: {seconds * 1e3:.3f} ms a call, measured end to end"
    if d["additive_error"] is not None:
        predicted, measured = d["predicted_s"] * 1e3, d["measured_s"] * 1e3
        yield f"  predicted {predicted:.3f} ms, measured {measured:.3f} ms: {_apart(d['additive_error'])}"
    if d["profiled"]:
        kernels, call, extra = (milliseconds(d["profiled"][name]) for name in ("kernels_ns", "call_ns", "overhead_ns"))
        yield f"  profiled: this graph's kernels take {kernels} of a call of {call}; the rest is fused loops and calls"
        yield f"  the profiler itself adds {extra} to a call, which is in neither"
    if record.error is not None:
        yield f"  measured error {record.error:.2e}, budget {record.options.error_budget:g}"
    if record.ranks:
        yield f"  ranks: {record.ranks}"
    yield from (f"  note: {note}" for note in record.notes)
    if record.winner in (INDUCTOR, EAGER) and record.times:
        yield LOST
    for plan in record.plans:
        yield from _plan_lines(plan, record.profile)


LOST = "  LayerZero's plan, which does not run:"


def explain_records(records: Sequence[GraphRecord], nothing: str = "") -> Report:
    """`nothing`: what is said where there are none."""
    title = f"LayerZero: {len(records)} graph{'s' if len(records) != 1 else ''}"
    lines = tuple(line for record in records for line in _record_lines(record)) or (nothing,)
    return Report(title, {"graphs": [describe_record(r) for r in records]}, lines)


def explain_plan(plan: Plan) -> Report:
    return Report("LayerZero: one plan", describe_plan(plan), tuple(_plan_lines(plan)))


def describe_cell(cell: CellPlan) -> dict[str, Any]:
    return {
        "ranges": {symbol: list(ends) for symbol, ends in cell.ranges.items()}, "fingerprint": cell.fingerprint, "winner": cell.winner,
        "times_s": dict(cell.times), "error": cell.error, "plans": [describe_plan(p) for p in cell.plans],
    }  # fmt: skip


def _cell_lines(cell: CellPlan) -> Iterator[str]:
    yield f"{ranges_text(cell.ranges)}: {cell.winner}"
    for name, seconds in sorted(cell.times.items(), key=lambda item: item[1]):
        yield f"  {name}: {seconds * 1e3:.3f} ms a call at the upper ends"
    if cell.error is not None:
        yield f"  measured error {cell.error:.2e}"
    if cell.winner in (INDUCTOR, EAGER) and cell.times:
        yield LOST
    for plan in cell.plans:
        yield from _plan_lines(plan)


def explain_model_plan(plan: ModelPlan) -> Report:
    """Each cell's ranges, winner, times and plans; and where they hold."""
    env = ", ".join(f"{k} {v}" for k, v in plan.environment.items())
    data = {
        "model": plan.model, "environment": dict(plan.environment), "options": dict(plan.options), "arguments": list(plan.arguments),
        "joint": None if plan.joint is None else asdict(plan.joint), "cells": [describe_cell(c) for c in plan.cells],
    }  # fmt: skip
    together = () if plan.joint is None else (str(plan.joint),)
    lines = (f"solved on {env}", *together, *(line for cell in plan.cells for line in _cell_lines(cell)))
    return Report(f"LayerZero: plan of {plan.model}, {len(plan.cells)} cell{'s' if len(plan.cells) != 1 else ''}", data, lines)
