"""Corpus models measured whole: the joint plan against the per-op greedy one, and the sum of prices against the clock.

    python benchmarks/end_to_end.py --cache-dir DIR --out benchmarks/corpora/end_to_end_cpu.jsonl [--cases 'mlp*'] [--seconds 600]

Both plans are made from the same stored timings (`benchmarks/corpus.py --cache-dir DIR` fills them), without a race, and their calls
are timed in turn. A line a case; a case that is there already is left alone.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from corpus import CPU
from timing import Stats, interleave

SOLVERS = ("cp_sat", "greedy")


@torch.no_grad()
def measure(name: str, rounds: int, cache_dir: str) -> dict[str, Any]:
    import lz_compiler as lz

    torch.manual_seed(0)
    family, options, make = CPU[name]
    model, inputs = make()
    args, kwargs = ((inputs["input"],), {}) if "input" in inputs else ((), inputs)
    calls, row = {}, {"case": name, "family": family, "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    for solver in SOLVERS:
        torch._dynamo.reset()
        asked = {"race": False, "cache_dir": cache_dir, "solver": solver, **options, "error_budget": 0.0}
        compiled = torch.compile(copy.deepcopy(model), backend="layerzero", options=asked)
        compiled(*args, **kwargs)
        plans = [plan for graph in lz.explain(compiled).data["graphs"] for plan in graph["plans"]]
        kernels: Counter[str] = Counter()
        for choice in (choice for plan in plans for choice in plan["regions"]):
            kernels[choice["kernel"]] += choice["count"]
        row[solver] = {"predicted_ms": sum(plan["objective_ns"] for plan in plans) / 1e6, "graphs": len(plans), "kernels": kernels}
        calls[solver] = lambda compiled=compiled: compiled(*args, **kwargs)
    for solver, stats in interleave(calls, rounds).items():
        row[solver] |= summary(stats)
    return row


def summary(stats: Stats) -> dict[str, Any]:
    return {"ms": stats.median, "p20": stats.p20, "p80": stats.p80, "kept": stats.kept, "dropped": stats.dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=["*"], help="patterns of names, with commas")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further case after this long")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    end = time.perf_counter() + args.seconds
    known = {json.loads(line)["case"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for name in CPU:
        if name not in known and any(fnmatch.fnmatch(name, p) for p in args.cases) and time.perf_counter() < end:
            row = measure(name, args.rounds, args.cache_dir)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, *(f"{s}: {row[s]['predicted_ms']:.2f} predicted, {row[s]['ms']:.2f} ms" for s in SOLVERS), flush=True)


if __name__ == "__main__":
    main()
