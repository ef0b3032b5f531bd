"""Baked folders: run in processes that never see LayerZero, equal to the model, and refused where they do not fit."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paged_pool import Pool
from safetensors.torch import load_file, save_file
from test_offline import FAST, SEQ, Counting, ids, llama, unsigned
from torch import Tensor, nn

import lz_compiler as lz
from lz_compiler import backends, ops, torch_private
from lz_compiler.backends.base import Kernel, SelectionContext, by_name
from lz_compiler.backends.library import Library, LibraryBackend
from lz_compiler.deploy import baking, export, general, writing
from lz_compiler.deploy.baking import Loop, read_generated
from lz_compiler.errors import OptionError, PlanError
from lz_compiler.target import environment
from lz_compiler.timings import open_store
from lz_compiler.trust import canary_regions, verdicts
from lz_compiler.types import Candidate

BLOCKED = "import sys; [sys.modules.__setitem__(m, None) for m in ('lz_compiler', 'networkx', 'ortools')]; "


def baked_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`code` with the baked module as `p`, in a process in which neither LayerZero nor its solvers can be imported."""
    command = [sys.executable, "-c", f"{BLOCKED}import torch, _layerzero_plan as p\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def run_baked(folder: Path, inputs: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], str]:
    """Outputs of the baked file for each call, and what the process printed."""
    for i, tensors in enumerate(inputs):
        save_file(tensors, folder.parent / f"in{i}.safetensors")
    ran = baked_process(
        folder,
        "from safetensors.torch import load_file, save_file\n"
        f"for i in range({len(inputs)}):\n"
        f"    given = load_file(f'../in{{i}}.safetensors')\n"
        "    out = p.forward(**given)\n"
        "    out = out if isinstance(out, dict) else {'out': out}\n"
        "    save_file({k: v.contiguous() for k, v in out.items()}, f'../out{i}.safetensors')\n"
        "print('inductor', 'torch._inductor' in sys.modules)\n",
    )
    assert ran.returncode == 0, ran.stderr
    return [load_file(folder.parent / f"out{i}.safetensors") for i in range(len(inputs))], ran.stdout


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = llama()
    plan = lz.solve(model, (ids(20),), **SEQ, freeze=True, **FAST)
    folder = tmp_path_factory.mktemp("bake") / "out"
    assert lz.bake(plan, folder, model, (ids(20),)) == folder / "_layerzero_plan.py"
    return model, folder


def test_baked_equals_the_model_without_layerzero(baked: tuple[nn.Module, Path]) -> None:
    model, folder = baked
    inputs = [{"input_ids": ids(n)} for n in (1, 2, 7, 8, 9, 31, 32)]
    outputs, printed = run_baked(folder, inputs)
    for given, out in zip(inputs, outputs, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(out["out"], model(**given))
    assert "inductor False" in printed


def test_the_file_is_flat(baked: tuple[nn.Module, Path]) -> None:
    """Comparisons of sizes, then straight-line calls: no loop, no class, and nothing of LayerZero's."""
    _, folder = baked
    text = (folder / "_layerzero_plan.py").read_text()
    functions = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    assert {f"cell_{i}" for i in range(3)} <= set(functions)
    for name, function in functions.items():
        if name == "forward" or name.startswith("cell_"):
            kinds = {type(n) for n in ast.walk(function)}
            assert not kinds & {ast.For, ast.While, ast.ClassDef, ast.With, ast.Lambda}
            assert name == "forward" or not kinds & {ast.If, ast.Try}
    imported = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    assert not {m for m in imported if m.split(".")[0] in ("lz_compiler", "networkx", "ortools")}
    assert "onednn.linear" in (ast.get_docstring(functions["cell_2"]) or "")
    memory = (
        r"Weights: (\d+\.\d) MB in the file, (\d+\.\d) MB in memory; (\d+\.\d) MB more once a general cell runs\.\nPlanned with one format"
    )
    found = re.search(memory, text)
    assert found, text[:1500]
    stored, loaded, later = map(float, found.groups())
    assert loaded <= stored < loaded + later + 0.1  # what a general cell reads plain may be packed from the same bytes
    assert "torch.ops.mkldnn._linear_pointwise" in text
    strings = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str) and "#include" in n.value]
    kernels = {row for n in strings for row in range(n.lineno + 1, (n.end_lineno or 0) + 1)}  # C++, as Inductor writes it
    (blamed,) = (n for n in ast.parse(text).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PLANNED")
    kernels |= set(range(blamed.lineno, (blamed.end_lineno or 0) + 1))  # long expressions, which have no commas
    assert not [line for row, line in enumerate(text.splitlines(), 1) if len(line) > 140 and row not in kernels]


def test_what_does_not_fit_is_refused_or_converted(baked: tuple[nn.Module, Path]) -> None:
    _, folder = baked
    ran = baked_process(
        folder,
        "import warnings\n"
        "good = torch.arange(16)[None]\n"
        "def error(x):\n"
        "    try: p.forward(x)\n"
        "    except ValueError as e: print('error:', e)\n"
        "error(torch.zeros(1, 65, dtype=torch.int64)); error(torch.zeros(1, 0, dtype=torch.int64))\n"
        "error(torch.zeros(2, 4, dtype=torch.int64)); error(good[0])\n"
        "for x in (good.int(), (torch.arange(32) % 5)[None].clone()[:, ::2]):\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        same = torch.equal(p.forward(x), p.forward(x.long().contiguous())); p.forward(x)\n"
        "    print('same', same, 'warnings', len(caught), 'counted', list(p.adapted.values())[-1])\n"
        "p.LAYOUT_MODE = 'strict'; error(good.int()); error(torch.zeros(1, 33, dtype=torch.int64))\n",
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "error: seq is 65; this file was made for seq 1..32, and its general cells for seq 2..64"
    assert lines[1] == "error: seq is 0; this file was made for seq 1..32, and its general cells for seq 2..64"
    assert lines[2] == "error: input_ids has sizes (2, 4); this file was made for (1, -1) (-1 varies)"
    assert lines[3] == "error: input_ids has 1 dimensions; this file was made for 2"
    assert lines[4:6] == ["same True warnings 1 counted 2"] * 2
    assert lines[6].startswith("error: input_ids is torch.int32 on cpu")
    assert lines[7] == lines[0].replace("65", "33")


def test_sizes_beyond_the_buckets_run_a_general_cell(baked: tuple[nn.Module, Path]) -> None:
    """Plain ATen calls, right for every size that the model allows (its rotary table has 64 rows), with one warning."""
    model, folder = baked
    inputs = [{"input_ids": ids(n)} for n in (33, 34, 47, 63, 64)]
    outputs, _ = run_baked(folder, inputs)
    for given, out in zip(inputs, outputs, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(out["out"], model(**given))
    late = "print(p._late.cache_info().currsize > 0)"  # plain weights that only general cells read
    calls = "[p.forward(torch.arange(n)[None]) for n in {}]"
    ran = baked_process(folder, f"{calls.format((5, 32))}; {late}; {calls.format((33, 64, 33))}; {late}; print(p.adapted)")
    assert ran.stdout.split("\n")[:3] == ["False", "True", "{'seq beyond 32': 3}"]
    assert ran.stderr.count("UserWarning: LayerZero: seq beyond 32 ({'seq': 33}): such calls run a general cell") == 1
    (general,) = (n for n in ast.parse((folder / "_layerzero_plan.py").read_text()).body if getattr(n, "name", "") == "general_0")
    called = {ast.unparse(n.func) for n in ast.walk(general) if isinstance(n, ast.Call)}
    assert called
    assert all(name.startswith("torch.ops.aten.") for name in called - {"torch.device", "_late", "torch.autocast"}), called
    assert not {33, 64} & {n.value for n in ast.walk(general) if isinstance(n, ast.Constant) and type(n.value) is int} - {64}


class Pairs(nn.Module):
    """Two sizes that vary and a constant. `halved`: an even number of rows is read; that they are there is not proved for every size."""

    def __init__(self, halved: bool) -> None:
        super().__init__()
        self.halved = halved

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 2.0) -> Tensor:
        if self.halved:
            return x[: x.shape[0] // 2 * 2] @ y
        return x @ y if x.shape[0] > 40 else (x * scale).relu() @ y


@pytest.mark.slow
def test_general_cells_of_two_symbols(tmp_path: Path) -> None:
    """One for each choice of symbols that are 1, as far as the model's branches go; none where that is not beyond the buckets."""
    x, y = torch.randn(6, 16), torch.randn(16, 5)
    declared: Any = {"dynamic": {"x": {0: "rows"}, "y": {1: "columns"}}, "buckets": {"rows": [8], "columns": [12]}}
    plan = lz.solve(Pairs(False), (x, y), {"scale": 3.0}, **declared, **FAST)
    lz.bake(plan, tmp_path / "out", Pairs(False), (x, y), {"scale": 3.0})
    assert [c["ranges"] for c in json.loads((tmp_path / "out" / "manifest.json").read_text())["general"]] == [
        {"rows": [2, 40], "columns": [2, None]}, {"rows": [2, 40], "columns": [1, 1]}, {"rows": [1, 1], "columns": [2, None]},
    ]  # fmt: skip
    inputs = [{"x": torch.randn(r, 16), "y": torch.randn(16, c)} for r, c in ((9, 1), (1, 13), (9, 13), (40, 12), (8, 101))]
    outputs, _ = run_baked(tmp_path / "out", inputs)
    for given, out in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(out["out"], Pairs(False)(**given, scale=3.0))
    report = lz.fuzz(tmp_path / "out", model=Pairs(False), examples=60)
    assert report.ok, str(report)
    assert report.outside > 10
    with pytest.raises(PlanError, match=r"Pairs allows rows 2\.\.40 only"):
        general.program(Pairs(False), {"x": x, "y": y}, {"x": {0: "rows"}}, {"rows": [40]}, {"rows": (2, export.ENDLESS)})


def test_what_a_general_cell_asks_of_sizes(tmp_path: Path) -> None:
    """What export assumed, and what is not proved for all sizes, is asked in each call; where nothing asks it, the proof finds that."""
    x, y = torch.randn(6, 16), torch.randn(16, 5)
    plan = lz.solve(Pairs(True), (x, y), dynamic={"x": {0: "rows"}}, buckets={"rows": [8]}, **FAST)
    lz.bake(plan, tmp_path / "out", Pairs(True), (x, y))
    file = tmp_path / "out" / "_layerzero_plan.py"
    text, asked = file.read_text(), " and (2*(rows // 2) <= rows)"
    assert f"if rows >= 2{asked}:" in text
    report = lz.fuzz(tmp_path / "out", model=Pairs(True), examples=40)
    assert report.ok, str(report)
    file.write_text(text.replace(asked, ""))
    assert lz.fuzz(tmp_path / "out").findings == (
        ("constraint", "general_0 is for 2*(rows // 2) <= rows, which is not asked before it is called"),
    )
    file.write_text(text.replace(asked, " and rows % 2 == 0" + asked))
    (failure,) = lz.fuzz(tmp_path / "out", model=Pairs(True), examples=40, proof=False).failures
    assert failure.sizes == {"rows": 9}


@pytest.mark.slow
def test_the_self_test_and_the_loops_source(baked: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Every cell runs on made-up inputs; without its compiled loops the file compiles them from their source."""
    _, folder = baked
    ran = subprocess.run([sys.executable, "_layerzero_plan.py"], cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["cell 0", "cell 1", "cell 2"]
    assert "NaN" not in ran.stdout
    other = tmp_path / "copy"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "print(p.forward(torch.arange(8)[None]).double().sum().item())"
    runs = [baked_process(place, code) for place in (folder, other)]
    assert all(ran.returncode == 0 for ran in runs), runs[1].stderr
    assert runs[0].stdout == runs[1].stdout


def test_another_torch_or_machine_is_refused(baked: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = baked
    text = (folder / "_layerzero_plan.py").read_text()
    (tmp_path / "_layerzero_plan.py").write_text(text.replace(f"'torch': '{torch.__version__}'", "'torch': '2.0.0'"))
    ran = baked_process(tmp_path, "")
    assert "was baked for torch '2.0.0'; here it is" in ran.stderr
    (tmp_path / "_layerzero_plan.py").write_text(text)
    assert "weights.safetensors" in baked_process(tmp_path, "").stderr


class Structured(nn.Module):
    """Tied weights, a constant argument, two inputs, an output with structure, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16, bias=False)
        self.b = nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, image: Tensor, *, scale: float = 2.0) -> dict[str, Tensor]:
        return {"image": self.norm(self.conv(image)).relu(), "x": self.b(self.a(x).tanh()) * scale}


@pytest.mark.parametrize("freeze", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "freeze"])
def test_structures_constants_and_tied_weights(freeze: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Structured().eval()
    x, image = torch.randn(5, 16), torch.randn(2, 3, 8, 8)
    dynamic: Any = {"x": {0: "rows"}, "image": {2: "height"}}
    plan = lz.solve(model, (x, image), {"scale": 3.0}, dynamic=dynamic, buckets={"rows": [8], "height": [8]}, freeze=freeze, **FAST)
    lz.bake(plan, tmp_path / "out", model, (x, image), {"scale": 3.0})
    inputs = [{"x": torch.randn(r, 16), "image": torch.randn(2, 3, h, 8)} for r in (1, 2, 8) for h in (1, 2, 8, 9)]
    outputs, _ = run_baked(tmp_path / "out", inputs)
    for given, out in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(out, model(**given, scale=3.0))
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    assert sum(tuple(w.shape) == (16, 16) for w in stored.values()) == 1
    ran = baked_process(tmp_path / "out", "p.forward(torch.randn(2, 16), torch.randn(2, 3, 8, 8), scale=2.0)")
    assert "scale is 2.0; this file was made for 3.0" in ran.stderr


class Shared(nn.Module):
    """Weights in one another's memory, an expanded and an overlapping buffer, and a name with a quote in it."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(16, 8)
        self.head, self.flat = nn.Parameter(self.e.weight[:10]), nn.Parameter(self.e.weight.view(128))
        self.parts = nn.ModuleDict({"it's": nn.Linear(8, 8)})
        self.register_buffer("mask", torch.randn(1, 8).expand(4, 8))
        self.register_buffer("windows", torch.randn(11).unfold(0, 8, 1))

    def forward(self, i: Tensor) -> Tensor:
        return (self.parts["it's"](self.e(i)) * self.mask + self.windows).relu() @ self.head.t() + self.flat.sum()


def test_weights_that_share_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, i = Shared().eval(), torch.randint(16, (4,))
    lz.bake(lz.solve(model, (i,), **FAST), tmp_path / "out", model, (i,))
    module = lz.load_baked(tmp_path / "out")
    torch.testing.assert_close(module.forward(i), model(i))
    for wrong in (3, None, [1], i.numpy()):
        with pytest.raises(ValueError, match=r"i is .*; this file was made for a tensor"):
            module.forward(wrong)
    assert (module.w_mask.stride(), module.w_windows.stride()) == ((0, 1), (1, 1))
    assert module.w_mask.untyped_storage().nbytes() == 32


class Key(StrEnum):
    A = "a"


class Returning(nn.Module):
    """Outputs of another structure for one row, or with keys that cannot be written."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> dict[Any, Tensor]:
        return {self.key: x * 2} if x.shape[0] == 1 else {"b": x * 2, "c": x + 1}


@pytest.mark.parametrize(("model", "rows", "message"), [
    (Returning("a"), [4], r"for x0 2..4 the model returns {'b': out\[0\], 'c': out\[1\]}, else {'a': out\[0\]}"),
    (Returning(Key.A), 1, "a dict with the key <Key.A: 'a'>"),
    (nn.Identity(), 4, "returns views of its arguments"),
])  # fmt: skip
def test_models_that_have_no_file(model: nn.Module, rows: Any, message: str, tmp_path: Path) -> None:
    declared: Any = {"dynamic": {"x": {0: "x0"}}, "buckets": {"x0": rows}} if isinstance(rows, list) else {}
    x = torch.randn(rows if isinstance(rows, int) else 4, 8)
    plan = lz.solve(model, (x,), **declared, **FAST)
    with pytest.raises(PlanError, match=message):
        lz.bake(plan, tmp_path / "out", model, (x,))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch was built without MKL")
def test_weights_that_mkl_packs(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16)).eval(), torch.randn(24, 48)
    policy = {"lock": [{"op": "linear", "kernel": "mkl.linear_packed"}]}
    plan = lz.solve(model, (x,), freeze=True, policy=policy, race=False)
    lz.bake(plan, tmp_path / "out", model, (x,))
    assert (tmp_path / "out" / "_layerzero_plan.py").read_text().count("= torch.ops.mkl._mkl_linear.default(") == 2
    (out,), _ = run_baked(tmp_path / "out", [{"input": x}])
    with torch.no_grad():
        torch.testing.assert_close(out["out"], model(x))


def test_the_manifest_names_every_file(baked: tuple[nn.Module, Path]) -> None:
    import hashlib

    _, folder = baked
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert set(manifest["files"]) == found - {"manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_model_that_takes_and_holds_no_tensor(tmp_path: Path) -> None:
    class Ramp(nn.Module):
        def forward(self) -> Tensor:
            return torch.arange(4.0) * 2

    lz.bake(lz.solve(Ramp(), (), **FAST), tmp_path / "out", Ramp())
    (out,), _ = run_baked(tmp_path / "out", [{}])
    torch.testing.assert_close(out["out"], Ramp()())


def test_what_cannot_be_baked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting().eval()
    args: Any = (torch.randn(3, 16), {"sum": torch.zeros(16)})
    plan = lz.solve(model, args, **FAST)
    with pytest.raises(PlanError, match="'cache' is dict; baked files take tensors and constants"):
        lz.bake(plan, tmp_path / "a", model, args)
    linear = nn.Linear(16, 16)
    plan = lz.solve(linear, (torch.randn(2, 16),), **FAST)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(PlanError, match="not an empty folder"):
        lz.bake(plan, tmp_path / "full", linear, (torch.randn(2, 16),))
    with pytest.raises(PlanError, match="not the one that was planned"):
        lz.bake(plan, tmp_path / "b", nn.Sequential(nn.Linear(16, 16), nn.ReLU()), (torch.randn(2, 16),))
    monkeypatch.setenv("LAYERZERO_POLICY", "{deny: [{backend: onednn}]}")
    with pytest.raises(PlanError, match=r"option 'policy' is {'deny': .*, but the plan was solved with None. Solve again"):
        lz.bake(plan, tmp_path / "b", linear, (torch.randn(2, 16),))
    monkeypatch.delenv("LAYERZERO_POLICY")

    class Viewing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1]

    plan = lz.solve(Viewing(), (torch.randn(2, 16),), **FAST)
    with pytest.raises(PlanError, match="returns views"):
        lz.bake(plan, tmp_path / "b", Viewing(), (torch.randn(2, 16),))
    assert not [p for p in tmp_path.iterdir() if p.name != "full"], "nothing half-written stays"


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(16, 16).eval(), torch.randn(2, 16)
    plan = lz.solve(model, (x,), **FAST)
    monkeypatch.setattr(export, "export_program", None)  # it must not come so far
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "here")
    taken = [tmp_path / "file" / "out", Path("/proc/none/out"), tmp_path / ("n" * 300), tmp_path / "loop", ".", "", "../here"]
    for place in taken:
        with pytest.raises(PlanError, match=f"cannot bake to '{re.escape(str(place))}': .*Give "):
            lz.bake(plan, place, model, (x,))
    with pytest.raises(PlanError, match=r"cannot bake to .*embedded null byte.*Give "):
        lz.bake(plan, "a\0b", model, (x,))
    with pytest.raises(OptionError, match=r"bake takes a plan of lz.solve, or the path of its file; given: int"):
        lz.bake(3, "out", model, (x,))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"bake takes an nn.Module .*; given: str"):
        lz.bake(plan, "out", "model", (x,))  # type: ignore[arg-type]


