"""What a baked plan costs: choosing a cell, a cold start, and its steady state, for the zoo's Llama.

    python benchmarks/baked.py [--device cuda] [--parts selection,steady,cold,first] [--processes 10] [--rounds 40] [--json FILE]

In float32 on a CPU, in bfloat16 on a GPU (calls without CUDA graphs).

1. Selection: `forward` of a baked file with 16 buckets over two dimensions, its cells replaced by one that returns its argument,
   beside a call of that cell; and Dynamo's guards for the same function compiled with dynamic shapes.
2. Cold start: fresh processes from their start to the first output. Baked; torch.compile with empty caches; Inductor and
   `lz.compile(plan=...)` with warm ones; and what every such process pays: torch imported, one number on the device.
3. Steady state: the baked file and `lz.compile(plan=...)`, calls in turn, each cell at its upper end.
4. First call after `lz.warmup`, each cell in fresh processes of its own: beside the median of its calls 90 to 110, which find the
   processor's caches as they left them, and beside later calls that each follow one of another cell, which do not. Processes that did not
   get their cores in the first call are not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path
from statistics import median
from typing import Any

from timing import CONTENDED

START = {
    "baked": "import sys; sys.path.insert(0, sys.argv[1]); import torch, _layerzero_plan as p; "
    "print(p.forward(torch.arange(64, device=sys.argv[2])[None]).sum().item(), flush=True)",
    "torch.compile, caches empty": "BACKEND = 'inductor'",
    "torch.compile, caches warm": "BACKEND = 'inductor'",
    "LayerZero's plan, caches warm": "PLAN = True",
    "nothing but torch": "import sys, torch; print(torch.zeros(1, device=sys.argv[2]).item(), flush=True)",
}
FIRST = """
import json, sys, time, torch
import lz_compiler as lz
forward = lz.warmup(sys.argv[1]).forward
x, other = (torch.randint(8000, (1, int(n)), device=sys.argv[2]) for n in sys.argv[3:])
float(torch.zeros(1, 1, device=sys.argv[2]).flatten()[0])  # what reads the result is not part of the first call
def timed():
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    float(forward(x).flatten()[0])  # waits for a GPU
    return (time.perf_counter_ns() - wall) / 1e6, (time.process_time_ns() - cpu) / 1e6
row = [timed() for _ in range(110)]
after = [(forward(other), timed())[1] for _ in range(21)]
print(json.dumps({"row": row, "after": after}))
"""
COMPILED = """
import sys, torch
from lz_compiler import zoo
import lz_compiler as lz
model, args, kwargs = zoo.llama(length=64)
model = model.eval().to(sys.argv[2], torch.bfloat16 if sys.argv[2] == "cuda" else torch.float32)
if {plan}:
    run = lz.compile(model, plan=sys.argv[1] + '/../plan.json')
else:
    run = torch.compile(model)
with torch.no_grad():
    print(run(torch.arange(64, device=sys.argv[2])[None]).sum().item(), flush=True)
"""


def load(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"baked_{folder.name}", folder / "_layerzero_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def best(call: Any, number: int = 20000) -> float:
    """Microseconds a call, the median of eleven runs."""
    return median(timeit.repeat(call, number=number, repeat=11)) / number * 1e6


def selection(folder: Path) -> dict[str, float]:
    """Microseconds of `forward` without its cells, of an empty call, and of the same function under Dynamo's guards."""
    import torch

    import lz_compiler as lz

    class Added(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    ends = {"rows": [4, 8, 16, 32], "columns": [4, 8, 16, 32]}
    x = torch.randn(20, 20)
    dynamic: Any = {"x": {0: "rows", 1: "columns"}}
    model = Added().eval()
    plan = lz.solve(model, (x,), dynamic=dynamic, buckets=ends, race=False, cost_model="roofline")
    lz.bake(plan, folder, model, (x,))
    module, out = load(folder), (x,)

    def cell(x: Any) -> Any:
        return out

    for name in [n for n in vars(module) if n.startswith("cell_")]:
        setattr(module, name, cell)
    guarded = torch.compile(Added(), backend=lambda gm, inputs: lambda *args: out, dynamic=True)
    guarded(x)
    return {
        "cells": float(len(plan.cells)), "empty call": best(lambda: cell(x)),
        "chosen": best(lambda: module.forward(x)), "Dynamo's guards": best(lambda: guarded(x)),
    }  # fmt: skip


def cold_starts(folder: Path, processes: int, device: str, names: list[str]) -> dict[str, list[float]]:
    """Seconds from a process's start to its first output; processes in turn, after one of each that warmed caches and files.

    What a process does at its end is no part of a start (Inductor's compile workers are waited for): later ones are ended at once.
    """
    import time

    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as caches:
        for i in range(processes + 1):
            for name in names:
                code = START[name] if START[name].startswith("import") else COMPILED.format(plan="PLAN" in START[name])
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cold:
                    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold if "empty" in name else f"{caches}/{names.index(name)}"}
                    command, start = [sys.executable, "-c", code, str(folder), device], time.perf_counter()
                    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                        assert process.stdout is not None
                        output, seconds = process.stdout.readline(), time.perf_counter() - start
                        if not output:
                            raise RuntimeError(f"{name}: no output; the process ended with {process.wait()}")
                        if i:
                            process.terminate()
                            found[name].append(seconds)
            print(f"{i} of {processes}: {', '.join(f'{n} {s[-1]:.2f} s' for n, s in found.items() if s)}", file=sys.stderr, flush=True)
    return found


