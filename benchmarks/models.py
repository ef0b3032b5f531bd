"""Whole models under eager, TorchInductor and LayerZero, side by side in one interleaved run.

    python benchmarks/models.py --device cpu [--models llama,bert] [--columns eager,inductor] [--rounds 30]
    python benchmarks/models.py --device cuda --models decode_1x4096,bert_large --limit 200 --json results.jsonl
    python benchmarks/models.py --report results.jsonl more.jsonl

Public model definitions with random weights; nothing is downloaded. Each model runs in a process of its own, so that
the memory and the threads of one do not disturb another. Progress goes to stderr, the tables to stdout. Only columns of
one process are compared; a long benchmark may be split over calls by model and put together with --report.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import workloads_cpu
import workloads_cuda
from tables import Cell, Row, reason, report, row_from
from timing import interleave
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.overrides import TorchFunctionMode
from workloads import Suite, Workload, converted

import lz_compiler as lz

SUITES: dict[str, Suite] = {"cpu": workloads_cpu.SUITE, "cuda": workloads_cuda.SUITE}
WARMUP_OTHERS = 5  # calls: the columns that are not LayerZero's have settled by then

# By default glibc hands large buffers back to the kernel after each call, until some larger buffer was freed, which
# raises its thresholds for good. So a column that once needed a large buffer (autotuning does) would save all columns
# their page faults: a quarter of TorchInductor's time on ResNet-50. Fixed thresholds (32 MiB is the largest allowed)
# give every column the fast state, whoever its neighbours are.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True)
class Prepared:
    """One column, compiled and warmed up."""

    model: nn.Module
    run: Callable[..., Any]
    call: Callable[[], Any]
    graphs: int
    first_s: float | None


class Bench:
    """All columns of one model: compiled one after the other, then timed in turn."""

    def __init__(self, name: str, suite: Suite, device: str, folder: Path, limit: float = float("inf")) -> None:
        self.name, self.suite, self.device, self.folder = name, suite, device, folder
        self.last_start = time.monotonic() + limit * 0.6  # what is compiled must still be timed
        self.cold: set[str | None] = set()  # the columns whose first call is timed, with empty caches
        torch.manual_seed(0)
        self.workload: Workload = suite.models[name](device)
        # The columns share the code objects of the model's classes, and Dynamo counts its limit per code object.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096

    def measure(self, columns: Sequence[str], rounds: int, accuracy: bool) -> Row:
        wanted = [c for c in columns if self.name in (self.suite.columns[c].models or (self.name,))]
        cold = next((c for c in self.suite.cold if c in wanted), None)
        self.cold = {cold, *(c for c in wanted if self.suite.columns[c].cold)}
        cells: dict[str, Cell] = {}
        with torch.set_grad_enabled(self.workload.trains):
            prepared = self.prepare_all(sorted(wanted, key=lambda c: c != cold), cells)
            progress(f"{self.name}: {rounds} rounds of {len(prepared)} columns")
            compiled = graph_count()
            calls = {column: prepared[column].call for column in wanted if column in prepared}
            stats = interleave(calls, rounds, device=self.device, before=self.before) if calls else {}
            if graph_count() != compiled:
                progress(f"{self.name}: WARNING: {graph_count() - compiled} graphs were compiled while timing")
            errors = self.errors(calls) if accuracy and not self.workload.trains else {}
            for column, done in prepared.items():
                plan = what_was_planned(done.run) if self.suite.columns[column].backend == "layerzero" else None
                cells[column] = Cell(stats[column], errors.get(column), done.graphs, first_s=done.first_s, plan=plan)
            if cold in prepared and time.monotonic() < self.last_start:
                progress(f"{self.name}: {cold} again, with its timings and verdict")
                torch._dynamo.reset()
                with self.compiling(cold):
                    _, _, stored_s = self.first_call(cold, prepared[cold].model)
                cells[cold] = replace(cells[cold], stored_s=stored_s)
        return Row(self.name, {column: cells[column] for column in wanted}, self.workload.floors)

    def prepare_all(self, columns: Sequence[str], cells: dict[str, Cell]) -> dict[str, Prepared]:
        """The columns that compile, in this order; into `cells` why others do not."""
        prepared: dict[str, Prepared] = {}
        if self.suite.cold:  # what the first compilation in a process costs is nobody's
            for backend in {self.suite.columns[c].backend for c in columns} - {None}:
                torch.compile(torch.nn.functional.silu, backend=backend)(torch.ones(4, 4, device=self.device))
        for column in columns:
            progress(f"{self.name}: {column}")
            if time.monotonic() > self.last_start:
                cells[column] = Cell(failed="left out, the time limit was near")
                continue
            try:
                prepared[column] = self.prepare(column, copy.deepcopy(self.workload.model))
            except Exception as error:  # Whatever a compiler raises is this column's result, and not the end of the run.
                cells[column] = Cell(failed=reason(error))
                progress(f"{self.name}: {column} failed: {error}")
        return prepared

    def prepare(self, name: str, model: nn.Module) -> Prepared:
        before, backend = graph_count(), self.suite.columns[name].backend
        with self.compiling(name):
            run, call, first_s = self.first_call(name, model)
            for _ in range(self.suite.warmup if backend == "layerzero" else WARMUP_OTHERS):
                self.before()
                call()
        if backend is not None and graph_count() == before:
            raise RuntimeError("no graph of its own was compiled: it would be timed with another column's")
        return Prepared(model, run, call, graph_count() - before, first_s if name in self.cold else None)

    def first_call(self, name: str, model: nn.Module) -> tuple[Callable[..., Any], Callable[[], Any], float]:
        """What was compiled, one call of it, and the seconds that the first call took."""
        column, run = self.suite.columns[name], model
        if column.backend is not None:
            run = torch.compile(model, backend=column.backend, options=dict(column.options) or None, mode=column.mode)
        call = self.workload.call(model, run)
        self.before()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return run, call, time.perf_counter() - start

    def before(self) -> None:
        self.workload.rewind()
        torch.compiler.cudagraph_mark_step_begin()

    @contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        empty = fresh_cache(dir=str(self.folder), delete=False) if name in self.cold else nullcontext()
        with empty, torch._inductor.config.patch(freezing=True) if self.suite.columns[name].freezing else nullcontext():
            yield

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def errors(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Relative L2 error of each column's output against eager's, with the same weights, in the suite's exact dtype."""
        self.before()
        inputs = converted(self.workload.inputs, self.suite.exact)
        # float32 means float32: cuDNN's convolutions would take tf32.
        with Float64() if self.suite.exact is torch.float64 else torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = first(copy.deepcopy(self.workload.model).to(self.suite.exact)(**inputs)).double()
        errors = {}
        for column, call in calls.items():
            self.before()
            errors[column] = ((first(call()).double() - exact).norm() / exact.norm()).item()
        return errors


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def graph_count() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def what_was_planned(compiled: Any) -> dict[str, Any]:
    """Of all graphs together: predicted and measured times, planning time, winners of the races, kernels that were planned."""
    graphs = json.loads(lz.explain(compiled).to_json())["graphs"]
    plans = [plan for graph in graphs for plan in graph["plans"]]
    kernels: Counter[str] = Counter()
    for region in (region for plan in plans for region in plan["regions"]):
        kernels[region["kernel"]] += region["count"]
    measured = [graph["measured_s"] for graph in graphs]
    return {
        "predicted_ms": 1e3 * sum(graph["predicted_s"] for graph in graphs),
        "measured_ms": None if None in measured else 1e3 * sum(measured),
        "plan_s": sum(plan["plan_s"] for plan in plans),
        "winners": [graph["winner"] for graph in graphs],
        "kernels": dict(kernels.most_common()),
        "times_s": [graph["times_s"] for graph in graphs],
        "notes": [note for graph in graphs for note in graph["notes"]],
    }


