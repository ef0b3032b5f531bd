"""A report's data as tables for a terminal, at most 100 columns wide; what was refused, and why, is in the text and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..deploy.export import ranges_text
from .report import measured_part, plural, runner_up_text


def tables(title: str, data: Mapping[str, Any], lines: Sequence[str]) -> RenderableType:
    """Of an explained plan, of several, or of two compared. Names are text: nothing in them is markup."""
    parts: list[RenderableType] = [Text(title, "bold")]
    if "diff" in data:
        parts += [part for graph in data["diff"]["graphs"] for part in _difference(graph, data["diff"]["names"])]
    elif "rows" in data:
        parts += _plan(data)
    elif "cells" in data or "graphs" in data:
        for unit in data.get("cells") or data["graphs"]:
            parts += _race(unit)
            parts += [part for plan in unit["plans"] for part in _plan(plan)]
    else:
        parts += [Text(line) for line in lines]
    return Group(*parts)


def _table(*columns: str) -> Table:
    """A column whose name starts with > holds numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(
            name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=name.startswith(">"), overflow="fold"
        )
    return table


def _race(unit: Mapping[str, Any]) -> Iterator[RenderableType]:
    label = unit["graph"] if "graph" in unit else ranges_text(unit["ranges"])
    times = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in sorted(unit["times_s"].items(), key=lambda item: item[1]))
    yield Text(f"{label}: runs {unit['winner']}; measured {times or 'nothing: no race yet'}")
    yield from (Text(f"  note: {note}", "dim") for note in unit.get("notes", ()))


def _plan(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Text(
        f"{plan['kind']} graph: {_ms(plan['predicted_ns'])} ms predicted{measured_part(plan)}, {plan['status']} by {plan['solver']}, "
        f"gap {plan['gap']:.1%}"
    )
    profiled = any(r["profiled_ns"] for r in plan["regions"])
    clock = (">in a call",) if profiled else ()
    table = _table(">", "region", "kernel", ">ms", *clock, ">floor", "price", "runner-up", ">+ms", ">refused")
    for r in plan["regions"]:
        up = r["runner_up"]
        floor = f"{min(1.0, r['floor_ns'] / r['cost_ns']):.0%}" if r["floor_ns"] and r["cost_ns"] else ""
        over = "" if up is None else f"{(up['cost_ns'] - r['cost_ns']) / 1e6:+.3f}"
        what = Text(" + ".join((r["op"], *r["epilogue"])))
        refused = len({x["kernel"] for x in r["rejections"]})
        table.add_row(
            f"{r['count']}x",
            what,
            Text(r["kernel"], "bold"),
            _ms(r["cost_ns"]),
            *([_ms(r["profiled_ns"]) if r["profiled_ns"] else ""] if profiled else []),
            floor,
            Text(r["source"]),
            Text(runner_up_text(up) if up else "", "dim"),
            over,
            str(refused),
        )
    yield table
    yield from (Text(f"mask of {r['count']}x {r['op']}: {r['mask']}") for r in plan["regions"] if r["mask"])
    yield Text(f"{plural(plan['fused_nodes'], 'node')} in loops fused by TorchInductor")
    yield from (Text(f"{n}x conversion {kind}", "yellow") for kind, n in plan["conversions"]["kinds"].items() if "fused" not in kind)
    yield from (Text(note, "dim") for note in plan["notes"])


def _difference(graph: Mapping[str, Any], names: Sequence[str]) -> Iterator[RenderableType]:
    from .compare import both_sides, headline, parts, settings_lines

    yield Text(headline(graph))
    if graph["note"]:
        yield Text(graph["note"], "dim")
    if None in graph["objective_ns"]:
        return
    yield Text(parts(graph))
    yield from (Text(line) for line in settings_lines(graph))
    table = _table(">", "region", "node", names[0], ">ms", names[1], ">ms", ">change")
    for c in graph["changes"]:
        sides = [Text("\n".join(name for name, _ in side) or "fused loops") for side in both_sides(c)]
        prices = ["\n".join(_ms(ns) for _, ns in side) for side in both_sides(c)]
        change = Text(f"{(c['ns'][1] - c['ns'][0]) / 1e6:+.3f}", "green" if c["ns"][1] < c["ns"][0] else "yellow")
        table.add_row(f"{c['count']}x", Text(c["op"]), Text(c["nodes"], "dim"), sides[0], prices[0], sides[1], prices[1], change)
    for m in graph["conversions"]:
        counts = [f"{n} conversions" for n in m["count"]]
        table.add_row("", Text(m["kind"]), "", counts[0], "", counts[1], "", f"{(m['ns'][1] - m['ns'][0]) / 1e6:+.3f}")
    if table.row_count:
        yield table


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3f}"