def test_links_are_followed_and_a_folder_that_was_taken_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(16, 16).eval(), torch.randn(2, 16)
    plan = lz.solve(model, (x,), **FAST)
    plan.save(tmp_path / "plan.json")

    def write(self: Any) -> None:
        self.out.mkdir()
        (self.out / "_layerzero_plan.py").touch()
        if (tmp_path / "busy").exists():
            (tmp_path / "busy" / "x").touch()

    monkeypatch.setattr(baking._Writer, "write", write)
    (tmp_path / "real").mkdir()
    for link, place in (("full", "real"), ("dangling", "new")):
        (tmp_path / link).symlink_to(tmp_path / place)
        assert lz.bake(tmp_path / "plan.json", tmp_path / link, model, (x,)) == tmp_path / link / "_layerzero_plan.py"
        assert (tmp_path / place / "_layerzero_plan.py").is_file()
    (tmp_path / "busy").mkdir()
    with pytest.raises(PlanError, match=r"cannot bake to .*busy.*something was written there meanwhile. Give a new folder"):
        lz.bake(plan, tmp_path / "busy", model, (x,))


def test_a_folder_that_is_baked_again_runs_its_new_kernels_in_the_same_process(tmp_path: Path) -> None:
    """And names the new file's line where a cell raises."""

    class Applied(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    x, folder = torch.randn(4, 8), tmp_path / "out"
    for model in (Applied(torch.sigmoid), Applied(lambda x: (x.exp() + 3).log() * 2)):
        shutil.rmtree(folder, ignore_errors=True)
        lz.bake(lz.solve(model, (x,), **FAST), folder, model, (x,))
        module = lz.load_baked(folder)
        torch.testing.assert_close(module.forward(x), model(x))
        with pytest.raises(RuntimeError) as raised:
            module.cell_0(None)
        assert module._where(raised.value)[1].strip().startswith("loop_0(")


class Named(nn.Module):
    """Arguments called like what a file has: a weight, a buffer, a kernel, an operator, a size of another one; and like a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.l = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, w_weight: Tensor, buf0: Tensor, loop_0: Tensor, softmax: Tensor, w_weight_size_1: Tensor, out: Tensor) -> Tensor:
        y = (w_weight @ self.weight + loop_0).softmax(-1) + self.l(buf0).relu() * softmax
        return y[: y.shape[0] // 2 * 2] * w_weight_size_1 + out


def test_arguments_and_symbols_that_are_called_like_what_is_generated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, names = Named().eval(), ("w_weight", "buf0", "loop_0", "softmax", "w_weight_size_1", "out")

    def given(rows: int) -> dict[str, Tensor]:
        return {name: torch.randn(1 if i else rows, 8) for i, name in enumerate(names)}

    plan = lz.solve(model, (), given(4), dynamic={"w_weight": {0: "w_weight"}}, buckets={"w_weight": [4]}, **FAST)
    lz.bake(plan, tmp_path / "out", model, (), given(4))
    module = lz.load_baked(tmp_path / "out")
    text = (tmp_path / "out" / "_layerzero_plan.py").read_text()
    assert "general_0(" in text
    assert "_late('weight')" in text or "_weight('weight')" in text
    for rows in (1, 2, 3, 4, 5, 9):
        inputs = given(rows)
        torch.testing.assert_close(module.forward(**inputs), model(**inputs))
    assert not module.failed
    assert "if _size_w_weight >= 2 and (2*(_size_w_weight // 2) <= _size_w_weight):" in text
    assert lz.fuzz(tmp_path / "out").ok


@pytest.mark.parametrize("name", ["cell_0", "_adapt", "torch", "_size_x"])
def test_names_that_forward_itself_reads_are_refused(name: str, tmp_path: Path) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    plan = lz.solve(model, (x,), dynamic={"input": {0: name}}, buckets={name: [2]}, **FAST)
    with pytest.raises(PlanError, match=f"symbol '{name}' cannot be a name in the generated function"):
        lz.bake(plan, tmp_path / "out", model, (x,))


def test_training_mode_is_told(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout()), torch.randn(2, 8)
    with pytest.warns(UserWarning, match=r"Sequential is in training mode: .*Call model.eval\(\)") as caught:
        plan = lz.solve(model, (x,), **FAST)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="training mode"), pytest.raises(PlanError, match="not the one that was planned"):
        lz.bake(plan, tmp_path / "out", nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (x,))
    with warnings.catch_warnings(record=True) as caught_none:
        lz.solve(model.eval(), (x,), **FAST)
    assert not [w for w in caught_none if "training" in str(w.message)]


def test_a_conversion_warns_once_for_all_sizes(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    plan = lz.solve(model, (x,), dynamic={"input": {0: "rows"}}, buckets={"rows": [32]}, **FAST)
    lz.bake(plan, tmp_path / "out", model, (x,))
    ran = baked_process(
        tmp_path / "out",
        "import warnings; warnings.simplefilter('always')\n"
        "for n in (2, 3, 4, 5):\n"
        "    for x in (torch.randn(8, n).t(), torch.randn(n, 16)[:, ::2], torch.randn(n, 8).double()):\n"
        "        assert torch.equal(p.forward(x), p.forward(x.float().contiguous()))\n"
        "print(list(p.adapted.values()), list(p.adapted))\n",
    )
    assert ran.stdout.startswith("[4, 4, 4] ['input is torch.float32 on cpu, dense in the order (1, 0)', "), ran.stdout + ran.stderr
    assert ran.stderr.count("UserWarning: LayerZero") == 3
    assert "it is converted in every call, which writes 64 bytes for (2, 8)" in ran.stderr


class Configured(nn.Module):
    """Constants of every kind, each of which decides what is computed, and their values among the outputs."""

    def forward(self, x: Tensor, steps: int, mode: str, *, scale: float = 1.5, flip: bool = False, mask: Tensor | None = None) -> Any:
        y = (x * steps).relu() if mode == "relu" else x
        return {"y": y.flip(0) if flip else y, "scaled": y * scale, "steps": steps, "mask": mask}


def test_constants_of_every_kind(tmp_path: Path) -> None:
    """TorchInductor takes no text among a graph's inputs, and makes a whole number a symbol: they are in the graph, and no input of it."""
    model, x = Configured().eval(), torch.arange(8).view(4, 2)
    rows: dict[str, Any] = {"dynamic": {"x": {0: "n"}}, "buckets": {"n": [4]}}
    plan = lz.solve(model, (x, 3, "relu"), {"flip": True}, **rows, **FAST)
    run = lz.compile(model, plan=plan)
    lz.bake(plan, tmp_path / "out", model, (x, 3, "relu"), {"flip": True})
    baked = lz.load_baked(tmp_path / "out")
    for some in (x, x[:1], x.repeat(2, 1)):
        for call in (run, baked.forward):
            torch.testing.assert_close(call(some, 3, "relu", flip=True), model(some, 3, "relu", flip=True))
    for args, more in (
        ((3.0, "relu"), {}),
        ((3, "none"), {}),
        ((3, "relu"), {"flip": 1}),
        ((3, "relu"), {"scale": 1}),
        ((True, "relu"), {}),
    ):
        for call in (run, baked.forward):
            with pytest.raises(ValueError, match=r"(steps|mode|flip|scale) is .*(plan is|was made) for"):
                call(x, *args, **{"flip": True, **more})
    model = Configured().eval()
    with pytest.raises(PlanError, match="argument 'mode' is Key; baked files take tensors and constants"):
        lz.bake(lz.solve(model, (x, 3, Key.A), **FAST), tmp_path / "e", model, (x, 3, Key.A))


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "cast"])
def test_autocast_around_a_baked_file_changes_nothing(cast: bool, tmp_path: Path) -> None:
    """Plain ATen calls would follow it, compiled cells do not: dtypes would depend on sizes."""
    model, bf16 = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8)).eval(), torch.bfloat16
    rows: dict[str, Any] = {"dynamic": {"input": {0: "n"}}, "buckets": {"n": [4]}}
    with torch.autocast("cpu", bf16, enabled=cast):
        plan = lz.solve(model, (torch.randn(4, 8),), **rows, **FAST)
        lz.bake(plan, tmp_path / "out", model, (torch.randn(4, 8),))
    p = lz.load_baked(tmp_path / "out")
    for n in (1, 4, 6):
        x = torch.randn(n, 8)
        found = p.forward(x)
        with torch.autocast("cpu", bf16):
            assert torch.equal(p.forward(x), found)
            assert found.dtype is (bf16 if cast else torch.float32)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask, 0.0) + 1


