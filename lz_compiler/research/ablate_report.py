"""What `lz ablate` found: tables with confidence intervals, and figures (matplotlib, the `research` extra).

Intervals are percentile bootstraps over cases (Efron, Annals of Statistics 1979), since cases are what varies; comparisons are paired by
case and tested by flipping signs at random (a permutation test, Fisher 1935).
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .ablate import SOLVERS, is_trained, kendall

Row = Mapping[str, str]
DRAWS = 2000
AS_GOOD = 0.005  # a plan within this of the best is as good


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draw = random.Random(0)
    found = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return found[round(0.025 * (DRAWS - 1))], found[round(0.975 * (DRAWS - 1))]


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean of 0, by flipping signs."""
    draw, seen = random.Random(0), abs(sum(differences))
    hits = sum(abs(sum(d if draw.random() < 0.5 else -d for d in differences)) >= seen - 1e-12 for _ in range(DRAWS))
    return (hits + 1) / (DRAWS + 1)


def by_case(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, float]:
    """Mean over seeds, by case."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(value(row))
    return {case: statistics.fmean(values) for case, values in sorted(found.items())}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)])


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def exact(plans: Sequence[Row]) -> str:
    """The solver that the others are compared with: the first of ablate's order that ran."""
    ran = {r["solver"] for r in plans}
    return next((name for name in SOLVERS if name in ran), "")


def model_table(plans: Sequence[Row], device: str, experiment: str) -> str:
    """Cost models on one device, by one solver."""
    chosen = [r for r in plans if r["device"] == device and r["solver"] == exact(plans)]
    rows = [r for r in chosen if r["experiment"] == experiment or not is_trained(r["cost_model"])]
    reference = by_case((r for r in rows if r["cost_model"] == "measured"), lambda r: float(r["judged_ns"]))
    lines = []
    for name in dict.fromkeys(r["cost_model"] for r in rows):
        own = [r for r in rows if r["cost_model"] == name]
        regret = list(by_case(own, lambda r: float(r["regret"])).values())
        above = by_case(own, lambda r: float(r["judged_ns"]))
        above = {case: ns / reference[case] - 1 for case, ns in above.items() if case in reference}
        low, high = interval(regret)
        scored = [(float(r["tau"]), int(r["pairs"])) for r in own if int(r["pairs"])]
        tau = sum(t * n for t, n in scored) / max(sum(n for _, n in scored), 1)
        kernels = sum(int(r["kernels"]) for r in own)
        lines.append([
            name, f"{percent(statistics.median(regret))}", f"{percent(statistics.fmean(regret))} ({percent(low)} to {percent(high)})",
            percent(max(regret)), percent(statistics.fmean(above.values())) if above else "-",
            f"{sum(a <= 0.02 for a in above.values())}/{len(above)}",
            "-" if name == "measured" or not above else f"{paired_p(list(above.values())):.3f}",
            f"{tau:.2f}" if scored else "-",
            percent(sum(int(r["measured"]) for r in own) / kernels), percent(sum(int(r["abstained"]) for r in own) / kernels),
        ])  # fmt: skip
    head = [
        "cost model",
        "regret, median",
        "mean (95 %)",
        "worst",
        "above `measured`, mean",
        "within 2 % of it",
        "p",
        "tau",
        "kernels measured",
        "abstained",
    ]
    return table(head, lines)


