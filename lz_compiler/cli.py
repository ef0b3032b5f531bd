"""The command line: `lz`, or `python -m lz_compiler`.

Heavy imports are inside the commands, so that `lz --help` is immediate.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import LayerZeroError, OptionError, told, unknown
from .facts import KINDS

if TYPE_CHECKING:
    from .reports.report import Report
    from .timings import TimingStore

HELP = """A torch.compile backend that chooses each kernel by a plan, and shows why. Data goes to stdout, everything else to stderr."""
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
cache_app = typer.Typer(no_args_is_help=True, help="Stored timings, device peaks and verdicts.")
app.add_typer(cache_app, name="cache")
out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[str | None, typer.Option("--html", metavar="OUT.html", help="Write a page that needs no network.")]
CacheDir = Annotated[str | None, typer.Option(help="Folder of the timings store.")]
Option = Annotated[list[str] | None, typer.Option("--option", "-o", help="A LayerZero option, NAME=VALUE; repeatable.")]
Factory = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="a function that returns (model, args, kwargs)")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each column is timed.")]


def main() -> None:
    # A warning is for whoever typed the command, as an error is.
    warnings.formatwarning = lambda message, *_, **__: f"lz: warning: {message}\n"
    try:
        app()
    except LayerZeroError as error:
        err.print(f"lz: {error}", style="red", markup=False)
        raise SystemExit(2) from None


def load_factory(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """MODULE:FACTORY, where FACTORY() returns (model, args, kwargs)."""
    from importlib import import_module

    path, _, name = spec.partition(":")
    if not path or not name:
        raise OptionError(f"{spec!r} is not MODULE:FACTORY, for example lz_compiler.zoo:llama")
    sys.path.insert(0, "")
    try:
        module = import_module(path)
    except ImportError as error:
        hint = "Give a module's name, without .py, as Python imports it from here or from PYTHONPATH"
        raise OptionError(f"cannot load {spec!r}: {error}. {hint}.") from error
    except Exception as error:
        raise OptionError(f"cannot load {spec!r}: {_as_users_see(error)}") from error
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        functions = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == path and not isinstance(value, type)
        ]
        what = "is not a function" if hasattr(module, name) else "is not there"
        raise OptionError(f"cannot load {spec!r}: {name!r} {what}; {unknown('factory', name, functions)}")
    try:
        made = factory()
    except Exception as error:
        raise OptionError(f"{spec!r} raised {_as_users_see(error)}") from error
    if not isinstance(made, tuple) or len(made) != 3:
        raise OptionError(f"{spec!r} returned {type(made).__name__}; a factory must return (model, args, kwargs)")
    model, args, kwargs = made
    return model, tuple(args), dict(kwargs or {})


def _as_users_see(error: Exception) -> str:
    """What an error says, and the frames of it that are neither ours nor torch's."""
    names = ("lz_compiler", "torch", "importlib")
    packages = [os.path.dirname(str(sys.modules[name].__file__)) for name in names if name in sys.modules]
    others = ("<frozen ", *(f"{package}{os.sep}" for package in packages))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return "\n".join([told(error), *"".join(traceback.format_list(own)).splitlines()])


