"""Whole models under eager, TorchInductor and LayerZero, side by side in one interleaved run.

    python benchmarks/models.py --device cpu [--models llama,bert] [--columns eager,inductor] [--rounds 30]

Public model definitions with random weights; nothing is downloaded. Each model runs in a process of its own, so that
the memory and the threads of one do not disturb another. Progress goes to stderr, the tables to stdout.
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
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from timing import Stats, geomean, interleave, ratio
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# LayerZero races its finalists over its first real calls: before these are over, a call may still be any of them.
# The other compiled columns have settled after far fewer.
WARMUP = 40
WARMUP_OTHERS = 5

# By default glibc hands large buffers back to the kernel after each call, until some larger buffer was freed, which
# raises its thresholds for good. So a column that once needed a large buffer (autotuning does) would save all columns
# their page faults: a quarter of TorchInductor's time on ResNet-50. Fixed thresholds (32 MiB is the largest allowed)
# give every column the fast state, whoever its neighbours are.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True)
class Column:
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    # options={"freezing": True} alone does not freeze: whether parameters become constants is decided by Dynamo while
    # it traces, and Dynamo reads the global config (and wants no_grad). It is needed all the same, since without it
    # this column equals plain `inductor` to Dynamo, and a graph compiled for that one would be reused.
    freezing: bool = False


COLUMNS: dict[str, Column] = {
    "eager": Column(),
    "inductor": Column("inductor"),
    "inductor+freeze": Column("inductor", {"freezing": True}, freezing=True),
    "inductor+freeze+max-autotune": Column("inductor", {"freezing": True, "max_autotune": True}, freezing=True),
    "layerzero": Column("layerzero"),
    "layerzero+freeze": Column("layerzero", {"freeze": True}),
    "layerzero+freeze+budget": Column("layerzero", {"freeze": True, "error_budget": 1e-2}),
}
BASELINES = tuple(COLUMNS)[:4]


@dataclass(frozen=True)
class Cell:
    """One model under one column: `stats`, or the reason why there are none."""

    stats: Stats | None = None
    error: float | None = None
    graphs: int = 0
    failed: str | None = None


Row = dict[str, Cell]
Inputs = dict[str, Tensor]


def llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        vocab_size=8000,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(8000, (1, 256))}


def bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
    lengths = torch.tensor([128, 96, 64, 32])
    mask = (torch.arange(128) < lengths[:, None]).long()
    return BertModel(config), {"input_ids": torch.randint(config.vocab_size, (4, 128)), "attention_mask": mask}


def vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return ViTModel(config), image()


def resnet50() -> tuple[nn.Module, Inputs]:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig()), image()


def convnext() -> tuple[nn.Module, Inputs]:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig()), image()


def image() -> Inputs:
    return {"pixel_values": torch.randn(1, 3, 224, 224)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "resnet50": resnet50,
    "convnext": convnext,
}


@torch.no_grad()
def measure(name: str, columns: Sequence[str], rounds: int, accuracy: bool) -> Row:
    """All columns of one model, compiled one after the other and then timed in turn."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    # The columns share the code objects of the model's classes, and Dynamo counts its limit per code object.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    calls: dict[str, Callable[[], Any]] = {}
    row: Row = {}
    for column in columns:
        progress(f"{name}: {column}")
        try:
            calls[column], graphs = prepare(copy.deepcopy(model), inputs, COLUMNS[column])
            row[column] = Cell(graphs=graphs)
        except Exception as error:  # Whatever a compiler raises is this column's result, and not the end of the run.
            row[column] = Cell(failed=reason(error))
            progress(f"{name}: {column} failed: {error}")
    progress(f"{name}: {rounds} rounds of {len(calls)} columns")
    compiled = graph_count()
    stats = interleave(calls, rounds) if calls else {}
    if graph_count() != compiled:
        progress(f"{name}: WARNING: {graph_count() - compiled} graphs were compiled while timing")
    reference = exact_output(model, inputs) if accuracy else None
    for column, call in calls.items():
        error = None if reference is None else relative_error(call()[0], reference)
        row[column] = Cell(stats[column], error, row[column].graphs)
    return row


def prepare(model: nn.Module, inputs: Inputs, column: Column) -> tuple[Callable[[], Any], int]:
    """The warmed-up call of one column, and the number of graphs that were compiled for it."""
    if column.backend is None:
        model(**inputs)
        return lambda: model(**inputs), 0
    compiled = torch.compile(model, backend=column.backend, options=dict(column.options) or None)
    before = graph_count()
    with torch._inductor.config.patch(freezing=True) if column.freezing else nullcontext():
        for _ in range(WARMUP if column.backend == "layerzero" else WARMUP_OTHERS):
            compiled(**inputs)
    if graph_count() == before:
        raise RuntimeError("no graph of its own was compiled: it would be timed with another column's")
    return lambda: compiled(**inputs), graph_count() - before


def graph_count() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


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


def exact_output(model: nn.Module, inputs: Inputs) -> Tensor:
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with Float64():
        return copy.deepcopy(model).double()(**doubled)[0]


def relative_error(output: Tensor, reference: Tensor) -> float:
    return ((output.double() - reference).norm() / reference.norm()).item()


