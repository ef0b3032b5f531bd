"""`lz.fuzz`: right files are proved and pass, planted faults are found from the text, and by trying where a call can show them."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_offline import ENDS, FAST
from torch import Tensor, nn
from typer.testing import CliRunner

import lz_compiler as lz
from lz_compiler.cli import app
from lz_compiler.deploy import export
from lz_compiler.deploy.baking import FILE
from lz_compiler.deploy.forward import Forward
from lz_compiler.deploy.fuzzing import Failure, _Trial
from lz_compiler.deploy.general import boxes
from lz_compiler.deploy.offline import CellPlan, ModelPlan
from lz_compiler.deploy.proof import prove
from lz_compiler.errors import OptionError, PlanError


class Rows(nn.Module):
    """Two products, with a softmax down the rows: every row's result depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(0).tanh())


def make() -> tuple[nn.Module, tuple[Tensor], None]:
    return Rows().eval(), (torch.randn(8, 16),), None


def bake(model: nn.Module, folder: Path, *args: Tensor, **declared: Any) -> Path:
    plan = lz.solve(model, args, **declared, **FAST)
    lz.bake(plan, folder, model, args)
    return folder


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, args, _ = make()
    declared: dict[str, Any] = {"dynamic": {"x": {0: "rows"}}, "buckets": {"rows": [4, 32]}, "freeze": True, "one_format": False}
    return bake(model, tmp_path_factory.mktemp("fuzz") / "out", *args, **declared)


def edited(baked: Path, to: Path, *changes: tuple[str, str]) -> Path:
    shutil.copytree(baked, to)
    text = (to / FILE).read_text()
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    (to / FILE).write_text(text)
    return to