def load_model(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a factory returns. OptionError where the model itself fails on its arguments: what a compiler says of that is long."""
    import torch

    made = model, args, kwargs = load_factory(spec)
    weights = {id(p): p for p in model.parameters()} if isinstance(model, torch.nn.Module) else {}
    try:  # a call may write into buffers and arguments
        model, args, kwargs = copy.deepcopy(made, weights)
    except Exception:
        return made
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise OptionError(f"the model itself fails on its example arguments: {_as_users_see(error)}") from error
    return made


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs, read as an environment variable of that name would be."""
    from .options import parse_text

    for pair in pairs or []:
        if "=" not in pair:
            raise OptionError(f"-o {pair!r} is not NAME=VALUE, for example freeze=true")
    found: dict[str, Any] = {name: parse_text(name, value) for name, _, value in (p.partition("=") for p in pairs or [])}
    if "backends" in found:
        from .backends import allowed_backends

        allowed_backends(found["backends"])  # a wrong name is told now, not in the middle of a compilation
    return found


@app.command()
def doctor(as_json: Json = False, cache_dir: CacheDir = None) -> None:
    """Device, measured peaks, kernel libraries, caches; what is missing and why."""
    from .api import doctor as report

    result = report(cache_dir)
    out.print(result.to_json() if as_json else str(result), markup=False)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(metavar="MODULE:FACTORY|FILE.json", help="what to compile, or a plan or problem of `lz solve`")],
    as_json: Json = False, option: Option = None, html: Html = None,
    calls: Annotated[int | None, typer.Option(min=1, help="Calls of what was compiled; 40 if left out.")] = None,
    profile: Annotated[bool, typer.Option(help="What each kernel takes inside a call, too.")] = False,
    what_if: Annotated[list[str] | None, typer.Option(
        "--what-if", metavar="RULE", help="With a plan or problem: deny=KERNEL_OR_BACKEND or lock=KERNEL_OR_BACKEND; repeatable.")] = None,
    problems: Annotated[str | None, typer.Option(metavar="FOLDER", help="A plan's problems, for --what-if; beside it if left out.")] = None,
) -> None:  # fmt: skip
    """Explain every choice: of a stored plan, or of what MODULE:FACTORY returns, compiled and run CALLS times for the race.

    With --what-if, solve a stored problem again with rules added, and show what moves.
    """
    from . import api
    from .deploy import offline

    if problems is not None and not what_if:
        raise OptionError("--problems is for --what-if with a plan: give --what-if too, or leave --problems out")
    if what.endswith(".json") and (calls is not None or profile):
        raise OptionError("a plan or problem file runs nothing: give no --calls and no --profile with it")
    if what_if or what.endswith(".problem.json"):
        result = _what_if(what, what_if or [], parse_options(option), problems)
    elif what.endswith(".json"):
        if option:
            raise OptionError("a plan file holds its options: give no --option with it")
        result = api.explain(offline.load_plan(what))
    else:
        result = _explain_factory(what, option, calls or 40, profile)
    _show(result, as_json, html)


def _show(result: Report, as_json: bool, html: str | None) -> None:
    if html:
        result.to_html(html)
        err.print(f"{html} written", markup=False)
    if out.is_terminal and not as_json:
        out.print(result, soft_wrap=False, width=min(out.width, 100))
    else:
        out.print(result.to_json() if as_json else str(result), markup=False)


def _what_if(file: str, rules: list[str], options: dict[str, Any], problems: str | None) -> Report:
    from .deploy.offline import load_plan
    from .plan_io import load_problem
    from .reports.compare import what_if, what_if_plan

    if not rules or options.keys() - {"solver"}:
        raise OptionError("a problem file needs --what-if deny=KERNEL or lock=KERNEL, and of the options it takes `solver` only")
    solver = options.get("solver", "cp_sat")
    if file.endswith(".problem.json"):
        return what_if(load_problem(file), rules, solver, Path(file).name)
    return what_if_plan(load_plan(file), problems or Path(file).parent / "problems", rules, solver)


@app.command()
def diff(before: str, after: str, as_json: Json = False, html: Html = None) -> None:
    """Which decisions differ between two plans of `lz solve`, or two outputs of `lz explain --json`; and what that costs."""
    from .reports.compare import compare_files

    _show(compare_files(before, after), as_json, html)


def _explain_factory(factory: str, option: list[str] | None, calls: int, profile: bool) -> Report:
    import torch

    from . import api

    options = parse_options(option)
    model, args, kwargs = load_model(factory)
    with torch.no_grad():
        compiled = api.compile(model, **options)
        for _ in range(calls):
            compiled(*args, **kwargs)
        return api.explain(compiled, (lambda: compiled(*args, **kwargs)) if profile else None)