def test_made_up_inputs_take_every_value_of_the_examples(tmp_path: Path) -> None:
    given = (torch.randn(8, 64), torch.ones(8, 64, dtype=torch.bool))
    lz.bake(lz.solve(Masked().eval(), given, **FAST), tmp_path / "out", Masked().eval(), given)
    made = lz.load_baked(tmp_path / "out")._examples(0)["mask"]
    assert made.dtype is torch.bool
    assert made.any()
    assert not made.all()


class Optional(nn.Module):
    """Parameters that were left at their defaults, before and after a tensor, and one that is taken by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: Tensor | None = None, *, scale: float = 1.0, **more: Any) -> Tensor:
        y = self.linear(x) * scale + (0 if shift is None else shift)
        return y if mask is None else y * mask


def test_what_was_left_at_its_default_stays_a_parameter(tmp_path: Path) -> None:
    """With the value that was compiled in: another one is an error, in the baked file and by the plan."""
    model, x, shift = Optional().eval(), torch.randn(4, 8), torch.randn(4, 8)
    plan = lz.solve(model, (x,), **FAST)
    assert plan.arguments == ("x", "mask", "shift", "scale")
    run = lz.compile(model, plan=plan)
    torch.testing.assert_close(run(x), model(x))
    for wrong in ({"scale": 2.0}, {"mask": x}):
        with pytest.raises(PlanError, match="the plan is for"):
            run(x, **wrong)
    lz.bake(plan, tmp_path / "a", model, (x,))
    lz.bake(lz.solve(model, (x,), {"shift": shift}, **FAST), tmp_path / "b", model, (x,), {"shift": shift})
    text = (tmp_path / "a" / "_layerzero_plan.py").read_text()
    assert "def forward(x, mask=None, shift=None, *, scale=1.0):" in text
    ran = baked_process(
        tmp_path / "a",
        "x = torch.randn(4, 8); p.forward(x); p.forward(x, None, scale=1.0)\n"
        "for more in ({'scale': 2.0}, {'mask': x}, {'shift': 1}):\n"
        "    try: p.forward(x, **more)\n"
        "    except ValueError as e: print(e)\n"
        "import importlib.util; spec = importlib.util.spec_from_file_location('b', '../b/_layerzero_plan.py')\n"
        "b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)\n"
        "print(torch.allclose(b.forward(x, None, x), b.forward(x, shift=x)))\n"
        "try: b.forward(x)\n"
        "except ValueError as e: print(e)\n",
    )
    assert ran.stdout.splitlines() == [
        "scale is 2.0; this file was made for 1.0", "mask is a tensor of (4, 8); this file was made for None",
        "shift is 1; this file was made for None", "True", "shift is None; this file was made for a tensor",
    ], ran.stderr  # fmt: skip


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_attention_over_a_paged_cache_is_written_out(layout: str, tmp_path: Path) -> None:
    class Paged(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            return torch.ops.lz.paged_attention(q * 2, k, v, table, lengths, 0.2, layout) + 1

    pool = Pool(2, 16, 4, layout, torch.float32)
    model, given = Paged().eval(), (torch.randn(len(pool.lengths), 4, 2, 16), *pool.tensors())
    names = ("q", "k", "v", "table", "lengths")
    lz.bake(lz.solve(model, given, **FAST), tmp_path / "out", model, given)
    text = (tmp_path / "out" / "_layerzero_plan.py").read_text()
    assert "def _paged_attention(q, k_cache, v_cache, block_table, seq_lens, scale=None, layout='NHD'):" in text
    assert "torch.ops.lz." not in text
    (out,), _ = run_baked(tmp_path / "out", [dict(zip(names, given, strict=True))])
    assert torch.equal(out["out"], model(*given))
    torch.testing.assert_close(out["out"].double(), pool.expected(given[0] * 2, 0.2) + 1, atol=1e-5, rtol=0)


NUMPY = Library("numpy", "numpy", "pip install numpy")
BY_NUMPY = 3  # what stands in the file as a number


def _scaled(y: Any, by: int) -> Tensor:
    return torch.from_numpy(y * by) / by


def _numpy_run(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """x w^T + bias."""
    aten = NUMPY.load().add  # not torch's
    return _scaled(aten(NUMPY.load("numpy.linalg").matmul(x.numpy(), w.numpy().T), bias.numpy()), BY_NUMPY)


class Numpy(LibraryBackend):
    name, devices, library = "numpy", ("cpu",), NUMPY
    kernels = by_name(
        Kernel("numpy.linear", lambda emit, t, p: emit.call(torch.ops.lz.numpy_linear.default, *(t[n] for n in ("x", "w", "bias"))))
    )

    def candidates(self, ctx: SelectionContext) -> Iterator[Candidate]:
        if ctx.region.op == "linear" and ctx.default and not ctx.params["transposed"] and "bias" in ctx.roles:
            yield ctx.candidate(self.kernels["numpy.linear"])


@pytest.fixture
def numpy_backend() -> Iterator[Numpy]:
    if "numpy_linear" not in ops.RUNS:
        ops.define(
            "numpy_linear(Tensor x, Tensor w, Tensor bias) -> Tensor",
            _numpy_run, lambda x, w, bias: x.new_empty((x.shape[0], w.shape[0])), torch.Tag.needs_exact_strides,
        )  # fmt: skip
    backends.register(Numpy())
    yield Numpy()
    del backends.all_backends()["numpy"]
    backends.owners.cache_clear()
    backends.kernel.cache_clear()


def test_the_kernel_of_an_optional_package_is_written_out_and_its_version_asked_for(tmp_path: Path, numpy_backend: Numpy) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).eval(), torch.randn(5, 16)
    plan = lz.solve(model, (x,), **{**FAST, "policy": {"prefer": [{"kernel": "numpy.linear", "factor": 0.001}]}})
    lz.bake(plan, tmp_path / "out", model, (x,))
    path = tmp_path / "out" / "_layerzero_plan.py"
    text = path.read_text()
    assert "= _numpy_linear(" in text
    assert "return _scaled(aten(importlib.import_module('numpy.linalg').matmul(x.numpy(), w.numpy().T), bias.numpy()), 3)" in text
    assert "@torch.autocast('cpu', enabled=False)\ndef cell_0(" in text  # what a package calls may follow it
    assert r"'called': '(?<![\\w.])_numpy_linear" in text
    (out,), _ = run_baked(tmp_path / "out", [{"input": x}])
    torch.testing.assert_close(out["out"], model(x))
    assert f"PACKAGES = {{'numpy': '{NUMPY.version()}'}}" in text
    path.write_text(text.replace(f"'numpy': '{NUMPY.version()}'", "'numpy': '0.9', 'nowhere': '1'"))
    said = baked_process(tmp_path / "out", "").stderr
    assert f"runs kernels of numpy 0.9; here it is {NUMPY.version()}. Install that one, or solve and bake again here." in said


def test_what_a_library_would_build_for_minutes_waits_for_the_canary_or_for_being_named(
    tmp_path: Path, numpy_backend: Numpy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).eval(), torch.randn(5, 16)

    def answers(**options: Any) -> set[str]:
        """What became of numpy's kernel."""
        plan = lz.solve(model, (x,), **{**FAST, "cache_dir": str(tmp_path), **options})
        choices = [c for cell in plan.cells for p in cell.plans for c in p.choices]
        planned = {"planned" for c in choices if c.candidate.kernel == "numpy.linear"}
        return planned | {r.code for c in choices for r in c.rejections if r.kernel == "numpy.linear"}

    assert answers() == set()  # a candidate that loses
    monkeypatch.setattr(Numpy, "library", replace(NUMPY, builds=True))
    assert answers() == {"not_built"}
    assert answers(policy={"avoid": [{"kernel": "numpy.linear"}], "prefer": [{"op": "linear"}]}) == {"not_built"}
    assert answers(backends=["numpy"]) == {"planned"}
    assert answers(policy={"lock": [{"backend": "numpy"}]}) == {"planned"}
    capabilities = {
        f"numpy.linear|linear|float32|contiguous|{canary_regions.feature_of(ctx)}": {"status": "passed"}
        for _, ctx in canary_regions.contexts("linear", "float32", "cpu")
    }
    verdicts.remember(open_store(str(tmp_path)), numpy_backend, environment("cpu"), {"capabilities": capabilities})
    assert answers() == set()