def reason(error: BaseException) -> str:
    # Dynamo wraps what a backend raises, under a first line that says only which backend it was.
    error = getattr(error, "inner_exception", error)
    first = next(iter(str(error).strip().splitlines()), "")
    return textwrap.shorten(f"{type(error).__name__}: {first}", 80, placeholder=" ...")


def measure_in_process(name: str, args: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        command = [sys.executable, __file__, "--models", name, "--columns", ",".join(args.columns)]
        command += ["--rounds", str(args.rounds), "--worker", str(file)]
        command += ["--accuracy" if args.accuracy else "--no-accuracy"]
        # What a compiler prints must not end up between the tables.
        code = subprocess.run(command, stdout=sys.stderr, env=MALLOC | os.environ, check=False).returncode
        if code:
            return {column: Cell(failed=f"the process of this model ended with {code}") for column in args.columns}
        cells = json.loads(file.read_text())
    return {column: cell_from(values) for column, values in cells.items()}


def cell_from(values: Mapping[str, Any]) -> Cell:
    return Cell(**{**values, "stats": values["stats"] and Stats(**values["stats"])})


def progress(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


def header() -> dict[str, str]:
    return {
        "date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "cpu": cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0))} usable, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "malloc": " ".join(f"{name}={os.environ.get(name, value)}" for name, value in MALLOC.items()),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def report(rows: Mapping[str, Row], columns: Sequence[str], accuracy: bool) -> str:
    times = {name: [time_text(row[column]) for column in columns] for name, row in rows.items()}
    blocks = ["median ms (float32)", table(columns, times), "", *speedup_block(rows, columns)]
    if accuracy:
        errors = {name: [error_text(row[column]) for column in columns] for name, row in rows.items()}
        blocks += ["", "relative L2 error against float64", table(columns, errors)]
    return "\n".join([*blocks, "", *quiet_lines(rows)])


def quiet_lines(rows: Mapping[str, Row]) -> list[str]:
    """How far the machine was this run's own: a reader must know before believing any of the numbers."""
    measured = [(name, column, cell.stats) for name, row in rows.items() for column, cell in row.items() if cell.stats]
    dropped = [f"{name} {column} {s.dropped}/{s.dropped + s.kept}" for name, column, s in measured if s.dropped]
    cores = {name: max((s.cores for model, _, s in measured if model == name), default=0.0) for name in rows}
    return [
        f"samples dropped as contended: {', '.join(dropped) or 'none'}",
        f"cores had at best: {', '.join(f'{name} {value:.1f}' for name, value in cores.items())}",
    ]


def speedup_block(rows: Mapping[str, Row], columns: Sequence[str]) -> list[str]:
    speedups = {name: speedups_of(row, columns) for name, row in rows.items()}
    lines = {name: [times_text(value) for value in row.values()] for name, row in speedups.items()}
    for label, fold in (("geomean", geomean), ("minimum", min)):
        cells = []
        for column in columns:
            values = [row[column] for row in speedups.values()]
            known = [value for value in values if value is not None]
            # A mean over fewer models than its neighbour's is not comparable with it, so say so.
            missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
            cells.append(times_text(fold(known)) + missing if known else "-")
        lines[label] = cells
    return [f"speed-up over the best of: {', '.join(c for c in BASELINES if c in columns)}", table(columns, lines)]


def speedups_of(row: Row, columns: Sequence[str]) -> dict[str, float | None]:
    baselines = [stats for name in BASELINES if name in row and (stats := row[name].stats)]
    best = min(baselines, key=lambda stats: stats.median, default=None)
    measured = {column: row[column].stats for column in columns}
    return {column: ratio(best, stats) if best and stats else None for column, stats in measured.items()}


def time_text(cell: Cell) -> str:
    return f"{cell.stats.median:.2f}" if cell.stats else f"failed: {cell.failed}"


def error_text(cell: Cell) -> str:
    return "-" if cell.error is None else f"{cell.error:.1e}"


def times_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def table(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    grid = [["model", *columns], *([name, *cells] for name, cells in lines.items())]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in grid]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="only cpu so far")
    parser.add_argument("--models", type=names_from(MODELS), default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--columns", type=names_from(COLUMNS), default=list(COLUMNS), help=",".join(COLUMNS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE as well")
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # One model, in this process, into this file.
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error(f"--device {args.device} is not supported yet; allowed: cpu")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    return args


def names_from(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; allowed: {', '.join(allowed)}")
        return given

    return names


def main() -> None:
    args = parse()
    if args.worker:
        row = measure(args.models[0], args.columns, args.rounds, args.accuracy)
        args.worker.write_text(json.dumps({column: asdict(cell) for column, cell in row.items()}))
        return
    head = header()
    rows = {name: measure_in_process(name, args) for name in args.models}
    for key, value in head.items():
        print(f"{key}: {value}")
    print(f"\n{report(rows, args.columns, args.accuracy)}")
    if args.json:
        cells = {name: {column: asdict(cell) for column, cell in row.items()} for name, row in rows.items()}
        args.json.write_text(json.dumps({**head, "rounds": args.rounds, "rows": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