def _against(plans: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
    """Plans by measured prices, and the least price of each case: those that have one."""
    rows = [r for r in plans if r["cost_model"] == "measured"]
    best = by_case((r for r in rows if r["solver"] == exact(rows)), lambda r: float(r["predicted_ns"]))
    return [r for r in rows if r["case"] in best], best


def solver_table(plans: Sequence[Row]) -> str:
    """Solvers on the same (measured) prices, all devices: regret by predicted price against the integer program."""
    rows, best = _against(plans)
    lines = []
    for name in dict.fromkeys(r["solver"] for r in rows):
        own = [r for r in rows if r["solver"] == name]
        lost = [float(r["predicted_ns"]) / best[r["case"]] - 1 for r in own]
        low, high = interval(lost)
        seconds = sorted(float(r["solve_s"]) for r in own)
        lines.append([
            name, f"{len(own)}/{len(best)}", percent(statistics.median(lost)),
            f"{percent(statistics.fmean(lost))} ({percent(low)} to {percent(high)})",
            percent(max(lost)), str(sum(v <= AS_GOOD for v in lost)), str(sum(v < -1e-9 for v in lost)), f"{paired_p(lost):.3f}",
            percent(statistics.fmean(float(r["gap"]) for r in own)), f"{statistics.median(seconds):.2f}", f"{seconds[-1]:.2f}",
        ])  # fmt: skip
    head = ["solver", "cases solved", "above the integer program, median", "mean (95 %)", "worst", f"within {percent(AS_GOOD)}", "below it",
            "p", "proved gap, mean", "seconds, median", "worst"]  # fmt: skip
    return table(head, lines)


def tau_table(prices: Sequence[Row], device: str, experiment: str) -> str:
    """Kendall's tau over pairs of kernels of one region, by op class."""
    rows = [r for r in prices if r["device"] == device and int(r["predicted_ns"]) > 0]
    rows = [r for r in rows if r["experiment"] == experiment or not is_trained(r["cost_model"])]
    ops = sorted({r["op"] for r in rows})
    lines = []
    for name in dict.fromkeys(r["cost_model"] for r in rows if not r["cost_model"].startswith("hybrid")):
        cells = [name]
        for op in ops:
            regions: dict[tuple[str, ...], list[tuple[float, float]]] = {}
            for r in rows:
                if r["op"] == op and r["cost_model"] == name:
                    place = r["case"], r["seed"], r["region"]
                    regions.setdefault(place, []).append((float(r["predicted_ns"]), float(r["measured_ns"])))
            scores = [kendall(pairs) for pairs in regions.values()]
            total = sum(n for _, n in scores)
            cells.append(f"{sum(s for s, _ in scores) / total:.2f} ({total})" if total else "-")
        lines.append(cells)
    return table(["cost model", *ops], lines)


def greedy_cases(plans: Sequence[Row]) -> str:
    """Where greedy is as good as the integer program, and where it is not, with what moves."""
    rows, best = _against(plans)
    lost = {r["case"]: (float(r["predicted_ns"]) / best[r["case"]] - 1, r["moved"]) for r in rows if r["solver"] == "greedy"}
    lines = [
        [case, percent(v), what.replace("|", "") or "conversions alone"]
        for case, (v, what) in sorted(lost.items(), key=lambda item: -item[1][0])
    ]
    return table(["case", "greedy is dearer by", "kernels, greedy's > the best plan's"], lines)


def report(out: Path) -> str:
    """All tables, as Markdown."""
    plans, prices = read(out / "plans.csv"), read(out / "prices.csv")
    devices = sorted({r["device"] for r in plans})
    parts = []
    for device in devices:
        cases = len({r["case"] for r in plans if r["device"] == device})
        for experiment in dict.fromkeys(r["experiment"] for r in plans if r["device"] == device):
            what = "no case of the family" if experiment == "models" else "no case of this device"
            parts += [f"### {device}, {cases} cases; learned models saw {what}", model_table(plans, device, experiment)]
        parts += [f"### {device}: Kendall's tau by op class (pairs)", tau_table(prices, device, "models")]
    parts += ["### Solvers, on the same prices", solver_table(plans), "### Greedy, case by case", greedy_cases(plans)]
    return "\n\n".join(parts) + "\n"


def figures(out: Path) -> list[Path]:
    """Write the figures as PNG beside the tables. ModelError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ModelError("figures need matplotlib: pip install 'lz-compiler[research]'.") from error
    plans, prices = read(out / "plans.csv"), read(out / "prices.csv")
    return [
        _predicted(pyplot, prices, out / "predicted.png"),
        _regret(pyplot, plans, out / "regret.png"),
        _effort(pyplot, plans, out / "effort.png"),
    ]


def _predicted(pyplot: Any, prices: Sequence[Row], path: Path) -> Path:
    names = [n for n in dict.fromkeys(r["cost_model"] for r in prices) if not n.startswith("hybrid") and n != "constant"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 4), sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [r for r in prices if r["cost_model"] == name and r["experiment"] == "models" and int(r["predicted_ns"]) > 0]
        for device in sorted({r["device"] for r in prices}):  # also those without a price, so that a device keeps its colour
            own = [r for r in rows if r["device"] == device]
            axis.scatter(
                [int(r["measured_ns"]) / 1e3 for r in own], [int(r["predicted_ns"]) / 1e3 for r in own], s=4, alpha=0.4, label=device
            )
        axis.axline((1, 1), (1e4, 1e4), color="black", linewidth=0.6)
        axis.set(xscale="log", yscale="log", title=name, xlabel="measured, us")
    axes[0][0].set_ylabel("predicted, us")
    axes[0][0].legend(loc="upper left", fontsize=7)
    return _saved(pyplot, figure, path)


def _regret(pyplot: Any, plans: Sequence[Row], path: Path) -> Path:
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    models = [r for r in plans if r["solver"] == exact(plans) and r["experiment"] == "models"]
    for axis, key, rows in ((axes[0], "cost_model", models), (axes[1], "solver", [r for r in plans if r["cost_model"] == "measured"])):
        names = list(dict.fromkeys(r[key] for r in rows))
        axis.set(ylabel="regret, %; diamonds: mean, 95 % interval", yscale="symlog")
        axis.boxplot([[100 * float(r["regret"]) for r in rows if r[key] == n] for n in names], tick_labels=names, showfliers=False)
        for place, name in enumerate(names, 1):
            means = [100 * v for v in by_case((r for r in rows if r[key] == name), lambda r: float(r["regret"])).values()]
            mean, (low, high) = statistics.fmean(means), interval(means)
            axis.errorbar([place], [mean], [[mean - low], [high - mean]], fmt="D", color="black", markersize=3, capsize=3)
        _noise_floor(axis, plans)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
        axis.tick_params(axis="x", rotation=30)
    return _saved(pyplot, figure, path)


def _effort(pyplot: Any, plans: Sequence[Row], path: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=(6, 4))
    rows = [r for r in plans if r["solver"] == exact(plans) and r["experiment"] == "models"]
    for name in dict.fromkeys(r["cost_model"] for r in rows):
        own = [r for r in rows if r["cost_model"] == name]
        part = [100 * int(r["measured"]) / max(int(r["kernels"]), 1) for r in own]
        axis.scatter(part, [100 * float(r["regret"]) for r in own], s=12, alpha=0.5, label=name)
    _noise_floor(axis, plans)
    axis.set(xlabel="kernels measured, %", ylabel="regret, %", yscale="symlog")
    axis.legend(fontsize=7)
    return _saved(pyplot, figure, path)


def _noise_floor(axis: Any, plans: Sequence[Row]) -> None:
    """The mean regret of planning by measurements: what no model can be told to beat."""
    own = [float(r["regret"]) for r in plans if r["cost_model"] == "measured" and r["solver"] == exact(plans)]
    if own:
        axis.axhline(100 * statistics.fmean(own), color="black", linewidth=0.8, linestyle="--", label="noise floor")


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
