"""What was measured of whole models, as JSON lines and as Markdown tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timing import Stats, geomean, ratio
from workloads import Suite


@dataclass(frozen=True)
class Cell:
    """One model under one column: `stats`, or the reason why there are none.

    `first_s` are the seconds of the first call, `stored_s` of a first call that finds LayerZero's timings and verdict; `plan` is
    what LayerZero says of itself.
    """

    stats: Stats | None = None
    error: float | None = None
    graphs: int = 0
    failed: str | None = None
    first_s: float | None = None
    stored_s: float | None = None
    plan: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One model: its columns were all measured in one process, in turn. `run` tells machine, versions and command."""

    model: str
    cells: Mapping[str, Cell]
    floors: Mapping[str, float] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)


def row_from(values: Mapping[str, Any]) -> Row:
    cells = {name: Cell(**{**cell, "stats": cell["stats"] and Stats(**cell["stats"])}) for name, cell in values["cells"].items()}
    return Row(**{**values, "cells": cells})


def report(rows: Sequence[Row], suite: Suite) -> str:
    """Machine and versions of every run, then the tables; where there are several runs, each row names its own."""
    done = sorted(rows, key=lambda row: any(cell.stats for cell in row.cells.values()))
    rows = list({(row.model, frozenset(row.cells)): row for row in done}.values())  # measured again: the last success counts
    runs = list({tuple(row.run.items()): row.run for row in rows}.values())
    numbers = [f" [{runs.index(row.run) + 1}]" if len(runs) > 1 else "" for row in rows]
    named = {row.model + number: row for row, number in zip(rows, numbers, strict=True)}
    columns = [column for column in suite.columns if any(column in row.cells for row in rows)]
    blocks = [(f"run [{i}]\n" if len(runs) > 1 else "") + "\n".join(f"{k}: {v}" for k, v in run.items()) for i, run in enumerate(runs, 1)]
    times = {name: [time_text(row.cells.get(column)) for column in columns] for name, row in named.items()}
    blocks.append(f"median ms ({str(suite.dtype)[6:]})\n{table(['model', *columns], times)}")
    blocks.append(speedup_block(named, columns, suite.baselines))
    blocks += [floor_block(named, columns), error_block(named, columns, suite)]
    blocks += [plan_block(named, columns), first_call_block(named, columns, suite)]
    blocks += [quiet_block(named)] if any("cores" in run for run in runs) else []
    return "\n\n".join(filter(None, blocks))


def quiet_block(rows: Mapping[str, Row]) -> str:
    """How far the machine was this run's own: a reader must know before believing any of the numbers."""
    measured = [(name, column, cell.stats) for name, row in rows.items() for column, cell in row.cells.items() if cell.stats]
    dropped = [f"{name} {column} {s.dropped}/{s.dropped + s.kept}" for name, column, s in measured if s.dropped]
    cores = {name: max((s.cores for model, _, s in measured if model == name), default=0.0) for name in rows}
    best = ", ".join(f"{name} {value:.1f}" for name, value in cores.items())
    return f"samples dropped as contended: {', '.join(dropped) or 'none'}\ncores had at best: {best}"


def speedup_block(rows: Mapping[str, Row], columns: Sequence[str], baselines: Sequence[str]) -> str:
    speedups = {name: speedups_of(row, columns, baselines) for name, row in rows.items()}
    lines = {name: [times_text(value) for value in row.values()] for name, row in speedups.items()}
    models = {row.model for row in rows.values()}
    for label, fold in (("geomean", geomean), ("minimum", min)):
        cells = []
        for column in columns:
            worst: dict[str, float] = {}  # of the runs of one model
            for name, row in speedups.items():
                value = row[column]
                if value is not None:
                    model = rows[name].model
                    worst[model] = min(value, worst.get(model, value))
            # A mean over fewer models than its neighbour's is not comparable with it, so say so.
            missing = f" ({len(worst)} of {len(models)})" if len(worst) < len(models) else ""
            cells.append(times_text(fold(worst.values())) + missing if worst else "-")
        lines[label] = cells
    title = f"speed-up over the best of: {', '.join(c for c in baselines if c in columns)}"
    return f"{title} (as far as they were measured in the same process)\n{table(['model', *columns], lines)}"