def test_a_process_that_runs_a_baked_folder_loads_no_planner(baked: tuple[nn.Module, Path]) -> None:
    _, folder = baked
    code = (
        f"import sys, lz_compiler as lz; p = lz.warmup({str(folder)!r}, calls=1); lz.load_baked({str(folder)!r})\n"
        "print(sorted(m for m in sys.modules if m.startswith('lz_compiler')))\n"
        "print([m for m in ('ortools', 'highspy', 'sympy', 'networkx', 'torch._inductor', 'torch._dynamo') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    ours, others = ran.stdout.splitlines()
    assert others == "[]"
    assert not re.search("planner|solvers|backend|deploy.offline", ours), ours


def test_long_lines_are_broken_after_commas() -> None:
    line = "    x = f(" + ", ".join(f"g({i}, 'a, ({i}')" for i in range(40)) + ")  # once"
    lines = writing.wrapped(line)
    assert len(lines) > 3
    assert all(len(part) <= writing.WIDTH for part in lines)
    assert ast.dump(ast.parse("if 1:\n" + "\n".join(lines))) == ast.dump(ast.parse("if 1:\n" + line))
    assert writing.wrapped(line[:100]) == [line[:100]]
    open_line = writing.wrapped(f"{line[:-9]}, r'" + "''")  # a text begins
    assert len(open_line) > 3
    assert open_line[-1].endswith("r'" + "''")


def test_nothing_that_stands_in_a_plan_is_executed(tmp_path: Path) -> None:
    """Words of a hostile plan end in docstrings of the file at most, and names that become code are checked."""
    model, x = nn.Linear(16, 16).eval(), torch.randn(2, 16)
    plan = lz.solve(model, (x,), dynamic={"input": {0: "rows"}}, buckets={"rows": [2]}, **FAST)
    plan.save(tmp_path / "p.json")
    text = json.dumps(unsigned(tmp_path / "p.json"))
    evil = '\\"\\"\\"\\nraise SystemExit(7)\\n\\"\\"\\"'
    for place in ('"model": "Linear', '"source": "roofline', '"threads": "'):
        assert place in text
        (tmp_path / "q.json").write_text(text.replace(place, place + evil))
        folder = tmp_path / place.split('"')[1]
        lz.bake(lz.load_plan(tmp_path / "q.json"), folder, model, (x,))
        assert baked_process(folder, "print(p.forward(torch.zeros(2, 16)).shape)").returncode == 0
    for before, after, message in (
        ('"dtype": "float32"', '"dtype": "float32 or exit()"', "damaged"), ('"rows"', '"rows or exit()"', "cannot be a name"),
    ):  # fmt: skip
        (tmp_path / "q.json").write_text(text.replace(before, after))
        with pytest.raises(PlanError, match=message):
            lz.bake(lz.load_plan(tmp_path / "q.json"), tmp_path / "evil", model, (x,))


def test_generated_code_of_another_kind() -> None:
    with pytest.raises(PlanError, match=r"async_compile\.cutlass in the generated code"):
        read_generated("k = async_compile.cutlass('k', '''source''')\ndef call(args):\n    a, = args\n    return (a,)\n")


class Cached(nn.Module):
    """A key-value cache as buffers: each call appends its rows, and reads all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 64, 32))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device) + self.position
        y = self.project(x)
        self.keys.index_copy_(1, places, y)
        self.values.index_copy_(1, places, y.sin())
        self.position.add_(x.shape[1])
        seen = torch.arange(64, device=x.device) < self.position
        return (x @ self.keys.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ self.values


@pytest.mark.slow
def test_a_cache_in_buffers_is_the_files_own_state(tmp_path: Path) -> None:
    """Cells share it, equal buffers stay apart, warming up leaves it alone, and a written argument is never converted."""
    model = Cached().eval()
    plan = lz.solve(model, (torch.randn(1, 4, 32),), dynamic={"x": {1: "n"}}, buckets={"n": [1, 8]}, freeze=True, **FAST)
    model.position.zero_(), model.keys.zero_(), model.values.zero_()
    lz.bake(plan, tmp_path / "out", model, (torch.randn(1, 4, 32),))
    calls = [{"x": torch.randn(1, n, 32)} for n in (5, 1, 1, 8, 1)]
    ran = baked_process(tmp_path / "out", "print(p.STATE, list(p.warmup()), int(p.w_position), float(p.w_keys.norm()))")
    assert ran.stdout.strip() == "('w_keys', 'w_position', 'w_values') [1, 2] 0 0.0", ran.stderr
    outputs, _ = run_baked(tmp_path / "out", calls)
    with torch.no_grad():
        for given, out in zip(calls, outputs, strict=True):
            torch.testing.assert_close(out["out"], model(**given))


def test_warmup(baked: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Afterwards nothing is compiled, for a folder and for a planned model, and the first call is like any other."""
    model, folder = baked
    module = lz.warmup(folder)
    assert isinstance(module, ModuleType)
    x = ids(5)
    assert torch.allclose(module.forward(x), model(x), atol=1e-5)
    with pytest.raises(PlanError, match="there is no"):
        lz.warmup(tmp_path)
    counting = Cached().eval()
    plan = lz.solve(counting, (torch.randn(1, 4, 32),), dynamic={"x": {1: "n"}}, buckets={"n": [1, 8]}, **FAST)
    planned = lz.compile(counting, plan=plan)
    counting.position.fill_(3)
    assert lz.warmup(planned, (torch.randn(1, 4, 32),)) is planned
    assert counting.position == 3
    assert len(planned._cells) == 2


def test_triton_kernels_are_read_from_generated_code() -> None:
    source = """
k = async_compile.triton('kernel', '''text''', device_str='cuda')
class Runner:
    def call(self, args):
        a, b = args
        args.clear()
        assert_size_stride(a, (4,), (1,))
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            # comment
            stream0 = get_raw_stream(0)
            k.run(a, b, 4, stream=stream0)
            del a
            stream0 = get_raw_stream(0)
            k.run(b, b, 4, stream=stream0)
            del b
        return (b, )
"""
    body = read_generated(source)
    assert body.arguments == ("a", "b")
    assert [line.strip() for line in body.lines].count("stream0 = get_raw_stream(0)") == 1
    assert body.loops["k"].language == "triton"
    assert body.loops["k"].detail == ("kernel",)
    compile("\n".join(("def f(a, b):", *(f"    {line}" for line in body.lines))), "f", "exec")


def test_triton_kernels_are_stored_compiled_with_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for a GPU that is not here: the cubin, and a launch with the grid and the arguments that it takes."""
    from torch._inductor.runtime import triton_helpers

    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    source = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties

@triton_heuristics.pointwise(
    size_hints={'x': 1024}, filename=__file__, min_elem_per_thread=0,
    triton_meta={'signature': {'x': '*fp32', 'y': '*fp32', 'scale': 'fp32', 'xnumel': 'i32', 'XBLOCK': 'constexpr'},
        'device': DeviceProperties(type='cuda', index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048, warp_size=32),
        'constants': {}, 'configs': [{(0,): [['tt.divisibility', 16]], (1,): [['tt.divisibility', 16]]}]},
    inductor_meta={'grid_type': 'Grid1D', 'kernel_name': 'scaled', 'mutated_arg_names': [], 'autotune_pointwise': AUTOTUNE,
        'autotune_local_cache': False, 'autotune_remote_cache': False, 'max_autotune': False, 'max_autotune_pointwise': False,
        'tiling_scores': {}},
)
@triton.jit
def scaled(x, y, scale, xnumel, XBLOCK: tl.constexpr):
    at = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)
    tl.store(y + at, tl.load(x + at, at < xnumel) * scale, at < xnumel)
"""
    assert torch_private.compiled_triton("scaled", source.replace("AUTOTUNE", "True")) is None  # which configuration is unknown
    source = source.replace("AUTOTUNE", "False")
    compiled = torch_private.compiled_triton("scaled", source)
    assert compiled is not None
    assert compiled.cubin.startswith(b"\x7fELF")
    text = Loop("triton", ("scaled",), source).text("scaled_3", compiled)
    launched: list[Any] = []
    space = {"launch": lambda *given: launched.append(given), "_cubin": lambda *told: lambda run: (told, run)}
    exec(text, space)
    told, run = space["scaled_3"]
    assert told == ("scaled", compiled.shared, source)
    run("function", "x", "y", 0.5, 1000, stream=7)
    (block,) = (int(n) for n in re.findall(r"// -\((\d+)\)", text))
    assert launched == [("function", -(-1000 // block), 1, 1, compiled.warps, 0, "OOfiOO", ("x", "y", 0.5, 1000, None, None), 7)]
