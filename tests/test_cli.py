"""The command line: what a person types, what a program reads from it, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import plant
from typer.testing import CliRunner, Result

import lz_compiler as lz
from lz_compiler import backend, backends, collectives, explain, facts, load_plan
from lz_compiler.backends import library
from lz_compiler.cli import app, load_factory, load_model, main, parse_options
from lz_compiler.deploy import model_fingerprint
from lz_compiler.errors import LayerZeroError, OptionError
from lz_compiler.options import parse_text
from lz_compiler.plan_io import save_problem
from lz_compiler.reports.report import describe_plan
from lz_compiler.timings import Timing
from lz_compiler.trust import failures, first_use, verdicts
from lz_compiler.types import Plan, Problem, Status

FACTORY = """
import torch
from torch import nn


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 7), nn.GELU()).eval(), (torch.randn(5, 33),), None


def raises():
    return {}["missing"]


def narrow():
    return nn.Linear(3, 3), (torch.ones(1, 4),), None


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


def counting():
    return Counting(), (torch.ones(1, 4),), None


def two():
    return nn.Linear(3, 3), (torch.ones(1, 3),)


answer = 42
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module `lz_cli_models` in the working directory, as a user has one."""
    (tmp_path / "lz_cli_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lz_cli_models", raising=False)
    return "lz_cli_models"


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """What `lz ARGS` prints on stderr as it exits with 2, on one line."""
    monkeypatch.setattr(sys, "argv", ["lz", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return " ".join(printed.err.split())


# --- reading --------------------------------------------------------------------------------------------------------------


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_help_loads_no_torch() -> None:
    code = "import sys; from lz_compiler.cli import main; sys.argv = ['lz', '--help']\n"
    code += "try: main()\nexcept SystemExit as e: assert not e.code\n"
    code += "assert 'torch' not in sys.modules, 'lz --help imports torch'"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Heavy imports" not in done.stdout
    for command in ("doctor", "demo", "explain", "bench", "solve", "bake", "fingerprint", "cache"):
        assert command in done.stdout
    assert time.perf_counter() - start < 20  # a busy machine; about half a second on a quiet one


def test_python_m(tmp_path: Path) -> None:
    env = {**os.environ, "LAYERZERO_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "lz_compiler"]
    done = subprocess.run([*command, "cache", "ls", "--json"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"].startswith(str(tmp_path))
    wrong = subprocess.run([*command, "explain", "nowhere"], capture_output=True, text=True, check=False, env=env)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert "not MODULE:FACTORY" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_doctor(tmp_path: Path) -> None:
    result = run("doctor", "--json", "--cache-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["libraries"]) == set(backends.all_backends())
    assert "onednn.linear" in found["libraries"]["onednn"]["kernels"]
    assert found["targets"]["cpu"]["bandwidth"] > 0
    assert found["cache"].startswith(str(tmp_path))
    assert found["stored"] == {"peaks": 1}
    text = run("doctor", "--cache-dir", str(tmp_path))
    assert text.exit_code == 0, text.output
    for word in ("GB/s", "onednn.linear", str(tmp_path), "1 peaks"):
        assert word in text.stdout


def test_explain_and_bench(models: str, tmp_path: Path) -> None:
    plant(str(tmp_path))
    options = ("-o", "measure_budget_s=0", "-o", "freeze=true", "-o", f"cache_dir={tmp_path}")
    result = run("explain", f"{models}:tiny", "--json", "--calls", "1", *options)
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    (plan,) = graph["plans"]
    (region,) = [r for r in plan["regions"] if r["op"] == "linear"]
    assert plan["kind"] == "inference"
    assert plan["status"] == "optimal"
    assert "not_measured" in {r["code"] for r in region["rejections"]}
    text = run("explain", f"{models}:tiny", "--calls", "1", "--profile", "-o", "race=false", "-o", "cost_model=roofline", *options)
    assert text.exit_code == 0, text.output
    assert "inference graph" in text.stdout
    assert " of a call of " in text.stdout
    assert region["kernel"] in text.stdout

    bench = run("bench", f"{models}:tiny", "--json", "--rounds", "3", *options)
    assert bench.exit_code == 0, bench.output
    rows = json.loads(bench.stdout)
    assert list(rows) == ["eager", "inductor", "layerzero"]
    assert all(row["median_ms"] > 0 for row in rows.values())


def test_solve_and_explain_of_the_plan(models: str, tmp_path: Path) -> None:
    plant(str(tmp_path))
    file = str(tmp_path / "plan.json")
    solve = ("solve", f"{models}:tiny", file, "--dynamic", "input:0=rows", "--bucket", "rows=4,8", "--at-least", "rows=3")
    options = ("-o", "race=false", "-o", "cost_model=roofline", "-o", "freeze=true", "-o", f"cache_dir={tmp_path}")
    text = run(*solve, *options)
    assert text.exit_code == 0, text.output
    assert [line.split()[:3] for line in text.stdout.splitlines()] == [
        ["rows", ends, "layerzero"] for ends in ("3..4", "5..8")
    ]  # fmt: skip
    plan = load_plan(file)
    assert [(c.ranges, len(c.plans)) for c in plan.cells] == [({"rows": ends}, 1) for ends in ((3, 4), (5, 8))]
    as_json = run(*solve, "--json", *options)
    assert as_json.exit_code == 0, as_json.output
    found = json.loads(as_json.stdout)
    assert found["file"] == file
    assert [c["ranges"] for c in found["cells"]] == [{"rows": [3, 4]}, {"rows": [5, 8]}]

    baked = run("bake", file, f"{models}:tiny", str(tmp_path / "out"))
    assert baked.stdout.strip() == str(tmp_path / "out" / "_layerzero_plan.py"), baked.output
    assert (tmp_path / "out" / "weights.safetensors").exists()

    explained = json.loads(run("explain", file, "--json").stdout)
    assert explained["environment"] == plan.environment
    assert [c["ranges"] for c in explained["cells"]] == [c["ranges"] for c in found["cells"]]
    shown = run("explain", file).stdout
    assert shown == f"{explain(load_plan(file))}\n"
    for cell in explained["cells"]:
        (inner,) = cell["plans"]
        (region,) = inner["regions"]
        assert f"rows {cell['ranges']['rows'][0]}..{cell['ranges']['rows'][1]}: layerzero\n" in shown
        assert f"    {region['op']}{' + gelu' if 'gelu' in region['epilogue'] else ''}: {region['kernel']}  " in shown


def saved(folder: Path, *plans: Plan) -> str:
    """A model plan with a cell for each plan."""
    file = folder / f"{len(plans)}.json"
    file.write_text(json.dumps({"cells": [{"ranges": {"rows": [1, i + 1]}, "plans": [describe_plan(p)]} for i, p in enumerate(plans)]}))
    return str(file)


def test_diff_of_unlike_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph against a cell; of more than one, nothing says which belong together."""
    plan = Plan("f", "inference", {}, (), (), 10**6, 10**6, Status.OPTIMAL, "cp_sat", 0.0, 0.1)
    one, two, graphs = saved(tmp_path, plan), saved(tmp_path, plan, plan), str(tmp_path / "e.json")
    Path(graphs).write_text(json.dumps({"graphs": [{"plans": [describe_plan(plan)]}]}))
    assert "graph 0 against rows 1..1: objective 1.000 ms -> 1.000 ms (+0.0%), 0 decisions differ" in run("diff", graphs, one).stdout
    assert "holds compiled graphs, " in fails(capsys, monkeypatch, "diff", graphs, two)
    page = tmp_path / "d.html"
    shown = run("diff", one, two, "--html", str(page)).stdout
    assert f"rows 1..2: objective - -> 1.000 ms\n  only in {two}\n" in f"{shown}\n"
    assert [g["objective_ns"] for g in json.loads(run("diff", two, one, "--json").stdout)["diff"]["graphs"]] == [[10**6] * 2, [10**6, None]]
    (tmp_path / "p.json").write_text('{"layerzero_problem": 1}')
    assert "p.json --what-if RULE" in fails(capsys, monkeypatch, "diff", one, str(tmp_path / "p.json"))
    assert "it is a folder" in fails(capsys, monkeypatch, "diff", one, str(tmp_path))
    (tmp_path / "p.json").write_text('{"cells": [{"ranges": {}, "plans": [{"kind": "inference"}]}]}')
    assert "KeyError" not in fails(capsys, monkeypatch, "diff", one, str(tmp_path / "p.json"))