@app.command()
def solve(
    factory: Factory, file: Annotated[str, typer.Argument(metavar="FILE.json", help="where the plan goes, as JSON")],
    dynamic: Annotated[list[str] | None, typer.Option(help="A dimension that varies: ARGUMENT:DIMENSION=SYMBOL; repeatable.")] = None,
    bucket: Annotated[list[str] | None, typer.Option(help="A symbol's upper ends: SYMBOL=16,64,256; repeatable.")] = None,
    at_least: Annotated[list[str] | None, typer.Option(help="A symbol's lowest size: SYMBOL=32, 1 if not given; repeatable.")] = None,
    bundle: Annotated[str | None, typer.Option(metavar="DIR", help="The model's folder: the plan is for its tokenizer and config.")] = None,
    option: Option = None, as_json: Json = False,
    problems: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where each graph's problem goes, for explain --what-if.")] = None,
    one_format: Annotated[bool, typer.Option(help="With freeze, each weight has one format in all cells.")] = True,
) -> None:  # fmt: skip
    """Plan what MODULE:FACTORY returns for ranges of shapes; `lz_compiler.compile(model, plan=FILE)` runs by it."""
    from .deploy import offline
    from .deploy.export import ranges_text

    buckets, dims, lowest = _parsed_buckets(bucket or []), _parsed_dynamic(dynamic or []), _parsed_lowest(at_least or [])
    if not Path(file).absolute().parent.is_dir():  # told now, not after minutes of measuring
        raise OptionError(f"there is no folder for {file!r}. Make it first.")
    options = parse_options(option)
    if problems is not None:
        options |= parse_options([f"problems={problems}"])
    model, args, kwargs = load_model(factory)
    ranges: dict[str, Any] = {"buckets": buckets, "dynamic": dims, "at_least": lowest}
    plan = offline.solve(model, args, kwargs, **ranges, bundle=bundle, one_format=one_format, **options)
    plan.save(file)
    if as_json:
        cells = [{"ranges": c.ranges, "winner": c.winner, "times": dict(c.times)} for c in plan.cells]
        out.print(json.dumps({"file": file, "cells": cells}), markup=False)
        return
    for cell in plan.cells:
        times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in cell.times.items())
        out.print(f"{ranges_text(cell.ranges):24s} {cell.winner:12s} {times}", markup=False)


@app.command()
def bake(plan: Annotated[str, typer.Argument(metavar="FILE.json", help="a plan of `lz solve`")], factory: Factory,
         folder: Annotated[str, typer.Argument(metavar="DIR", help="where it goes")]) -> None:  # fmt: skip
    """Write a stored plan of what MODULE:FACTORY returns as a folder that runs without LayerZero."""
    from .deploy import baking, offline

    model, args, kwargs = load_factory(factory)
    out.print(str(baking.bake(offline.load_plan(plan), folder, model, args, kwargs)), markup=False)


@app.command()
def warmup(folder: Annotated[str, typer.Argument(metavar="DIR", help="a folder of `lz bake`")]) -> None:
    """Load a baked folder and run each of its cells: compiled kernels are then in the caches of this machine."""
    from .deploy.warming import warmup as warm

    module = warm(folder, progress=True)
    out.print(f"{folder}: {len(module.EXAMPLES)} cells ready", markup=False)


@app.command()
def fuzz(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a folder of `lz bake`")],
    model: Annotated[str | None, typer.Option(metavar="MODULE:FACTORY", help="the baked model; without it, nothing is run")] = None,
    examples: Annotated[int, typer.Option(min=1, help="calls that are tried")] = 500, as_json: Json = False,
) -> None:  # fmt: skip
    """Prove that a baked file has a right cell for every declared size, and try random ones against the model. 1 if it is wrong."""
    from .deploy.fuzzing import fuzz as run

    report = run(folder, examples=examples, model=load_factory(model)[0] if model else None)
    out.print(report.to_json() if as_json else str(report), markup=False)
    raise typer.Exit(0 if report.ok else 1)


