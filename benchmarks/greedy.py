"""What solving for kernels, formats and conversions together is worth: the plan against the per-op greedy one.

    python benchmarks/greedy.py [--cases 'llama;resnet50'] [--rounds 40] [--cache-dir DIR]

Both plans are made from the same stored timings, without a race (nothing else may run instead), and their calls are timed
in turn. Greedy takes the cheapest kernel of each op and then pays for the conversions that this needs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import workloads_cpu
from models import header, progress
from tables import table
from timing import Stats, interleave, ratio
from torch import nn
from workloads import Workload

SOLVERS = ("cp_sat", "greedy")


def mlp(width: int, rows: int) -> Workload:
    """Few rows through square layers: a bfloat16 product reads half the weight, but someone must convert the weight."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())]
    return Workload(nn.Sequential(*layers), {"input": torch.randn(rows, width)})


@dataclass(frozen=True)
class Case:
    model: Callable[[], Workload]
    options: Mapping[str, Any]


CASES = {
    "mlp 256, 8 rows": Case(lambda: mlp(256, 8), {"error_budget": 5e-2}),
    "mlp 512, 2 rows": Case(lambda: mlp(512, 2), {"error_budget": 5e-2}),
    "mlp 512, 8 rows": Case(lambda: mlp(512, 8), {"error_budget": 5e-2}),
    "mlp 512, 32 rows": Case(lambda: mlp(512, 32), {"error_budget": 5e-2}),
    "llama": Case(lambda: workloads_cpu.llama("cpu"), {"error_budget": 5e-2}),
    "resnet50": Case(lambda: workloads_cpu.resnet50("cpu"), {}),
    "resnet50, freeze": Case(lambda: workloads_cpu.resnet50("cpu"), {"freeze": True}),
}


@dataclass(frozen=True)
class Outcome:
    predicted_ms: float
    conversions: int
    stats: Stats


@torch.no_grad()
def measure(case: Case, rounds: int, cache_dir: str) -> dict[str, Outcome]:
    import lz_compiler as lz

    torch.manual_seed(0)
    workload = case.model()
    model, inputs = workload.model.eval(), workload.inputs
    calls, plans = {}, {}
    for solver in SOLVERS:
        options = {"race": False, "cache_dir": cache_dir, "solver": solver, **case.options}
        compiled = torch.compile(copy.deepcopy(model), backend="layerzero", options=options)
        compiled(**inputs)
        (graph,) = lz.explain(compiled).data["graphs"]
        (plans[solver],) = graph["plans"]
        calls[solver] = lambda compiled=compiled: compiled(**inputs)
    stats = interleave(calls, rounds)
    return {solver: Outcome(plan["objective_ns"] / 1e6, conversions(plan), stats[solver]) for solver, plan in plans.items()}


def conversions(plan: Mapping[str, Any]) -> int:
    """Those that cost a pass over memory of their own."""
    return sum(count for kind, count in plan["conversions"]["kinds"].items() if "fused" not in kind)


def report(found: Mapping[str, Mapping[str, Outcome]]) -> str:
    columns = ["case", "solver", "predicted ms", "conversions", "measured ms", "samples kept", "plan is faster by"]
    lines: dict[str, list[str]] = {}
    for name, outcomes in found.items():
        for solver, outcome in outcomes.items():
            s = outcome.stats
            faster = f"{ratio(outcomes['greedy'].stats, s):.2f}x" if solver == "cp_sat" else ""
            cells = [solver, f"{outcome.predicted_ms:.2f}", str(outcome.conversions), f"{s.median:.2f} ({s.p20:.2f} to {s.p80:.2f})"]
            lines[f"{name}" if solver == "cp_sat" else f"{name} "] = [*cells, f"{s.kept}/{s.kept + s.dropped}", faster]
    return table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(";"), default=list(CASES), help="; ".join(CASES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cache-dir", help="folder of the timings store; a fresh one if left out")
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; allowed: {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory() as fresh:
        found = {}
        for name in args.cases:
            progress(name)
            torch._dynamo.reset()
            found[name] = measure(CASES[name], args.rounds, args.cache_dir or fresh)
            progress(report({name: found[name]}))
    for key, value in header("cpu").items():
        if key != "malloc":
            print(f"{key}: {value}")
    print(f"\n{report(found)}")


if __name__ == "__main__":
    main()