def test_cache(tmp_path: Path) -> None:
    where = ("--cache-dir", str(tmp_path))
    store = backend.open_store(str(tmp_path))
    store.put(Timing("key", "aten.mm", 5, 0, 9, None, 0.0, "linear"))
    store.put_record("verdict", "graph", {"winner": "eager"})
    listed = run("cache", "ls", "--json", *where)
    found = json.loads(listed.stdout)
    assert found["counts"] == {"timing": 1, "verdict": 1}
    assert found["bytes"] > 0
    assert Path(found["path"]) == store.path
    text = run("cache", "ls", *where).stdout
    assert "timing: 1" in text
    assert "verdict: 1" in text
    assert run("cache", "clear", "timing", *where).stdout == "1 removed\n"
    assert json.loads(run("cache", "ls", "--json", *where).stdout)["counts"] == {"verdict": 1}
    assert run("cache", "clear", *where).stdout == "1 removed\n"
    assert json.loads(run("cache", "ls", "--json", *where).stdout)["counts"] == {}
    assert run("cache", "clear", *where).stdout == "0 removed\n"


def test_cache_clear_knows_the_kinds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (failures.KIND, verdicts.CANARY, verdicts.FAILED, model_fingerprint.KIND, collectives.KIND, library.IMPORT, first_use.CHECKED)
    assert {*kinds, "timing", "verdict", "peaks"} == set(facts.KINDS)
    told = fails(capsys, monkeypatch, "cache", "clear", "timings")
    assert "unknown kind 'timings'. Did you mean 'timing'? Allowed: canary, " in told