def _parsed_buckets(texts: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for text in texts:
        symbol, _, ends = text.partition("=")
        if not symbol or not all(end.isdecimal() for end in ends.split(",")):
            raise OptionError(f"--bucket {text!r} is not SYMBOL=END,END,..., for example seq=16,64,256")
        if symbol in found:
            raise OptionError(f"--bucket {symbol}=... is given twice: give all its ends at once, for example {symbol}=16,64,256")
        found[symbol] = [int(end) for end in ends.split(",")]
    return found


def _parsed_lowest(texts: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        symbol, _, low = text.partition("=")
        if not symbol or not low.isdecimal() or symbol in found:
            raise OptionError(f"--at-least {text!r} is not SYMBOL=SIZE, for example height=32, once for a symbol")
        found[symbol] = int(low)
    return found


def _parsed_dynamic(texts: list[str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        place, _, symbol = text.partition("=")
        name, _, dim = place.rpartition(":")
        if not name or not symbol or not dim.isdecimal():
            raise OptionError(f"--dynamic {text!r} is not ARGUMENT:DIMENSION=SYMBOL, for example input_ids:1=seq")
        if found.setdefault(name, {}).setdefault(int(dim), symbol) != symbol:
            raise OptionError(f"--dynamic {place}=... is given twice, as {found[name][int(dim)]!r} and as {symbol!r}: leave one out")
    return found


@app.command()
def canary(
    backend: Annotated[list[str] | None, typer.Option(help="Only this kernel library; repeatable.")] = None, as_json: Json = False,
    device: Annotated[list[str] | None, typer.Option(help="Only cpu, or only cuda.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what changed since the last stored run.")] = False,
    row_s: Annotated[float, typer.Option(help="Seconds for one kernel on one shape.")] = 60.0,
    jobs: Annotated[int | None, typer.Option(help="Processes at once; by default one for each core, at most 4, and one on a GPU.")] = None,
    cache_dir: CacheDir = None,
) -> None:  # fmt: skip
    """Try every declared capability of the kernel libraries on this machine.

    Exit code 1 if something failed or was not finished; with --diff also if what passed in the last stored run no longer does.
    """
    from rich.progress import Progress

    from .trust.canary import canary as run

    with Progress(console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label)
            bar.update(tasks[label], completed=done, total=total)

        report = run(backend, devices=device, cache_dir=cache_dir, row_s=row_s, jobs=jobs, progress=advance)
    out.print(report.to_json() if as_json else report.diff() if diff else str(report), markup=False)
    if not report.ok or (diff and report.lost):
        raise typer.Exit(1)


@app.command()
def bench(factory: Factory, as_json: Json = False, option: Option = None, rounds: Rounds = 15) -> None:
    """Eager, Inductor and LayerZero on what MODULE:FACTORY returns, interleaved in one run."""
    from .demo import measure_columns

    columns = {"eager": None, "inductor": {}, "layerzero": parse_options(option)}
    model, args, kwargs = load_model(factory)
    rows, _ = measure_columns(model, args, kwargs, columns, rounds, err.print)
    if as_json:
        out.print(json.dumps(rows, indent=2), markup=False)
    else:
        for name, row in rows.items():
            speed = rows["inductor"]["median_ms"] / row["median_ms"]
            out.print(f"{name:12s} {row['median_ms']:9.3f} ms   {speed:.2f}x of inductor's speed")


@app.command()
def ablate(
    corpus_dir: Annotated[list[Path] | None, typer.Option("--corpus", help="Folder of cases; repeatable.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the tables; a run that was stopped goes on there.")] = Path("ablation"),
    offline: Annotated[bool, typer.Option("--offline", help="Nothing is measured (which is so without it, too).")] = False,
    model: Annotated[list[str] | None, typer.Option(help="A cost model; repeatable. All if left out.")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="A solver; repeatable. The first one plans for all cost models.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each learned model.")] = 3,
    figures: Annotated[bool, typer.Option(help="Draw the figures (needs matplotlib).")] = True,
    train: Annotated[Path | None, typer.Option(help="Train on all cases instead, and write the model here.")] = None,
) -> None:  # fmt: skip
    """Compare cost models and solvers on stored problems: tables, figures, and a Markdown report on stdout."""
    from .research import ablate, ablate_report
    from .research.corpus import load_all

    cases = load_all(corpus_dir or [Path("benchmarks/corpora")])
    if train is not None:
        forest = ablate.train(cases, train)
        out.print(f"{train}: trained on {forest.trained_on}", markup=False)
        return
    ablate.run(cases, out_dir, tuple(model or ablate.MODELS), tuple(solver or ablate.SOLVERS), range(seeds), err.print)
    text = ablate_report.report(out_dir)
    (out_dir / "report.md").write_text(text)
    out.print(text, markup=False)
    for path in ablate_report.figures(out_dir) if figures else ():
        err.print(str(path))


@app.command()
def fingerprint(folder: Annotated[str, typer.Argument(metavar="DIR", help="A Hugging Face model folder.")], as_json: Json = False,
                cache_dir: CacheDir = None) -> None:  # fmt: skip
    """Hashes of a model folder's tokenizer, part by part, of its config and of its weights."""
    from .deploy.model_fingerprint import fingerprint as made_of

    found = made_of(folder, cache_dir)
    if as_json:
        out.print(json.dumps(found.to_dict(), indent=2), markup=False)
        return
    for group, whole in found.digests().items():
        out.print(f"{whole}  {group}", markup=False)
        for part, digest in getattr(found, group):
            out.print(f"  {digest}  {part}", markup=False)


@app.command()
def demo(rounds: Rounds = 15) -> None:
    """Compile a Llama-shaped model with eager, Inductor and LayerZero, and show what was chosen and why."""
    from .demo import run

    run(out, err, rounds)


@cache_app.command("ls")
def cache_ls(as_json: Json = False, cache_dir: CacheDir = None) -> None:
    """What is stored, by kind."""
    from .trust.failures import take

    store = _store(cache_dir)
    take(store)
    held = store.ls()
    if as_json:
        found = {
            "path": str(held.path) if held.path else None,
            "bytes": held.bytes,
            "counts": dict(held.counts),
            "machines": dict(held.machines),
        }
        out.print(json.dumps(found), markup=False)
        return
    out.print(f"{held.path or 'in memory only'}, {held.bytes} bytes", markup=False)
    for kind, count in sorted(held.counts.items()):
        out.print(f"  {kind}: {count}")
    if len(held.machines) > 1:
        out.print(f"  from {', '.join(f'{name} ({n})' for name, n in sorted(held.machines.items()))}", markup=False)
    for value in store.get_records("quarantine").values():
        out.print(f"    {value.get('kernel')} for {value.get('op')} in {value.get('dtype')}: {value.get('error')}", markup=False)


@cache_app.command("clear")
def cache_clear(kind: Annotated[str | None, typer.Argument(help=f"{', '.join(KINDS)}; all if left out")] = None,
                cache_dir: CacheDir = None) -> None:  # fmt: skip
    """Forget stored facts, or one kind of them."""
    if kind is not None and kind not in KINDS:
        raise OptionError(unknown("kind", kind, KINDS))
    out.print(f"{_store(cache_dir).clear(kind)} removed")


@cache_app.command("export")
def cache_export(file: str, cache_dir: CacheDir = None) -> None:
    """Write timings, peaks, canary results and quarantined kernels, with this machine's name, to FILE.jsonl, to be merged elsewhere."""
    out.print(f"{_store(cache_dir).export(file)} written")


@cache_app.command("merge")
def cache_merge(files: list[str], cache_dir: CacheDir = None) -> None:
    """Add what exported FILES.jsonl, or other machines' stores, know: timings, peaks, what the canary found, what raised.

    Where both know something else of one environment, what was found on this machine stays; else the more careful of the two.
    """
    for file in files:
        merged = _store(cache_dir).merge(file)
        by = ", ".join(f"{n} from {name}" for name, n in sorted(merged.machines.items()))
        told = f"{merged.added} added{f' ({by})' if by else ''}, {len(merged.conflicts)} differ under the same environment"
        out.print(f"{file}: {told}" if len(files) > 1 else told, markup=False)
        if merged.damaged:
            out.print(f"  {merged.damaged} damaged rows left out")
        for conflict in merged.conflicts[:20]:
            out.print(f"  {conflict}", markup=False)


def _store(cache_dir: str | None) -> TimingStore:
    from .timings import user_store

    return user_store(cache_dir)