class Float64(TorchFunctionMode):
    """Turns the casts to float32 that models spell out (norms, rotary tables) into casts to float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def measure_in_process(name: str, args: argparse.Namespace) -> Row:
    columns = [c for c in args.columns if name in (SUITES[args.device].columns[c].models or (name,))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        command = [sys.executable, __file__, "--device", args.device, "--models", name, "--columns", ",".join(columns)]
        command += ["--rounds", str(args.rounds), "--worker", str(file), "--limit", str(args.limit)]
        command += ["--accuracy" if args.accuracy else "--no-accuracy"]
        env = MALLOC | os.environ
        if SUITES[args.device].cold:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
            env["LAYERZERO_CACHE_DIR"] = str(args.store.resolve() if args.store else Path(folder, "layerzero"))
        timeout = None if args.limit == float("inf") else args.limit
        try:  # What a compiler prints must not end up between the tables.
            code = subprocess.run(command, stdout=sys.stderr, env=env, check=False, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            return Row(name, {column: Cell(failed=f"not done within {timeout:.0f} s") for column in columns})
        if code:
            return Row(name, {column: Cell(failed=f"the process of this model ended with {code}") for column in columns})
        return row_from(json.loads(file.read_text()))


def progress(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


def header(device: str) -> dict[str, str]:
    import transformers

    head = {"date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %z}", "device": device}
    command = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "lz_compiler": lz.__version__, "command": command}
    if device == "cuda":
        import timm
        import triton

        cudnn = str(torch.backends.cudnn.version())
        libraries = {"cuda": str(torch.version.cuda), "cudnn": cudnn, "triton": triton.__version__, "timm": timm.__version__}
        return {**head, "gpu": torch.cuda.get_device_name(), **libraries, **versions}
    malloc = " ".join(f"{name}={os.environ.get(name, value)}" for name, value in MALLOC.items())
    cores = f"{len(os.sched_getaffinity(0))} usable, {torch.get_num_threads()} torch threads"
    return {**head, "cpu": cpu_name(), "cores": cores, "malloc": malloc, **versions}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    every = {device: (",".join(suite.models), ",".join(suite.columns)) for device, suite in SUITES.items()}
    lists = "\n\n".join(f"{device}\n  --models {models}\n  --columns {columns}" for device, (models, columns) in every.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=lists, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SUITES)
    parser.add_argument("--models", help="names with commas between; default: all of the device")
    parser.add_argument("--columns", help="names with commas between; default: all of the device")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="for each model; after three fifths of it, no further column is begun")  # fmt: skip
    parser.add_argument("--store", type=Path, metavar="FOLDER",
                        help="cuda: keep LayerZero's timings there (then nothing is cold); default: an empty folder per model")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line to FILE as each model is done")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: the tables of such files")
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # One model, in this process, into this file.
    args = parser.parse_args(argv)
    for option, known in (("models", SUITES[args.device].models), ("columns", SUITES[args.device].columns)):
        given = getattr(args, option)
        names = list(known) if given is None else given.split(",")
        setattr(args, option, names)
        for name in names:
            if name not in known:
                parser.error(f"--{option}: unknown {name!r} on {args.device}; allowed: {', '.join(known)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.device == "cuda" and not args.report and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        bench = Bench(args.models[0], SUITES[args.device], args.device, args.worker.parent, args.limit)
        args.worker.write_text(json.dumps(asdict(bench.measure(args.columns, args.rounds, args.accuracy))))
        return
    if args.report:
        rows = [row_from(json.loads(line)) for file in args.report for line in file.read_text().splitlines()]
        for device, suite in SUITES.items():
            measured = [row for row in rows if row.run["device"] == device]
            if measured:
                print(report(measured, suite))
        return
    head, rows = header(args.device), []
    for name in args.models:
        rows.append(replace(measure_in_process(name, args), run=head))
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    print(report(rows, SUITES[args.device]))


if __name__ == "__main__":
    main()
