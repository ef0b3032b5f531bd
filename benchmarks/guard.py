"""What circuit breaking costs a call: the frame around a compiled graph, and the `try` in a baked file's `forward`.

    OMP_NUM_THREADS=1 python benchmarks/guard.py [--rounds 60]

Callables that return at once stand for the compiled graph and for the baked cells. Both sides take turns, in blocks of 5,000 calls;
medians of the blocks. Beside them, a call of an empty function through Dynamo's guards.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

BLOCK = 5000


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Nanoseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in sorted(calls, reverse=bool(i % 2)):
            times[name].append(timeit.timeit(calls[name], number=BLOCK) / BLOCK * 1e9)
    return {name: median(found) for name, found in times.items()}


def baked(folder: Path) -> dict[str, Callable[[], object]]:
    """`forward` of a file with 16 buckets of two sizes as it is, and without its `try`; cells replaced by one that returns."""
    import torch

    import lz_compiler as lz

    class Added(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x, ends = torch.randn(20, 20), {"rows": [4, 8, 16, 32], "columns": [4, 8, 16, 32]}
    plan = lz.solve(Added(), (x,), dynamic={"x": {0: "rows", 1: "columns"}}, buckets=ends, race=False, cost_model="roofline")
    file = lz.bake(plan, folder, Added(), (x,))

    class Bare(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            if node.name == "forward":
                node.body = [inner for s in node.body for inner in (s.body if isinstance(s, ast.Try) else [s])]
            return node

    found: dict[str, Callable[[], object]] = {}
    for name, change in (("baked, as it is", ast.NodeTransformer()), ("baked, without try", Bare())):
        module: dict[str, Any] = {"__file__": str(file), "__name__": "baked"}
        exec(compile(ast.unparse(change.visit(ast.parse(file.read_text()))), str(file), "exec"), module)
        module.update({cell: lambda x, out=(x,): out for cell in module if cell.startswith("cell_")})
        found[name] = lambda forward=module["forward"]: forward(x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    import torch

    from lz_compiler.trust import circuit

    out, x = (torch.zeros(1),), torch.zeros(3)

    def run(*args: object) -> object:
        return out

    dynamo = torch.compile(lambda x: x + 1, backend=lambda gm, inputs: run)
    dynamo(x)
    print("| call | bare, ns | guarded, ns | more, ns |\n|---|--:|--:|--:|")
    for count in (2, 30, 300):
        args = tuple(torch.zeros(1) for _ in range(count))  # the same one each time would wait for its own reference count
        watched = circuit.guarded(run, lambda error, args: None, None)
        ns = interleaved({"bare": lambda a=args: run(*a), "guarded": lambda a=args, w=watched: w(*a)}, rounds)
        print(f"| {count} arguments | {ns['bare']:.0f} | {ns['guarded']:.0f} | {ns['guarded'] - ns['bare']:.0f} |")
    with tempfile.TemporaryDirectory() as folder:
        ns = interleaved(baked(Path(folder) / "out"), rounds)
    bare, tried = ns["baked, without try"], ns["baked, as it is"]
    print(f"| baked file, 16 cells | {bare:.0f} | {tried:.0f} | {tried - bare:.0f} |")
    print(f"\nA call of an empty function through Dynamo's guards: {interleaved({'': lambda: dynamo(x)}, rounds)['']:.0f} ns")


if __name__ == "__main__":
    main()
