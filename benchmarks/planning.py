"""How long planning takes: building and solving the program by layer count, and whole compile times beside Inductor's.

    python benchmarks/planning.py [--layers 2,8,32,128] [--solver cp_sat] [--skip-compile] [--json FILE]

Part 1 captures a Llama-shaped graph for each layer count, prices it from measurements (made first, and not counted), and times
building plus solving. Part 2 times the first call of a compiled 6-layer model in fresh processes with empty Inductor caches:
Inductor, LayerZero with nothing stored, and LayerZero with stored timings and verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

COMPILE = """
import sys, time, torch
from lz_compiler import zoo
backend, settle = sys.argv[1], int(sys.argv[2])
model, args, kwargs = zoo.llama()
with torch.no_grad():
    torch.compile(lambda x: x + 1)(torch.ones(3))  # what any first compilation in a process costs, on both sides
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(4))
    start = time.perf_counter()
    compiled = torch.compile(model, backend=backend)
    compiled(*args, **kwargs)
    print("FIRST", time.perf_counter() - start)
    for _ in range(settle):
        compiled(*args, **kwargs)
"""


def functional_graph(model: Any, args: Any, kwargs: Any, take: Any) -> None:
    """Run a model once through Dynamo and AOTAutograd, and hand over its inference graph, decomposed as Inductor would."""
    import torch
    from torch._dynamo.backends.common import aot_autograd

    from lz_compiler import torch_private
    from lz_compiler.passes.keep_attention import keep_attention_pass

    def compiler(gm: Any, inputs: Any) -> Any:
        take(gm)
        return lambda *values: gm(*values)

    lower = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=torch_private.decompositions())
    torch.compile(model, backend=lambda gm, inputs: lower(keep_attention_pass(gm), inputs))(*args, **kwargs)


def plan_times(layers: int, solver: str) -> dict[str, Any]:
    """Plan one graph twice: the first time measures what is unknown, the second is what a user with stored timings pays."""
    import torch

    from lz_compiler import backend, planning, problem, zoo
    from lz_compiler.capture import GraphView
    from lz_compiler.cost_models import cost_model
    from lz_compiler.cost_models.roofline import Roofline
    from lz_compiler.options import Options
    from lz_compiler.target import detect

    options = Options.resolve({"solver": solver})
    store = backend.open_store(options.cache_dir)
    target = detect("cpu", store)
    rows: dict[str, Any] = {"layers": layers}

    def planned(gm: Any) -> None:
        for _ in range(2):
            start = time.perf_counter()
            view = GraphView(gm.graph)
            model = cost_model("measured", target, store, 60.0)
            found = problem.enumerate_regions(view, options, model)
            priced = time.perf_counter()
            problem.add_defaults(view, found, Roofline(target), lossy=False)
            program = problem.build(view, found, options, Roofline(target))
            built = time.perf_counter()
            solution = planning.solve_within(program, options)
            solved = time.perf_counter()
        rows.update(
            nodes=len(view.nodes), candidates=len(program.candidates), decisions=len(set(program.candidate_class)),
            enumerate_s=priced - start, build_s=built - priced, solve_s=solved - built, status=str(solution.status),
            objective_ms=solution.objective / 1e6,
        )  # fmt: skip

    model, args, kwargs = zoo.llama32(layers)
    with torch.no_grad():
        functional_graph(model, args, kwargs, planned)
    return rows


def first_call(backend: str, cache: str, settle: int) -> float:
    with tempfile.TemporaryDirectory() as fresh:
        env = {**os.environ, "LAYERZERO_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": fresh}
        command = [sys.executable, "-c", COMPILE, backend, str(settle)]
        text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return float(text.split("FIRST")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,8,32,128")
    parser.add_argument("--solver", default="cp_sat")
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    import torch

    machine = platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"command: python {' '.join(sys.argv)}\n")
    results: dict[str, Any] = {"planning": []}
    print("| layers | nodes | candidates | decisions after ties | enumerate and look up | build | solve | status |")
    print("|---|---|---|---|---|---|---|---|")
    for layers in map(int, options.layers.split(",")):
        row = plan_times(layers, options.solver)
        results["planning"].append(row)
        print(
            f"| {layers} | {row['nodes']} | {row['candidates']} | {row['decisions']} | {row['enumerate_s']:.2f} s "
            f"| {row['build_s']:.2f} s | {row['solve_s']:.2f} s | {row['status']} |", flush=True,
        )  # fmt: skip
    if not options.skip_compile:
        results["compile"] = compile_table(options.repeats)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


def compile_table(repeats: int) -> dict[str, float]:
    """Medians of first-call times, the sides interleaved; LayerZero's cold compile is taken once a repeat, too."""
    from statistics import median

    taken: dict[str, list[float]] = {"inductor": [], "layerzero, cold": [], "layerzero, stored": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            taken["inductor"].append(first_call("inductor", cache, 0))
            taken["layerzero, cold"].append(first_call("layerzero", cache, 40))
            taken["layerzero, stored"].append(first_call("layerzero", cache, 0))
    medians = {name: median(values) for name, values in taken.items()}
    print("\n| first call of a 6-layer model | seconds | against Inductor |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / medians['inductor']:.2f}x |")
    return medians


if __name__ == "__main__":
    main()