def test_cache_export_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, here, there = str(tmp_path / "card.jsonl"), str(tmp_path / "here"), str(tmp_path / "there")
    backend.open_store(here).put(Timing("key", "aten.mm", 5, 0, 9, None, 0.0, "linear"))
    assert run("cache", "export", file, "--cache-dir", here).stdout == "1 written\n"
    assert run("cache", "merge", file, "--cache-dir", there).stdout.startswith("1 added (1 from ")
    assert backend.open_store(there).get("key") == backend.open_store(here).get("key")
    backend.open_store(here).put_record("quarantine", "aten.mm#1|torch|cpu", {"error": "RuntimeError: no"})
    second = str(tmp_path / "second.jsonl")
    assert run("cache", "export", second, "--cache-dir", here).stdout == "2 written\n"
    several = run("cache", "merge", file, second, "--cache-dir", there).stdout.replace("\n", "")
    assert "card.jsonl: 0 added" in several
    assert "second.jsonl: 1 added (1 from " in several
    assert backend.open_store(there).get_records("quarantine")
    assert "no timings store" in fails(capsys, monkeypatch, "cache", "merge", f"{file}.none", "--cache-dir", there)


def test_cache_dir_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_CACHE_DIR", str(tmp_path / "from-environment"))
    assert "from-environment" in json.loads(run("cache", "ls", "--json").stdout)["path"]


