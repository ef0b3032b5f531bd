"""Corpus models measured whole: the joint plan against the per-op greedy one, and the sum of prices against the clock.

    python benchmarks/end_to_end.py --cache-dir DIR --out benchmarks/corpora/end_to_end_cpu.jsonl [--cases 'mlp*'] [--seconds 600]

Both plans are made from the same stored timings (`benchmarks/corpus.py --cache-dir DIR` fills them), without a race, and their calls
are timed in turn. A line a case; a case that is there already is left alone.

`--search-seconds 120`: a third plan, by local search with the clock as its objective. It starts from the joint plan, compiles each plan
that differs in one choice, times it in turn with the start, and goes on from what is faster. The best of many noisy times is too good:
so it is timed afresh with the other two in the end.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import CPU
from timing import Stats, interleave

from lz_compiler import planner
from lz_compiler.cost_models.measured import Measured
from lz_compiler.target import detect
from lz_compiler.timings import open_store
from lz_compiler.types import Problem, Solution

SOLVERS = ("cp_sat", "greedy")
SEARCH = "local_search, end to end"
SEARCH_ROUNDS = 15


class Followed:
    """A cost model that follows a given plan of the graph's problem; without one the solver's, and then it holds both."""

    def __init__(self, cache_dir: str, wanted: Solution | None = None) -> None:
        store = open_store(cache_dir)
        self.price = Measured(detect("cpu", store), store, 0.0).price
        self.name = f"followed {wanted and (wanted.chosen, wanted.converted)}"  # in the keys under which compiled graphs are kept
        self.wanted, self.problem = wanted, None

    def refine(self, problem: Problem, solve: Callable[[Problem], Solution]) -> tuple[Problem, Solution]:
        assert self.problem is None, "one graph only"
        self.problem, self.wanted = problem, self.wanted or solve(problem)
        return problem, self.wanted


@torch.no_grad()
def measure(name: str, rounds: int, cache_dir: str, search_s: float) -> dict[str, Any]:
    torch._dynamo.reset()  # not between plans: it would drop the graphs of those before
    torch.manual_seed(0)
    family, options, make = CPU[name]
    model, inputs = make()
    args, kwargs = ((inputs["input"],), {}) if "input" in inputs else ((), inputs)
    common = {"race": False, "cache_dir": cache_dir, **options, "error_budget": 0.0}

    def compiled(**asked: Any) -> tuple[Callable[[], object], dict[str, Any]]:
        run = torch.compile(copy.deepcopy(model), backend="layerzero", options={**common, **asked})
        run(*args, **kwargs)
        return lambda: run(*args, **kwargs), described(run)

    row = {"case": name, "family": family, "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    calls = {}
    for solver in SOLVERS:
        calls[solver], row[solver] = compiled(solver=solver)
    if search_s:
        calls[SEARCH], row[SEARCH] = searched(compiled, cache_dir, search_s)
    for solver, stats in interleave(calls, rounds).items():
        row[solver] |= summary(stats)
    return row


def described(run: Any) -> dict[str, Any]:
    import lz_compiler as lz

    plans = [plan for graph in lz.explain(run).data["graphs"] for plan in graph["plans"]]
    kernels: Counter[str] = Counter()
    for choice in (choice for plan in plans for choice in plan["regions"]):
        kernels[choice["kernel"]] += choice["count"]
    return {"predicted_ms": sum(plan["objective_ns"] for plan in plans) / 1e6, "graphs": len(plans), "kernels": kernels}


def searched(
    compiled: Callable[..., tuple[Callable[[], object], dict[str, Any]]], cache_dir: str, seconds: float
) -> tuple[Callable[[], object], dict[str, Any]]:
    """Local search by the clock: a plan's time as a part of the start's, both timed in turn."""
    start = Followed(cache_dir)
    first, _ = compiled(cost_model=start)
    assert start.problem is not None
    shares: list[float] = []

    def clock(plan: Solution) -> float:
        call, _ = compiled(cost_model=Followed(cache_dir, plan))
        taken = interleave({"start": first, "plan": call}, SEARCH_ROUNDS)
        shares.append(taken["plan"].median / taken["start"].median)
        return shares[-1]

    found = planner.solve(start.problem, "local_search", seconds, start.wanted, clock)
    call, what = compiled(cost_model=Followed(cache_dir, found))
    return call, {**what, "plans_timed": len(shares), "share_of_start": min(shares)}


def summary(stats: Stats) -> dict[str, Any]:
    return {"ms": stats.median, "p20": stats.p20, "p80": stats.p80, "kept": stats.kept, "dropped": stats.dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=["*"], help="patterns of names, with commas")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search-seconds", type=float, default=0.0, help="of local search with the clock as its objective; 0 is none")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further case after this long")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20  # a plan is a compilation
    end = time.perf_counter() + args.seconds
    known = {json.loads(line)["case"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for name in CPU:
        if name not in known and any(fnmatch.fnmatch(name, p) for p in args.cases) and time.perf_counter() < end:
            row = measure(name, args.rounds, args.cache_dir, args.search_seconds)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                name,
                *(f"{s}: {row[s]['predicted_ms']:.3f} predicted, {row[s]['ms']:.3f} ms;" for s in (*SOLVERS, SEARCH) if s in row),
                flush=True,
            )


if __name__ == "__main__":
    main()
