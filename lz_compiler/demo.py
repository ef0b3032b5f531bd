"""`lz demo` and `lz bench`: columns measured side by side on one model."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

SETTLE = 40  # calls before timing: compilation, and LayerZero's race over its first calls


def measure_columns(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any] | None],
    rounds: int, say: Callable[[str], object],
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:  # fmt: skip
    """Median wall time of each column in ms, all interleaved; a column is None (eager), {} under "inductor", or
    LayerZero's options. Returns the rows and the compiled modules by name."""
    import torch

    from . import api
    from .measure import CONTENDED

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(columns))
    calls: dict[str, Any] = {}
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, options in columns.items():
            module = copy.deepcopy(model)
            if options is None:
                calls[name] = module
            elif name == "inductor":
                calls[name] = torch.compile(module)
            else:
                calls[name] = api.compile(module, **options)
            start = time.perf_counter()
            calls[name](*args, **kwargs)
            rows[name] = {"first_call_s": time.perf_counter() - start}
            say(f"{name}: first call {rows[name]['first_call_s']:.1f} s")
            for _ in range(SETTLE if options is not None else 3):
                calls[name](*args, **kwargs)
        say(f"measuring {rounds} interleaved rounds")
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        order, shuffle = list(calls), random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                calls[name](*args, **kwargs)  # its own caches, not its neighbour's
                cpu, start = time.process_time(), time.perf_counter()
                calls[name](*args, **kwargs)
                wall = time.perf_counter() - start
                samples[name].append((wall, wall / max(time.process_time() - cpu, 1e-9)))
    for name, taken in samples.items():
        best = sorted(ratio for _, ratio in taken)[len(taken) // 10]
        kept = [wall for wall, ratio in taken if ratio <= CONTENDED * best]
        rows[name] |= {"median_ms": statistics.median(kept) * 1e3, "dropped": len(taken) - len(kept)}
    return rows, calls


def run(out: Any, err: Any, rounds: int) -> None:
    """The demo: a Llama-shaped model, three columns, what was chosen and how far the machine's limit is."""
    import torch
    from rich.table import Table

    from . import api, zoo
    from .target import detect
    from .timings import user_store

    model, args, kwargs = zoo.llama()
    target = detect("cpu", user_store())
    err.print(f"Llama-shaped model, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on {target.name}")
    columns: dict[str, Mapping[str, Any] | None] = {
        "eager": None, "inductor": {}, "layerzero": {}, "layerzero, freeze": {"freeze": True},
        "layerzero, freeze, error_budget=1e-2": {"freeze": True, "error_budget": 1e-2},
    }  # fmt: skip
    rows, calls = measure_columns(model, args, kwargs, columns, rounds, err.print)
    flops = _linear_flops(model, args)
    floor = flops / max(target.flops["float32"], 1.0) * 1e3
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, one call in ms")
    for column in ("", "ms", "speed against Inductor", "of this machine's float32 limit", "relative error"):
        table.add_column(column, justify="left" if not column else "right")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*args, **kwargs)
        for name, row in rows.items():
            error = float((calls[name](*args, **kwargs).double() - exact).norm() / exact.norm())
            ms = row["median_ms"]
            table.add_row(name, f"{ms:.2f}", f"{rows['inductor']['median_ms'] / ms:.2f}x", f"{floor / ms:.0%}", f"{error:.1e}")
    out.print(table)
    out.print(f"float32 limit: {floor:.2f} ms ({flops / 1e9:.1f} GFLOP of products at {target.flops['float32'] / 1e9:.0f} GFLOP/s)")
    for name in ("layerzero", "layerzero, freeze"):
        out.print(f"\nWhat {name} chose:")
        out.print(str(api.explain(calls[name])), markup=False)


def _linear_flops(model: Any, args: tuple[Any, ...]) -> float:
    """Two for each weight of a linear layer and each token; attention adds little at this length."""
    import torch

    linears = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 2.0 * args[0].numel() * sum(m.weight.numel() for m in linears)