# --- options as text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("freeze", "1", True),
        ("freeze", "FALSE", False),
        ("error_budget", "1e-2", 0.01),
        ("measure_budget_s", " 3 ", 3.0),
        ("memory_limit", "4096", 4096),
        ("backends", "onednn, aten", ("onednn", "aten")),
        ("solver", "greedy", "greedy"),
        ("cache_dir", "a=b", "a=b"),
    ],
)
def test_option_text_is_read_as_from_the_environment(name: str, text: str, value: object) -> None:
    found = parse_text(name, text)
    assert found == value
    assert type(found) is type(value)
    assert parse_options([f"{name}={text}"]) == {name: value}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("frezee", "1", "unknown option 'frezee'. Did you mean 'freeze'?"),
        ("mode", "default", "unknown option 'mode'"),
        ("freeze", "yes", "option 'freeze' is 'yes'. Allowed: 1, 0, true, false."),
        ("freeze", "", "option 'freeze' is ''"),
        ("error_budget", "much", "option 'error_budget' is 'much'. Give a number"),
        ("memory_limit", "1.5", "whole number"),
        ("solver", "cpsat", "Did you mean 'cp_sat'?"),
        ("backends", "onednn,", "option 'backends' is 'onednn,', with an empty name. Give a list"),
    ],
)
def test_wrong_option_text(name: str, text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_text(name, text)
    assert message in str(raised.value)


# --- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "bench"])
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nocolon", "'nocolon' is not MODULE:FACTORY, for example lz_compiler.zoo:llama"),
        (":tiny", "is not MODULE:FACTORY"),
        ("no_such_module_:f", "cannot load 'no_such_module_:f': No module named 'no_such_module_'"),
        ("lz_cli_models:tony", "'tony'"),
        ("lz_cli_models:answer", "is not a function"),
        ("lz_cli_models:two", "must return (model, args, kwargs)"),
    ],
)
def test_wrong_factory(
    command: str, factory: str, message: str, models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in fails(capsys, monkeypatch, command, factory)


def test_wrong_factory_name_gets_the_nearest(models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Did you mean 'tiny'?" in fails(capsys, monkeypatch, "explain", f"{models}:tinny")


@pytest.mark.parametrize(
    ("factory", "message", "line"),
    [
        ("lz_cli_models:raises", "'lz_cli_models:raises' raised KeyError: 'missing'", 'return {}["missing"]'),
        ("lz_cli_broken:f", "cannot load 'lz_cli_broken:f': ZeroDivisionError: division by zero", "1 / 0"),
    ],
)
def test_an_error_of_the_users_code_has_the_users_frames(factory: str, message: str, line: str, models: str, tmp_path: Path) -> None:
    (tmp_path / "lz_cli_broken.py").write_text("1 / 0\n")
    with pytest.raises(OptionError) as raised:
        load_factory(factory)
    told = str(raised.value)
    assert told.startswith(message)
    assert line in told
    assert told.count("  File ") == 1


@pytest.mark.parametrize("command", [["explain"], ["bench"], ["solve", "p.json"]])
def test_a_model_that_fails_by_itself(
    command: list[str], models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is compiled, and on a copy: the call that tries it may write."""
    monkeypatch.setattr("torch._dynamo.optimize", None)
    told = fails(capsys, monkeypatch, command[0], f"{models}:narrow", *command[1:])
    assert "the model itself fails on its example arguments: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in told
    assert load_model(f"{models}:counting")[0].calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p.json", "--bucket", "rows"], "--bucket 'rows' is not SYMBOL=END,END,..., for example seq=16,64,256"),
        (["p.json", "--bucket", "rows=4,x"], "--bucket 'rows=4,x' is not"),
        (["p.json", "--at-least", "rows=a"], "--at-least 'rows=a' is not SYMBOL=SIZE, for example height=32, once for a symbol"),
        (["p.json", "--dynamic", "input=rows"], "--dynamic 'input=rows' is not ARGUMENT:DIMENSION=SYMBOL, for example input_ids:1=seq"),
        (["p.json", "--dynamic", "input:0"], "--dynamic 'input:0' is not"),
        (["p.json", "--bucket", "rows=²"], "--bucket 'rows=²' is not"),
        (["p.json", "--bucket", "rows=4", "--bucket", "rows=8"], "--bucket rows=... is given twice"),
        (["p.json", "--dynamic", "input:0=a", "--dynamic", "input:0=b"], "--dynamic input:0=... is given twice, as 'a' and as 'b'"),
        (["p.json", "--problems", __file__], "which is no folder and cannot be made one: File exists"),
        (["p.json", "--dynamic", "inputs:0=rows", "--bucket", "rows=4"], "Did you mean 'input'?"),
        (["p.json", "--dynamic", "input:0=rows"], "symbol 'rows' has no buckets"),
        (["p.json", "--bucket", "rows=4"], "no dimension is called 'rows'"),
        (["none/p.json"], "there is no folder for 'none/p.json'"),
        (["p.json", "-o", "frezee=1"], "Did you mean 'freeze'?"),
    ],
)
def test_wrong_arguments_of_solve(
    arguments: list[str], message: str, models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in fails(capsys, monkeypatch, "solve", f"{models}:tiny", *arguments)
    assert not list(tmp_path.glob("*.json")), "nothing is written"


def test_wrong_plan_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.json"
    assert "cannot read the plan" in fails(capsys, monkeypatch, "explain", str(file))
    file.write_text("{}")
    assert "is not a plan of lz solve" in fails(capsys, monkeypatch, "explain", str(file))
    assert "give no --option" in fails(capsys, monkeypatch, "explain", str(file), "-o", "freeze=1")
    assert "give no --calls" in fails(capsys, monkeypatch, "explain", str(file), "--calls", "3")
    assert "--problems is for --what-if" in fails(capsys, monkeypatch, "explain", "m:f", "--problems", "x")
    folder = tmp_path / "d.json"
    folder.mkdir()
    assert "it is a folder. Make one: lz.solve(...).save(path), or `lz solve`." in fails(capsys, monkeypatch, "explain", str(folder))


@pytest.mark.parametrize(
    "command", ["bench m:f --rounds 0", "demo --rounds 0", "fuzz x --examples 0", "explain m:f --calls 0", "ablate --seeds 0"]
)
def test_a_number_that_is_too_small(command: str) -> None:
    result = run(*command.split())
    assert result.exit_code == 2
    assert command.split()[-2] in result.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain(3), "explain takes what torch.compile returned, a plan, or nothing; given: int"),
        (lambda: explain(len), "given: builtin_function_or_method"),
        (lambda: explain("none.json"), "cannot read the plan 'none.json': no such file"),
        (lambda: explain(Path("none.json")), "cannot read the plan 'none.json': no such file"),
        (lambda: lz.compile(len, problems=__file__), "which is no folder and cannot be made one: File exists. Give another."),
        (lambda: lz.fuzz(".", examples=-1), "examples is -1. Give 1 or more."),
        (lambda: lz.fuzz(".", examples="3"), "examples is '3'. Give 1 or more."),  # type: ignore[arg-type]
        (lambda: lz.fuzz(3), "a folder that lz.bake wrote is needed; given: 3"),  # type: ignore[arg-type]
        (lambda: lz.load_baked(None), "a folder that lz.bake wrote is needed; given: None"),  # type: ignore[arg-type]
        (lambda: lz.warmup(".", calls="3"), "calls is '3'; at least 1 is needed."),  # type: ignore[arg-type]
        (lambda: lz.canary("onednn"), "backends is 'onednn'. Give a list: ['onednn']."),
        (lambda: lz.canary([], devices="cpu"), "devices is 'cpu'. Give a list: ['cpu']."),
        (lambda: lz.canary([], jobs=1.5), "jobs is 1.5. Give 1 or more."),  # type: ignore[arg-type]
        (lambda: lz.canary([], row_s="1"), "row_s is '1'. Give a number of seconds above 0."),  # type: ignore[arg-type]
        (lambda: lz.StaticCacheDecoder(len, 1, 1), "takes a causal language model of transformers; given: builtin_function_or_method"),
        (lambda: explain("none.json", profile=len), "a plan runs nothing that could be profiled. Give what lz.compile(model, plan=...)"),
        (lambda: lz.canary([], row_s=0), "row_s is 0. Give a number of seconds above 0."),
        (lambda: lz.canary([], total_s=float("nan")), "total_s is nan"),
    ],
)
def test_wrong_arguments_of_functions(call: Callable[[], object], message: str) -> None:
    with pytest.raises(LayerZeroError) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("command", ["bench", "solve", "bake"])
def test_help_says_what_a_factory_is(command: str) -> None:
    assert "MODULE:FACTORY" in run(command, "--help").stdout.strip().splitlines()[0]


def test_files_in_no_folder_are_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = str(Path(__file__).parents[1] / "benchmarks" / "corpora" / "cpu")
    assert "there is no folder for" in fails(
        capsys, monkeypatch, "ablate", "--corpus", corpus, "--train", str(tmp_path / "none" / "m.json")
    )
    told = fails(capsys, monkeypatch, "cache", "export", str(tmp_path / "none" / "f.jsonl"))
    assert "f.jsonl: No such file or directory. Give a file in a folder that is writable." in told


def test_a_problem_that_cannot_be_written(tmp_path: Path) -> None:
    problem = Problem((), (), (), (), frozenset(), (), 0.0, None)
    with pytest.raises(LayerZeroError, match=r"No such file or directory\. Give a file in a folder that is writable") as raised:
        save_problem(problem, tmp_path / "none" / "p.problem.json")
    assert ".tmp" not in str(raised.value)


def test_what_was_not_compiled_is_said() -> None:
    model = torch.nn.Linear(2, 2)
    for compiled in (lz.compile(model), torch.compile(model, backend="eager")):
        assert "nothing of this module was compiled by backend='layerzero' yet: call it first" in str(explain(compiled))


def test_what_another_backend_compiled_is_no_recompilation(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo counts all compilations of one code."""
    caplog.set_level("INFO", "lz_compiler.backend")
    layers = [torch.nn.Linear(3, 3).eval() for _ in range(3)]
    with torch.no_grad():
        torch.compile(layers[0], backend="eager")(torch.ones(2, 3))
        for layer in layers[1:]:
            run_by = lz.compile(layer, race=False, cost_model="roofline")
            run_by(torch.ones(2, 3))
        said = [r.levelname for r in caplog.records if " compiled " in r.message]
        run_by(torch.ones(4, 3))
    assert said == ["INFO", "INFO"]
    assert "/3 is compiled again" in caplog.text


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_wrong_option(command: str, models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(option: str) -> str:  # before anything is compiled
        return fails(capsys, monkeypatch, command, f"{models}:tiny", "-o", option)

    assert "unknown option 'sovler'. Did you mean 'solver'?" in told("sovler=greedy")
    assert "Did you mean 'greedy'?" in told("solver=gredy")
    assert "-o 'freeze' is not NAME=VALUE" in told("freeze")
    assert "unknown backend 'onednm'. Did you mean 'onednn'?" in told("backends=onednm")


def test_every_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LayerZeroError("what was given, what is allowed, what to do")

    monkeypatch.setattr("lz_compiler.timings.open_store", fail)
    assert fails(capsys, monkeypatch, "cache", "ls") == "lz: what was given, what is allowed, what to do"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["lz", "explain", "x" * 200])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_command() -> None:
    assert run("explane").exit_code == 2
    assert run("explain").exit_code == 2
    assert run("cache", "clear", "--kind-of").exit_code == 2


SCRIPTS = sorted(p for p in BENCHMARKS.glob("*.py") if "import argparse" in p.read_text())
# Each script as `python SCRIPT --help` runs it, in a fork of one process that has imported what most of them import.
HELP = """
import json, os, runpy, sys
import lz_compiler.backend, torch._inductor.compile_fx, torch.distributed.tensor.parallel, transformers
folder, *scripts = sys.argv[1:]
codes = {}
for script in scripts:
    child = os.fork()
    if not child:
        out = os.open(os.path.join(folder, os.path.basename(script)), os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        os._exit(1)
    codes[os.path.basename(script)] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code of each script, and what it printed."""
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", HELP, str(folder), *map(str, SCRIPTS)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return {script: (code, (folder / script).read_text()) for script, code in json.loads(ran.stdout).items()}


@pytest.mark.slow
@pytest.mark.parametrize("script", [p.name for p in SCRIPTS])
def test_every_benchmark_starts(script: str, helped: dict[str, tuple[int, str]]) -> None:
    code, printed = helped[script]
    assert code == 0, printed
    assert f" benchmarks/{script}" in printed  # by python, or torchrun