def speedups_of(row: Row, columns: Sequence[str], baselines: Sequence[str]) -> dict[str, float | None]:
    measured = {column: cell.stats for column, cell in row.cells.items() if cell.stats}
    best = min((measured[c] for c in baselines if c in measured), key=lambda stats: stats.median, default=None)
    return {column: ratio(best, measured[column]) if best and column in measured else None for column in columns}


def floor_block(rows: Mapping[str, Row], columns: Sequence[str]) -> str:
    lines = {}
    for name, row in rows.items():
        for what, floor in row.floors.items():
            stats = [cell.stats if (cell := row.cells.get(column)) else None for column in columns]
            lines[f"{name}: {what}"] = [f"{floor:.2f}", *(f"{floor / s.median:.2f}" if s else "-" for s in stats)]
    return block("fraction of the floor reached", ["model", "ms", *columns], lines)


def error_block(rows: Mapping[str, Row], columns: Sequence[str], suite: Suite) -> str:
    errors = {name: [row.cells[c].error if c in row.cells else None for c in columns] for name, row in rows.items()}
    lines = {name: ["-" if e is None else f"{e:.1e}" for e in row] for name, row in errors.items() if any(e is not None for e in row)}
    return block(f"relative L2 error against {str(suite.exact)[6:]}", ["model", *columns], lines)


def plan_block(rows: Mapping[str, Row], columns: Sequence[str]) -> str:
    """The plan's objective against what LayerZero's own race measured of it (`additive error` is their difference)."""
    lines = {}
    for name, row in rows.items():
        for column in columns:
            plan = row.cells[column].plan if column in row.cells else None
            if plan is not None:
                predicted, measured = plan["predicted_ms"], plan["measured_ms"]
                kernels = ", ".join(f"{count}x {kernel}" for kernel, count in plan["kernels"].items())
                error = f"{(measured - predicted) / measured:+.0%}" if measured else "-"
                numbers = [f"{predicted:.2f}", f"{measured:.2f}" if measured else "-", error, f"{plan['plan_s']:.1f}"]
                lines[f"{name}: {column}"] = [*numbers, ", ".join(plan["winners"]), kernels]
    heads = ["plan", "predicted ms", "measured ms", "additive error", "planned in s", "winner of the race", "kernels planned"]
    return block("predicted and measured time of the plans", heads, lines)


def first_call_block(rows: Mapping[str, Row], columns: Sequence[str], suite: Suite) -> str:
    lines = {}
    shown = [column for column in columns if suite.columns[column].cold]
    for name, row in rows.items():
        for column in suite.cold:
            cell = row.cells.get(column)
            if cell is not None and cell.stored_s is not None:
                others = [row.cells[c].first_s if c in row.cells else None for c in shown]
                seconds = [*others, cell.first_s, cell.stored_s]
                lines[f"{name}: {column}"] = ["-" if s is None else f"{s:.1f}" for s in seconds]
    heads = ["model", *shown, "LayerZero, nothing stored", "LayerZero, timings and verdict stored"]
    return block("seconds of the first call, Inductor's caches empty", heads, lines)


def time_text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.stats.median:.2f}" if cell.stats else f"failed: {cell.failed}"


def times_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def block(title: str, heads: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    return f"{title}\n{table(heads, lines)}" if lines else ""


def table(heads: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    grid = [list(heads), *([name, *cells] for name, cells in lines.items())]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in grid]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def reason(error: BaseException) -> str:
    # Dynamo wraps what a backend raises, under a first line that says only which backend it was.
    error = getattr(error, "inner_exception", error)
    first = next(iter(str(error).strip().splitlines()), "")
    return textwrap.shorten(f"{type(error).__name__}: {first}", 80, placeholder=" ...")
