"""Baked files whose kernels raise: what the call gives, what is reported, and that the next planner does without the kernel."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policy import ACME, FIXED, linear, quarantined, store, third_party
from torch import Tensor, nn
from typer.testing import CliRunner

import lz_compiler as lz
from lz_compiler import cli
from lz_compiler.errors import PlanError
from lz_compiler.trust import failures

__all__ = ["third_party"]  # a fixture, for every test here too

# acme's operator as its users have it, without LayerZero; its licence can expire.
LIBRARY = """
import sys, warnings
for name in ("lz_compiler", "networkx", "ortools"):
    sys.modules[name] = None
import torch
from safetensors.torch import save_file
licence, called = {"valid": True}, []
library = torch.library.Library("acme", "DEF")
library.define("linear(Tensor x, Tensor w, Tensor b) -> Tensor")
def run(x, w, b):
    called.append(tuple(x.shape))
    if not licence["valid"]:
        raise RuntimeError("acme: the licence\\nhas expired")
    return torch.nn.functional.linear(x, w, b)
library.impl("linear", run, "CompositeExplicitAutograd")
import _layerzero_plan as p
def call(x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = len(called)
        try:
            out = p.forward(x)
        except Exception as error:
            out = f"{type(error).__name__}: {error}"
        right = not isinstance(out, str) and torch.allclose(out, eager(x), atol=1e-5)
        print(out if isinstance(out, str) else "right" if right else "wrong", len(called) - before, sep="\\n")
        for warning in caught:
            print("warned:", warning.message)
"""


@pytest.fixture(autouse=True)
def no_reports(third_party: None) -> Iterator[None]:
    shutil.rmtree(folder(), ignore_errors=True)
    yield
    shutil.rmtree(folder(), ignore_errors=True)


def folder() -> Path:
    return Path(os.environ["LAYERZERO_CACHE_DIR"]) / failures.FOLDER


def reports() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder().glob("*"))]


def baked(out: Path, model: nn.Module, x: Tensor, **options: Any) -> Any:
    plan = lz.solve(model, (x,), **{**FIXED, "policy": ACME, **options})
    assert "acme.linear" in {c.candidate.kernel for cell in plan.cells for p in cell.plans for c in p.choices}
    lz.bake(plan, out, model, (x,))
    return plan


def process(out: Path, code: str, **env: str) -> list[str]:
    command = [sys.executable, "-c", f"{LIBRARY}\n{code}"]
    ran = subprocess.run(command, cwd=out, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_file_whose_operator_nobody_registered_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    baked(tmp_path / "out", linear(16, 16), torch.randn(5, 16))
    command = [sys.executable, "-c", "import _layerzero_plan"]
    ran = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, timeout=300, check=False)
    assert "calls torch.ops.acme.linear, which nothing here registers. Import its package before this file." in ran.stderr


ROWS: dict[str, Any] = {"dynamic": {"input": {0: "rows"}}, "buckets": {"rows": [8, 32]}}
EAGER = """
weight, bias = (p._stored.get_tensor(name) for name in ("0.weight", "0.bias"))
eager = lambda x: torch.nn.functional.linear(x, weight, bias)
"""


def test_plain_aten_calls_take_the_place_of_a_cell_in_which_a_kernel_raised(tmp_path: Path) -> None:
    model, x = linear(16, 16), torch.randn(5, 16)
    plan = baked(tmp_path / "out", model, x, **ROWS)
    said = process(
        tmp_path / "out",
        EAGER + "call(torch.randn(5, 16)); licence['valid'] = False\n"
        "for n in (5, 5, 8, 20, 1, 40, 5): call(torch.randn(n, 16))\nprint(sorted(p.failed), 'lz_compiler.backends' in sys.modules)",
    )
    right, before, *rest = said
    assert (right, before) == ("right", "1")
    for cell in (1, 2):  # in that of one row TorchInductor leaves no product to plan
        start = rest.index(next(line for line in rest if line.startswith(f"warned: LayerZero: cell_{cell}: ")))
        assert rest[start - 2 : start] == ["right", "1"]
        assert "acme.linear raised RuntimeError: acme: the licence has expired. This process runs plain ATen calls in its" in rest[start]
        assert f"the report {folder()}" in rest[start]
    calls = [line for line in rest[:-1] if not line.startswith("warned: LayerZero: cell")]
    assert calls[:6] == ["right", "1", "right", "0", "right", "0"]  # 5 twice and 8, of one cell
    assert [line for line in calls if line not in ("right", "0", "1")] == [line for line in calls if "rows beyond 32" in line]
    assert calls.count("1") == 2  # once for each cell
    assert rest[-1] == "['cell_1', 'cell_2'] False"
    found = reports()
    assert {r["cell"] for r in found} == {"cell_1", "cell_2"}
    assert {r["plan"] for r in found} == {json.loads((tmp_path / "out" / "manifest.json").read_text())["plan"]}
    assert found[0]["failed"] == [{"kernel": "acme.linear", "version": "1", "library": "1.0", "op": "linear", "dtype": "float32"}]
    # The next planner takes the reports over, and does without the kernel; so does who would follow the old plan.
    again = lz.solve(model, (x,), **{**FIXED, "policy": ACME, **ROWS})
    assert "acme.linear" not in {c.candidate.kernel for cell in again.cells for p in cell.plans for c in p.choices}
    assert "acme.linear (quarantined)" in str(lz.explain(again))
    assert "licence has expired" in str(lz.explain(again))
    ((key, value),) = quarantined().items()
    assert key.startswith("acme.linear#1|1.0|linear|float32|")
    assert value["error"] == "RuntimeError: acme: the licence has expired"
    assert not reports()
    with pytest.raises(PlanError, match=r"uses what failed here: acme\.linear raised at run time"):
        lz.compile(model, plan=plan)(x)
    with pytest.raises(PlanError, match=r"uses what failed here"):
        lz.bake(plan, tmp_path / "again", model, (x,))


def test_a_plan_without_sizes_that_vary_has_a_cells_own_reference(tmp_path: Path) -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    baked(tmp_path / "out", model, x)
    said = process(tmp_path / "out", EAGER + "licence['valid'] = False; call(torch.randn(3, 16)); call(torch.randn(3, 16))")
    assert [said[0], said[1], *said[3:]] == ["right", "1", "right", "0"]
    text = (tmp_path / "out" / "_layerzero_plan.py").read_text()
    (function,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == "reference_0")
    assert "acme" not in ast.unparse(function)
    assert len(reports()) == 1
    assert "quarantine: 1" in CliRunner().invoke(cli.app, ["cache", "ls"]).output
    assert not reports()


def test_in_strict_it_is_an_error_that_names_kernel_and_report(tmp_path: Path) -> None:
    baked(tmp_path / "out", linear(16, 16), torch.randn(3, 16), layout_mode="strict")
    said = process(tmp_path / "out", EAGER + "licence['valid'] = False; call(torch.randn(3, 16)); call(torch.randn(3, 16))")
    (path,) = folder().glob("*")
    error = (
        "RuntimeError: cell_0: acme.linear raised RuntimeError: acme: the licence has expired. The call cannot be repeated: "
        f"LAYOUT_MODE is 'strict'; the report {path} keeps LayerZero from planning it again here: solve and bake again."
    )
    assert said == [error, "1"] * 2
    assert "reference_0" not in (tmp_path / "out" / "_layerzero_plan.py").read_text()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(16, 16)[0]
        self.register_buffer("calls", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls


def test_what_writes_into_its_state_is_not_run_twice(tmp_path: Path) -> None:
    baked(tmp_path / "out", Counting().eval(), torch.randn(3, 16))
    (said, _) = process(tmp_path / "out", "licence['valid'] = False; call(torch.randn(3, 16))")
    assert said.startswith("RuntimeError: cell_0: acme.linear raised")
    assert "The call cannot be repeated: the cell writes into tensors" in said
    assert [r["failed"][0]["kernel"] for r in reports()] == ["acme.linear"]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(8, 16), linear(16, 16)[0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.table(ids))


def test_what_plain_aten_calls_raise_too_is_the_inputs_fault(tmp_path: Path) -> None:
    baked(tmp_path / "out", Lookup().eval(), torch.tensor([1, 2, 3]))
    code = "eager = lambda x: p.reference_0(x)[0]\ngood = torch.tensor([3, 4, 5])\n"
    said = process(tmp_path / "out", code + "call(good); call(torch.tensor([1, 99, 2])); call(good); print(p.failed)")
    assert said[:2] == said[4:6] == ["right", "1"]
    assert "out of" in said[2]
    assert said[6:] == ["{}"]
    assert not reports()


def test_where_no_report_can_be_written_the_call_is_answered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    baked(tmp_path / "out", linear(16, 16), torch.randn(3, 16))
    code = EAGER + "licence['valid'] = False; call(torch.randn(3, 16))"
    right, once, told = process(tmp_path / "out", code, LAYERZERO_CACHE_DIR=str(tmp_path / "file"))
    assert (right, once) == ("right", "1")
    assert "no report of it could be written" in told
    process(tmp_path / "out", code, LAYERZERO_CACHE_DIR=str(tmp_path / "new" / "cache"))
    assert len(list((tmp_path / "new" / "cache" / failures.FOLDER).iterdir())) == 1
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o077 == 0


def test_the_proof_reads_the_guard(tmp_path: Path) -> None:
    """And finds a reference that is another cell's, or too small for the cell."""
    baked(tmp_path / "out", linear(16, 16), torch.randn(5, 16), **ROWS)
    assert lz.fuzz(tmp_path / "out").ok
    file = tmp_path / "out" / "_layerzero_plan.py"
    text = file.read_text()
    file.write_text(text.replace("'cell_1': 'general_0'", "'cell_0': 'general_0'"))
    (found,) = lz.fuzz(tmp_path / "out").findings
    assert found[1] == "general_0 takes the place of cell_0 for rows 1..1, but holds for rows 2.."
    file.write_text(text.replace("'cell_1': 'general_0'", "'cell_1': 'reference_0'"))
    assert lz.fuzz(tmp_path / "out").findings == (("constraint", "reference_0 takes the place of cell_1"),)
    file.write_text(text.replace("out = _rescued(_error, input)", "out = cell_0(input)"))
    assert any(code == "form" for code, _ in lz.fuzz(tmp_path / "out").findings)


def test_a_report_of_elsewhere_waits_and_what_is_none_is_set_aside(tmp_path: Path) -> None:
    baked(tmp_path / "out", linear(16, 16), torch.randn(3, 16))
    process(tmp_path / "out", EAGER + "licence['valid'] = False; call(torch.randn(3, 16))")
    (path,) = folder().glob("*")
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "environment": {**good["environment"], "torch": "1.0"}}))
    (folder() / "b.json").write_text(json.dumps({**good, "failed": [{**good["failed"][0], "kernel": "nobody.knows"}]}))
    (folder() / "c.json").write_text("{}")
    with pytest.warns(UserWarning, match="'c.json' in .* is no report of a baked file") as caught:
        failures.take(store())
    assert len(caught) == 1
    assert not quarantined()
    assert sorted(p.name for p in folder().iterdir()) == sorted([path.name, "b.json", "c.json.damaged"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures.take(store())
    path.write_text(json.dumps(good))
    folder().chmod(0o777)
    with pytest.warns(UserWarning, match="are not read: everyone may write to"):
        failures.take(store())
    folder().chmod(0o700)
    failures.take(store())
    assert [v["kernel"] for v in quarantined().values()] == ["acme.linear"]