def test_a_good_file_is_proved_and_passes(baked: Path) -> None:
    ran = CliRunner().invoke(app, ["fuzz", str(baked), "--model", "test_fuzz:make", "--examples", "100", "--json"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert (report["ok"], report["findings"], report["failures"]) == (True, [], [])
    assert (report["cells"], report["tried"], report["reference"]) == (3, 100, "the model in float64")
    assert 5 < report["outside"] < 60
    assert 0 < report["worst"] < 1e-5
    ran = CliRunner().invoke(app, ["fuzz", str(baked)])
    assert (ran.exit_code, ran.stdout.splitlines()) == (0, [f"{baked}: proved: {report['paths']} paths, 3 cells"])


GAP = """
        elif rows > 6:
            out = cell_2(x)
        else:
            raise ValueError('rows')"""
# A fault: a change of the text, the proof's code and words, and the smallest sizes that fail when tried (None: no call shows it).
FAULTS: dict[str, tuple[tuple[str, str], str, str, dict[str, int] | None]] = {
    "gap": (("\n        else:\n            out = cell_2(x)", GAP), "gap", "rows 5..6: no cell, an error", {"rows": 5}),
    "constraint": (("out = cell_1(x)", "out = cell_0(x)"), "constraint", "called for rows 1..4, compiled for rows 1..1", {"rows": 2}),
    "edge": (("if rows <= 1:", "if rows <= 2:"), "edge", "called for rows 1..2, compiled for rows 1..1", {"rows": 2}),
    "beyond": (("if not 1 <= rows <= 32:", "if not 0 < rows < 34:"), "edge", "outside of the declared rows 1..32", None),
    "none": (("if not 1 <= rows <= 32:", "if not 0 <= rows <= 32:"), "edge", "outside of the declared rows 1..32", None),
    "general gap": (("if rows >= 2:", "if rows >= 34:"), "gap", "rows 33..33: no cell, an error", {"rows": 33}),
    "general edge": (("if not 1 <= rows <= 32:", "if not 1 <= rows <= 31:"), "overlap", "rows 32..32: general_0, but a cell was", None),
    "slow edge": (("if rows <= 4:", "if rows < 4:"), "edge", "called for rows 4..32, compiled for rows 5..32", None),
    "overlap": (("out = cell_2(x)", "out = cell_2(x)\n            out = cell_1(x)"), "overlap", "cell_2 and cell_1", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str, baked: Path, tmp_path: Path) -> None:
    change, code, words, smallest = FAULTS[name]
    folder = edited(baked, tmp_path / "out", change)
    report = lz.fuzz(folder)
    assert any(c == code and words in detail for c, detail in report.findings), str(report)
    assert not report.ok
    if smallest is not None:
        tried = lz.fuzz(folder, model=Rows().eval(), examples=50, proof=False)
        assert ([dict(f.sizes) for f in tried.failures], tried.findings, tried.ok) == ([smallest], (), False), str(tried)


def test_a_cells_own_code_is_evidence(baked: Path, tmp_path: Path) -> None:
    """Faults that are found although the manifest allows them."""
    folder = edited(baked, tmp_path / "a", ("out = cell_1(x)", "out = cell_0(x)"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cells"][0]["ranges"]["rows"] = [1, 4]
    findings, _ = prove((folder / FILE).read_text(), manifest)
    assert any("cell_0: it never reads the size of rows" in detail for _, detail in findings), findings
    text = (baked / FILE).read_text()
    manifest = json.loads((baked / "manifest.json").read_text())
    assert prove(text, manifest)[0] == []
    weight = text.split("def cell_2")[1].split("_linear_pointwise.default(")[1].split(", ")[1]
    operator = f"{weight} = _packed(torch.ops.mkldnn._reorder_linear_weight, 'a.weight'"
    assert f"{operator})" in text, "packed for any number of rows"
    findings, _ = prove(text.replace(f"{operator})", f"{operator}, 8)"), manifest)
    assert ("constraint", f"cell_2: {weight} is packed for 8 rows, but is called with others for rows 5..32") in findings
    start, end = text.index("def cell_2(x):"), text.index("def forward(")

    def details(code: str) -> list[str]:
        """What is found with other code in the last cell, which reads n."""
        cell = f"def cell_2(x):\n    size = x.size()\n    n = size[0]\n{code}\n"
        return [detail for _, detail in prove(text[:start] + cell + text[end:], manifest)[0]]

    for rows, right in (("n", True), ("n + 1", False), ("n - n // 2 + max(n, 16) // 2", True), ("(n + 32) // 2", True), ("2 * n", False)):
        found = details(
            f"    b = empty_strided_cpu((32, 16), (16, 1), torch.float32)\n    v = reinterpret_tensor(b, ({rows}, 16), (16, 1), 0)"
        )
        assert (found == []) is right, (rows, found)
    assert details("    if not (n % 2 == 0):\n        raise RuntimeError()") == [
        "cell_2: its assertion n % 2 == 0 is not proved for rows 5..32"
    ]


class Pooled(nn.Module):
    """torch.export takes its example's size for the only one, whatever was declared."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(x.t()[None], 4)


class Guarded(nn.Module):
    """One row against all: Inductor chooses its loops by comparing the sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x + 1


def test_a_range_that_was_narrowed_is_refused() -> None:
    """What was compiled for a part of the sizes must not run for all of them."""
    with pytest.raises(PlanError, match=r"can be compiled for n 64\.\.64 only, not for 2\.\.64"):
        lz.solve(Pooled().eval(), (torch.randn(9, 16),), dynamic={"x": {0: "n"}}, buckets={"n": [64]}, **FAST)
    with pytest.raises(PlanError, match=r"Mod\(|cannot trace"):
        lz.solve(Guarded().eval(), (torch.randn(9, 16),), dynamic={"x": {0: "n"}}, buckets={"n": [64]}, **FAST)


class Attention(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q * 0.5, q)


def test_a_kernel_for_a_part_of_its_cell_is_not_planned(baked: Path) -> None:
    """Unfused attention is declared for 16 keys and more: the largest size allows it, the smaller ones of its cell do not."""
    plan = lz.solve(Attention(), (torch.randn(1, 2, 9, 8),), dynamic={"q": {2: "keys"}}, buckets={"keys": [64]}, **FAST)
    (choice,) = (c for c in plan.cells[1].plans[0].choices if c.candidate.region.op == "attention")
    assert choice.candidate.kernel != "aten.sdpa_math"
    told = {r.kernel: r.detail for r in choice.rejections if r.code == "dynamic_shape"}
    assert "refuses it for" in told["aten.sdpa_math"]
    manifest = json.loads((baked / "manifest.json").read_text())
    manifest["cells"][2]["limits"] = [{"kernel": "aten.sdpa_math", "symbol": "rows", "low": 16, "high": 64}]
    findings, _ = prove((baked / FILE).read_text(), manifest)
    assert findings == [("constraint", "cell_2: aten.sdpa_math is called for rows 5..32, but holds for rows 16..64")]


@pytest.mark.slow
def test_a_crash_is_a_failure_and_other_weights_are_refused(baked: Path, tmp_path: Path) -> None:
    crash = "    if rows == 7:\n        os.kill(os.getpid(), 11)\n    if not 1 <= rows <= 32:"
    folder = edited(baked, tmp_path / "out", ("    if not 1 <= rows <= 32:", crash))
    (failure,) = lz.fuzz(folder, model=Rows().eval(), examples=40, proof=False).failures
    assert failure.sizes == {"rows": 7}
    assert "its process ended: exit -11" in failure.why
    other = Rows().eval()
    nn.init.zeros_(other.b.bias)
    with pytest.raises(PlanError, match=r"'b.bias' is not the folder's"):
        lz.fuzz(baked, model=other)


def test_other_models_and_other_folders_are_refused(baked: Path, tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Rows().a

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.raises(PlanError, match=r"Other has no 'b.\w+', the folder has. Give the model that was baked"):
        lz.fuzz(baked, model=Other())
    with pytest.raises(PlanError, match=r"the arguments do not fit Linear.forward"):
        lz.fuzz(baked, model=nn.Linear(16, 16))
    with pytest.raises(OptionError, match=r"fuzz takes the nn.Module that was baked; given: int"):
        lz.fuzz(baked, model=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"there is no _layerzero_plan.py in '.*nowhere'. Give a folder that lz.bake wrote"):
        lz.fuzz(tmp_path / "nowhere")


class Extreme(nn.Module):
    def forward(self, x: Tensor, fill: float = math.nan, top: float = math.inf, low: float = -math.inf) -> Tensor:
        return x.clamp(low, top).masked_fill(x > 0, fill)


def test_constants_that_are_no_literals_and_a_process_that_says_much(tmp_path: Path) -> None:
    model, x = Extreme(), torch.randn(4, 8)
    bake(model, tmp_path / "out", x)
    report = lz.fuzz(tmp_path / "out", model=model, examples=3)
    assert report.ok, str(report)
    with pytest.raises(ValueError, match=r"fill is 1.0; this file was made for nan"):
        lz.load_baked(tmp_path / "out").forward(x, fill=1.0)
    file = tmp_path / "out" / FILE
    file.write_text(file.read_text().replace("    out = cell_0(", "    sys.stderr.write('.' * 200_000)\n        out = cell_0("))
    assert lz.fuzz(tmp_path / "out", model=model, examples=3, proof=False).ok
    assert str(dataclasses.replace(report, failures=(Failure({}, "why"),))).endswith("\n  the given shapes: why")


class Gathering(nn.Module):
    """A constant made in a submodule, complex outputs, indices that smaller sizes do not allow, and integers below 0."""

    class Weighted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0, 4.0])

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Weighted()

    def forward(self, x: Tensor, places: Tensor, ignored: Tensor) -> Tensor:
        return torch.fft.fft(self.inner(x))[places] + ignored


def test_what_the_model_itself_refuses_is_no_failure(tmp_path: Path) -> None:
    model, example = Gathering().eval(), (torch.randn(8, 4), torch.arange(8), torch.full((4,), -100))
    plan = lz.solve(model, example, dynamic={"x": {0: "n"}, "places": {0: "n"}}, buckets={"n": [8]}, **FAST)
    lz.bake(plan, tmp_path / "out", model, example)
    report = lz.fuzz(tmp_path / "out", model=model, examples=40)
    assert report.ok, str(report)
    assert report.outside < report.tried < 40
    assert 0 < report.worst < 1e-6


@pytest.mark.parametrize(("found", "eager", "right"), [
    ([1.0, 1.0], [math.inf, 1.0], False), ([-math.inf, 1.0], [math.inf, 1.0], False), ([math.inf, 1.0], [math.inf, 1.0], True),
    ([math.nan, 1.0], [math.nan, 1.0], True), ([math.nan, 1.0], [math.inf, 1.0], False), ([1.0, math.inf], [1.0, 1.0], False),
])  # fmt: skip
def test_infinities_are_compared_with_their_sign(found: list[float], eager: list[float], right: bool) -> None:
    trial = SimpleNamespace(terms=1, worst=0.0, budget=0.0)
    model = torch.tensor(eager)
    assert (_Trial._differs(trial, torch.tensor(found), model, model.double()) == "") is right  # type: ignore[arg-type]


def test_the_command_fails_on_a_fault(baked: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["fuzz", str(edited(baked, tmp_path / "out", ("if rows <= 1:", "if rows <= 2:")))])
    assert ran.exit_code == 1
    assert "edge: cell_0 (" in ran.stdout


# --- the tree that baking generates -------------------------------------------------------------------------------------------


def generated(buckets: dict[str, list[int]], at_least: dict[str, int], limit: int = 0) -> tuple[str, dict[str, Any]]:
    """`forward` for these buckets, from these lowest sizes on, with empty cells, and its manifest: two inputs, with every symbol, and the
    last one three times.

    With a limit, there are general cells, for sizes of the first symbol up to it.
    """
    symbols = list(buckets)
    example = {"x": torch.zeros([2] * len(symbols) + [2, 5]), "y": torch.zeros(3, 2)}
    dynamic = {"x": dict(enumerate([*symbols, symbols[-1]])), "y": {1: symbols[-1]}}
    cells = export.cells(buckets, at_least)
    plan = ModelPlan(
        "Model", {"device": "cpu"}, {"cudagraphs": False, "mode": "default", "layout_mode": "strict"}, dynamic,
        {s: tuple(e) for s, e in buckets.items()}, tuple(example),
        tuple(export.Argument.of(v, dynamic[n]) for n, v in example.items()), (),
        tuple(CellPlan(ranges, "", "layerzero", {}, None, ()) for ranges in cells),
    )  # fmt: skip
    limited = [{s: (low, min(high, limit) if s == symbols[0] else high) for s, (low, high) in b.items()} for b in boxes(plan.lowest)]
    beyond = [(ranges, ()) for ranges in limited] if limit else []
    forward = Forward(plan, nn.Identity(), example, dict(zip(symbols, symbols, strict=True)), beyond, "out")
    manifest = {
        "inputs": {"x": [*symbols, symbols[-1], 5], "y": [3, symbols[-1]]}, "buckets": buckets,
        "at_least": plan.lowest,
        "cells": [{"ranges": {s: list(r) for s, r in ranges.items()}, "assumed": [], "limits": [], "kernels": []} for ranges in cells],
        "general": [{"ranges": {s: [low, None if high == export.ENDLESS else high] for s, (low, high) in ranges.items()}, "assumed": [],
                     "limits": [], "kernels": []} for ranges, _ in beyond],
    }  # fmt: skip
    return f"def forward(x, y):\n{forward.checks()}\n{forward.dispatch()}\n", manifest


BUCKETS = st.dictionaries(st.sampled_from("abc"), ENDS, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.sampled_from([0, 100]), st.data())
def test_generated_trees_are_proved_and_no_bound_may_change(buckets: dict[str, list[int]], limit: int, data: st.DataObject) -> None:
    """Every tree that baking writes is right, with and without general cells; with any number in its comparisons one more or one less
    it is not."""
    lowest = {s: data.draw(st.just(1) | st.integers(1, ends[0])) for s, ends in buckets.items()}
    source, manifest = generated(buckets, lowest, limit)
    assert prove(source, manifest)[0] == []
    assert taken(source, *lowest.values()) == "['cell_0']"
    assert taken(source, *lowest.values(), more=1) == "error", "two dimensions of one symbol must be equal"
    for s in lowest:
        assert taken(source, *(lowest | {s: lowest[s] - 1}).values()) == "error"
    assert taken(source, *([100] * len(buckets))) == ("['general_0']" if limit else "error")
    tree = ast.parse(source)
    compared = [n for n in ast.walk(tree) if isinstance(n, ast.Compare) and "dim()" not in ast.unparse(n)]
    bounds = [c for n in compared for c in ast.walk(n) if isinstance(c, ast.Constant) and type(c.value) is int]
    bound = data.draw(st.sampled_from(bounds))
    bound.value += data.draw(st.sampled_from([-1, 1]))
    changed = ast.unparse(tree)
    if not prove(changed, manifest)[0]:  # then it may only be a test of sizes that never come there
        points = [
            sorted({0, 1, 2, 99, 100, 101, 102, *(e + d for e in (lowest[s], *ends) for d in (-1, 0, 1, 2))}) for s, ends in buckets.items()
        ]
        assert limit
        assert all(taken(changed, *sizes) == taken(source, *sizes) for sizes in itertools.product(*points))


def taken(source: str, *sizes: int, more: int = 0) -> str:
    """Which cell `forward` calls for inputs of these sizes (the last symbol's second one that much larger), or that it raises."""
    cells = {name: (lambda x, y, name=name: [name]) for name in set(re.findall(r"\b(?:cell|general)_\d+", source))}
    words = dict.fromkeys(("_nowhere", "_outside", "_sizes", "_beyond"), lambda *args, **kwargs: "")
    space: dict[str, Any] = {"torch": torch, "_adapt": lambda name, x, *_: x, **words, **cells}
    exec(re.sub(r"return\s*$", "return out", source, flags=re.M), space)
    try:
        return str(space["forward"](torch.empty(*sizes, sizes[-1] + more, 5, device="meta"), torch.empty(3, sizes[-1], device="meta")))
    except ValueError:
        return "error"


def test_a_finding_names_the_kernels_that_compute() -> None:
    cell = {"ranges": {"n": [1, 1]}, "assumed": [], "limits": [], "kernels": ["aten.call", "aten.mm", "aten.view", "inductor.loop"]}
    source = "def forward(x):\n    n = x.shape[0]\n    if 1 <= n <= 3:\n        return cell_0(x)\n    raise ValueError(n)"
    findings, _ = prove(source, {"inputs": {"x": ["n"]}, "buckets": {"n": [3]}, "cells": [cell]})
    assert ("constraint", "cell_0 (aten.mm) is called for n 1..3, compiled for n 1..1") in findings


@pytest.mark.parametrize("tree", [
    "    if n == 1:\n        return cell_0(x)\n    elif n in (2, 3):\n        return cell_1(x)\n    raise ValueError(n)",
    "    if n <= 0 or 3 < n:\n        raise ValueError(n)\n    return cell_0(x) if not n > 1 else cell_1(x)",
    "    if n in range(2, 4):\n        return cell_1(x)\n    if 2 > x.size(0) > 0:\n        return cell_0(x)\n    raise ValueError(n)",
])  # fmt: skip
def test_other_ways_to_compare(tree: str) -> None:
    cells = [{"ranges": {"n": r}, "assumed": [], "limits": [], "kernels": []} for r in ([1, 1], [2, 3])]
    manifest = {"inputs": {"x": ["n"]}, "buckets": {"n": [3]}, "cells": cells}

    def prove_tree(text: str) -> list[tuple[str, str]]:
        return prove(f"def forward(x):\n    n = x.shape[0]\n{text}", manifest)[0]

    assert prove_tree(tree) == []
    assert prove_tree(tree.replace("3", "4").replace("range(2, 4)", "range(2, 5)"))
    assert ("form", "While in line 3 of forward cannot be followed") in prove_tree("    while n:\n        n -= 1\n    return cell_0(x)")