def first_calls(folder: Path, ends: list[int], processes: int, device: str) -> list[tuple[int, float, float, float, int]]:
    """(cell's upper end, ms of the first call after warming up, of calls 90 to 110, of calls after another cell's; processes dropped)."""
    rows = []
    for n in ends:
        other = next(e for e in reversed(ends) if e != n)
        found: list[tuple[float, float, float]] = []
        dropped = 0
        while len(found) < processes and dropped < 3 * processes:
            command = [sys.executable, "-c", FIRST, str(folder), device, str(n), str(other)]
            times = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row, after = times["row"], times["after"]
            best = sorted(wall / cpu for wall, cpu in row)[len(row) // 10]  # as in timing.py
            fair = [[w for w, c in part if device == "cuda" or w / c <= CONTENDED * best] for part in (row[:1], row[89:], after)]
            if all(fair):
                found.append((median(fair[0]), median(fair[1]), median(fair[2])))
            else:
                dropped += 1
        if found:
            rows.append((n, *(median(column) for column in zip(*found, strict=True)), dropped))
        print(f"first calls at {n}: {rows[-1:]}", file=sys.stderr)
    return rows


def steady(model: Any, plan: Any, module: Any, rounds: int, device: str) -> list[tuple[str, float, float, float]]:
    """(cell, ms baked, ms compiled, largest difference)."""
    import time

    import torch

    import lz_compiler as lz

    run, rows = lz.compile(model, plan=plan), []
    for cell in plan.cells:
        x = torch.randint(8000, (1, cell.ranges["seq"][1]), device=device)
        times: dict[str, list[float]] = {"baked": [], "compiled": []}
        with torch.no_grad():
            outputs = {name: call(x) for name, call in (("baked", module.forward), ("compiled", run))}
            for i in range(rounds + 5):
                for name, call in (
                    (("baked", module.forward), ("compiled", run)) if i % 2 else (("compiled", run), ("baked", module.forward))
                ):
                    start = time.perf_counter()
                    float(call(x).flatten()[0])  # waits for a GPU
                    if i >= 5:
                        times[name].append(time.perf_counter() - start)
        low, high = cell.ranges["seq"]
        difference = float((outputs["baked"] - outputs["compiled"]).abs().max())
        rows.append((f"seq {low}..{high}", 1e3 * median(times["baked"]), 1e3 * median(times["compiled"]), difference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="selection,steady,cold,first")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--starts", default="", help="only the cold starts with one of these in their names")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--fresh", type=int, default=10, help="processes for the first calls of each cell")
    parser.add_argument("--buckets", default="16,64,256", help="upper ends of the sequence's buckets")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch
    from torch.utils._pytree import tree_map_only

    import lz_compiler as lz
    from lz_compiler import zoo

    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"python benchmarks/baked.py --device {args.device} --buckets {args.buckets} --processes {args.processes} --rounds {args.rounds}\n"
    )
    wanted = args.parts.split(",")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "selection" in wanted:
            found["selection_us"] = chosen = selection(Path(folder) / "small")
            print(f"| {' | '.join(chosen)} |\n|{'---|' * len(chosen)}")
            print(f"| {' | '.join(f'{v:.2f}' for v in chosen.values())} |  (microseconds a call)\n")
        model, given, kwargs = zoo.llama(length=64)
        model.eval().to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
        given, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(args.device), (given, kwargs))
        buckets = {"seq": [int(end) for end in args.buckets.split(",")]}
        plan = lz.solve(model, given, kwargs, buckets=buckets, dynamic={"input_ids": {1: "seq"}}, freeze=True)
        plan.save(Path(folder) / "plan.json")
        out = Path(folder) / "llama"
        lz.bake(plan, out, model, given, kwargs)
        if "steady" in wanted:
            found["steady"] = rows = steady(model, plan, load(out), args.rounds, args.device)
            print("| cell | won the race | baked, ms | lz.compile(plan=...), ms | ratio | largest difference |\n|---|---|---|---|---|---|")
            for row, cell in zip(rows, plan.cells, strict=True):
                print(f"| {row[0]} | {cell.winner} | {row[1]:.3f} | {row[2]:.3f} | {row[2] / row[1]:.2f}x | {row[3]:.1e} |")
        if "cold" in wanted:
            names = [name for name in START if any(part in name for part in args.starts.split(","))]
            found["cold_s"] = starts = cold_starts(out, args.processes, args.device, names)
            print("\n| first output of a fresh process | s, median | of baked |\n|---|---|---|")
            for name, seconds in starts.items():
                print(f"| {name} | {median(seconds):.2f} | {median(seconds) / median(starts['baked']):.2f}x |")
        if "first" in wanted:
            found["first_ms"] = first = first_calls(out, [cell.ranges["seq"][1] for cell in plan.cells], args.fresh, args.device)
            print(
                "\n| cell's upper end | first call after lz.warmup, ms | calls 90 to 110, ms | ratio | calls after another cell's, ms "
                "| ratio | processes dropped |\n|---|---|---|---|---|---|---|"
            )
            for end, ms, late, after, dropped in first:
                print(f"| {end} | {ms:.2f} | {late:.2f} | {ms / late:.2f} | {after:.2f} | {ms / after:.2f} | {dropped} |")
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
