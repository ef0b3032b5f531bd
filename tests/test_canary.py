"""Capabilities as data, and the canary that tries them: a third-party library, installed through its entry point, that lies and
crashes in every way, costs one row for each fault, and no plan uses what failed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import plant
from test_kernels import CASES, Case, rand, trace
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import lz_compiler as lz
from lz_compiler import backends, cli
from lz_compiler.backend import RECORDS
from lz_compiler.errors import CapabilityError, OptionError, PlanError
from lz_compiler.measure import Measurement
from lz_compiler.target import environment
from lz_compiler.timings import TimingStore, open_store
from lz_compiler.trust import canary_regions, capabilities, first_use
from lz_compiler.trust.canary import BackendRun, CanaryReport, Verdict, canary
from lz_compiler.trust.canary_worker import regions
from lz_compiler.trust.descriptors import Descriptor, read
from lz_compiler.trust.first_use import CHECKED
from lz_compiler.trust.verdicts import Trust, last_run, remember
from lz_compiler.types import Candidate, Rejection

FOLDER = Path(backends.__file__).parent
OWN = sorted(FOLDER.glob("*.json"))

MODULE = """
import ctypes, os, time
import torch
from lz_compiler.backends.base import Kernel
from lz_compiler.trust.capabilities import fitting

aten = torch.ops.aten
library = torch.library.Library("faulty", "FRAGMENT")
library.define("turned(Tensor y) -> Tensor")
library.impl("turned", lambda y: y.t().contiguous().t(), "CPU")
torch.library.register_fake("faulty::turned", lambda y: torch.empty(y.shape, dtype=y.dtype), lib=library)

def product(t):
    return torch.nn.functional.linear(t["x"], t["w"], t["bias"])

def at_one_shape(fault):
    return lambda emit, t, p: fault(product(t)) if tuple(t["x"].shape) == (8, 128) and t["x"].is_contiguous() else product(t)

def busy(y):
    once = os.environ.get("FAULTY_BUSY")
    if once and not os.path.exists(once):
        open(once, "w").close()
        time.sleep(1000)
    return y

def lies(emit, t, p):
    y = emit.call(aten.addmm.default, t["bias"], t["x"], emit.call(aten.permute.default, t["w"], [1, 0]))
    y = emit.call(aten.relu.default, y)
    return emit.call(aten.mul.Tensor, y, 1.5) if p["dtype"] == "bfloat16" else y

class Faulty:
    name, devices = "faulty", ("cpu",)
    kernels = {k.name: k for k in (
        Kernel("faulty.good", lambda emit, t, p: product(t)),
        Kernel("faulty.busy", at_one_shape(busy)),
        Kernel("faulty.lies", lies),
        Kernel("faulty.nan", at_one_shape(lambda y: y.fill_(float("nan")))),
        Kernel("faulty.strided", lambda emit, t, p: product({**t, "x": t["x"].as_strided(t["x"].shape, (t["x"].shape[1], 1))})),
        Kernel("faulty.fake", lambda emit, t, p: emit.call(torch.ops.faulty.turned.default, product(t))),
        Kernel("faulty.backward", lambda emit, t, p: product({**t, "x": 2 * t["x"] - t["x"].detach()})),
        Kernel("faulty.random", at_one_shape(lambda y: y + 1e-7 * torch.rand(()))),
        Kernel("faulty.raises", at_one_shape(lambda y: {}["no such key"])),
        Kernel("faulty.segfault", at_one_shape(lambda y: ctypes.string_at(0))),
        Kernel("faulty.hang", at_one_shape(lambda y: time.sleep(1000))),
        Kernel("faulty.exit", at_one_shape(lambda y: os._exit(3))),
    )}
    def version(self): return "1"
    def missing(self): return None
    def candidates(self, ctx):
        fit, refused = fitting(self, ctx)
        yield from refused
        for name in fit:
            refuses = os.environ.get("FAULTY_REFUSES")
            yield ctx.reject(name, "library_import", refuses) if refuses else ctx.candidate(self.kernels[name])
"""


def _declared(**more: Any) -> dict[str, Any]:
    plain = {"has": ["bias"], "transposed": False, "act": None, "binary": None, "frozen": "constants"}
    kernel = {
        "ops": ["linear"], "dtypes": ["float32"], "devices": ["cpu"], "layouts": {"inputs": ["strided"], "outputs": ["strided"]},
        "regions": plain, "forward": True, "deterministic": True, "source": {"ops": "measured"},
    }  # fmt: skip
    return {**kernel, **more}


FAULTY: dict[str, Any] = {
    "schema": 1, "backend": "faulty",
    "kernels": {
        **{f"faulty.{name}": _declared()
           for name in ("good", "busy", "nan", "strided", "random", "raises", "segfault", "hang", "exit")},
        "faulty.fake": _declared(dtypes=["float64"]),
        "faulty.backward": _declared(backward=True),
        "faulty.lies": _declared(dtypes=["float32", "bfloat16"], regions={"act": "relu", "not": {"frozen": ["w"]}}),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library as pip would leave it: a package with its descriptor, and an entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "faulty").mkdir()
    (site / "faulty" / "__init__.py").write_text(MODULE)
    (site / "faulty" / "faulty.json").write_text(json.dumps(FAULTY))
    (site / "faulty-1.dist-info").mkdir()
    (site / "faulty-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (site / "faulty-1.dist-info" / "entry_points.txt").write_text("[lz_compiler.backends]\nfaulty = faulty:Faulty\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("FAULTY_BUSY", str(site / "busy"))
        _forget()
        yield site
    _forget()


def _forget() -> None:
    backends.all_backends.cache_clear()
    backends.kernel.cache_clear()
    capabilities._descriptor.cache_clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ran(installed: Path, cache: Path) -> Any:
    """(exit code, report as JSON) of the command line."""
    result = CliRunner().invoke(cli.app, ["canary", "--backend", "faulty", "--json", "--row-s", "2", "--cache-dir", str(cache)])
    return result.exit_code, json.loads(result.stdout)


# --- the canary -------------------------------------------------------------------------------------------------------------


def test_each_fault_costs_one_row_and_is_reported(ran: Any) -> None:
    code, report = ran
    (run,) = report["runs"]
    bad = {name: (v["status"], v["shape"], v["detail"]) for name, v in run["capabilities"].items() if v["status"] != "passed"}
    assert code == 1
    assert not report["ok"]
    assert not run["incomplete"]
    where = "linear|float32|contiguous|bias+frozen"
    expected = {
        f"faulty.nan|{where}": ("failed", "wrong: error nan"),
        f"faulty.random|{where}": ("failed", "nondeterministic"),
        f"faulty.raises|{where}": ("crashed", "exit code 1: KeyError"),
        f"faulty.segfault|{where}": ("crashed", "signal SIGSEGV"),
        f"faulty.hang|{where}": ("timed_out", "no answer within 8 s"),
        f"faulty.exit|{where}": ("crashed", "exit code 3"),
        "faulty.strided|linear|float32|rows|bias+frozen": ("failed", "wrong"),
        "faulty.strided|linear|float32|strided|bias+frozen": ("failed", "wrong"),
        **{f"faulty.backward|linear|float32|{layout}|bias+frozen": ("failed", "backward") for layout in ("contiguous", "rows", "strided")},
        **{f"faulty.fake|linear|float64|{layout}|bias+frozen": ("failed", "fake") for layout in ("contiguous", "rows", "strided")},
        **{f"faulty.lies|linear|bfloat16|{layout}|bias+relu": ("failed", "wrong") for layout in ("contiguous", "rows", "strided")},
    }
    assert set(bad) == set(expected)
    for name, (status, detail) in expected.items():
        assert bad[name][0] == status, name
        assert bad[name][2].startswith(detail), name
        if not any(word in name for word in ("strided", "lies", "backward", "fake")):
            assert bad[name][1] == "8x128x64"
    counts = run["counts"]
    assert counts["tried"] == counts["declared"] == counts["passed"] + len(bad) == len(run["capabilities"])
    assert (counts["crashed"], counts["timed_out"]) == (3, 1)
    # A fault costs its row: the other shapes of its capability were tried, before and after it.
    assert {v["tried"] for name, v in run["capabilities"].items() if name.endswith(where)} == {len(canary_regions.PRODUCTS)}


def _plan(cache: Path, dtype: torch.dtype) -> tuple[list[str], set[str], bool]:
    """(kernels that ran, codes of rejections of the lying kernel, whether the numbers are right) for a product and its relu."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU()).to(dtype), torch.randn(6, 32, dtype=dtype)
    options = {"backends": ["faulty"], "cost_model": "roofline", "race": False, "cache_dir": str(cache)}
    run = torch.compile(model, backend="layerzero", options=options)
    with torch.no_grad():
        right = torch.allclose(run(x), model(x), rtol=0.05, atol=0.05)
    choices = [c for c in RECORDS[-1].plans[0].choices if c.candidate.region.op == "linear"]
    codes = {r.code for c in choices for r in c.rejections if r.kernel == "faulty.lies"}
    assert ("quarantined" in str(lz.explain(run))) == ("quarantined" in codes)
    return [c.candidate.kernel for c in choices], codes, right


def test_what_failed_is_not_used_by_the_next_plan(ran: Any, cache: Path, tmp_path: Path) -> None:
    plant(str(tmp_path)), plant(str(cache))
    assert _plan(tmp_path, torch.bfloat16) == (["aten.mm"], {"wrong"}, True)  # never tried: tried on first use
    assert _plan(tmp_path, torch.float32) == (["faulty.lies"], set(), True)
    store = TimingStore.open(tmp_path)
    (checked,) = store.get_records(CHECKED)
    assert "faulty.lies#1|1|" in checked
    assert "float32" in checked
    assert [e.kind for e in store.ls().entries if "faulty.lies" in e.key] == [CHECKED, "timing"]  # and its failure
    assert _plan(cache, torch.bfloat16) == (["aten.mm"], {"quarantined"}, True)
    trust = Trust(TimingStore.open(cache), environment("cpu"))
    refused = {
        dtype: trust.refusal(ctx, answer)
        for dtype in ("float32", "bfloat16")
        for _, ctx in canary_regions.contexts("linear", dtype, "cpu")
        for answer in backends.answers(ctx)
        if answer.kernel == "faulty.lies" and isinstance(answer, Candidate)
    }
    assert refused["float32"] is None  # its other dtype passed
    assert refused["bfloat16"] is not None
    assert "wrong" in refused["bfloat16"].detail


def test_a_stored_plan_does_not_bring_it_back(ran: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that was solved where nobody had run the canary, and where the kernel was right."""
    monkeypatch.setattr(first_use, "checked", lambda ctx, candidate: Measurement(None, 0, 0, 0.0, None))
    torch._dynamo.reset()
    plant(str(tmp_path))
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU()).bfloat16(), torch.randn(6, 32, dtype=torch.bfloat16)
    plan = lz.solve(model, (x,), backends=["faulty"], cost_model="roofline", race=False, cache_dir=str(tmp_path))
    assert [c.candidate.kernel for cell in plan.cells for p in cell.plans for c in p.choices if "faulty" in c.candidate.kernel]
    with pytest.raises(PlanError, match=r"uses what failed here: faulty\.lies failed in the canary at .*Solve again"):
        lz.compile(model, plan=plan, cache_dir=str(cache))(x)


def test_dense_is_what_torch_calls_contiguous() -> None:
    answers = set()
    for op in ("linear", "conv", "attention", "paged_attention"):
        for _, ctx in canary_regions.contexts(op, "float32", "cpu"):
            for role, spec in zip(ctx.roles, ctx.specs, strict=True):
                wanted = torch.empty_strided(spec.shape, spec.stride, device="meta").is_contiguous()
                assert capabilities.holds({"dense": [role]}, ctx) == wanted, (role, spec)
                answers.add(wanted)
    assert answers == {True, False}


@pytest.mark.slow
def test_jobs_share_the_regions(ran: Any, installed: Path, tmp_path: Path) -> None:
    (alone,) = ran[1]["runs"]
    some = ("good", "nan", "strided", "segfault", "fake")  # of each kind of fault one; a hanging kernel takes its seconds
    kept = {name: entry for name, entry in FAULTY["kernels"].items() if name.removeprefix("faulty.") in some}
    with declared(installed, kernels=kept):
        (shared,) = canary(["faulty"], cache_dir=str(tmp_path), row_s=2, jobs=3).runs
    found = {name: (verdict.status, verdict.tried) for name, verdict in shared.capabilities.items()}
    expected = {name: verdict for name, verdict in alone["capabilities"].items() if name.partition("|")[0] in kept}
    assert found == {name: (verdict["status"], verdict["tried"]) for name, verdict in expected.items()}
    assert len(found) > len(kept)
    assert not shared.incomplete
    with pytest.raises(OptionError, match="gpu"):
        canary(["aten"], devices=["gpu"], cache_dir=str(tmp_path))
    assert canary(["liger"], devices=["cpu"], cache_dir=str(tmp_path)).runs == ()  # it has no kernels there
    with pytest.raises(OptionError, match="jobs is 0"):
        canary(["faulty"], jobs=0)


def test_the_difference_to_the_last_run(ran: Any, cache: Path, installed: Path) -> None:
    """A new descriptor: what failed under the old one is not held against it, and the difference is shown."""
    kept = {name: entry for name, entry in FAULTY["kernels"].items() if name in ("faulty.good", "faulty.strided")}
    dense = {"x.stride0": {"==": {"term": "x.dim1"}}, "contiguous": ["x"]}
    kept["faulty.strided"] = _declared(constraints=[{"code": "stride", "detail": "dense rows", "require": dense}])
    with declared(installed, kernels=kept):
        report = canary(["faulty"], cache_dir=str(cache))
        assert report.ok, str(report)
        assert "failed -> not declared: faulty.strided|linear|float32|rows|bias+frozen" in report.diff()
        assert "crashed -> not declared: faulty.segfault|linear|float32|contiguous|bias+frozen" in report.diff()
        assert "digest" in report.diff()
        assert "good" not in report.diff()
        assert all("not declared: faulty." in line for line in report.lost)
        assert max(map(len, str(report).splitlines())) <= 100
        store = TimingStore.open(cache)
        assert not Trust(store, environment("cpu")).failed
    assert Trust(store, environment("cpu")).marks() == ()  # the index says that nothing of the newest run failed


@contextmanager
def declared(site: Path, **change: Any) -> Iterator[None]:
    """The library with another descriptor."""
    path = site / "faulty" / "faulty.json"
    path.write_text(json.dumps({**FAULTY, **change}))
    _forget()
    try:
        yield
    finally:
        path.write_text(json.dumps(FAULTY))
        _forget()


def only(name: str) -> dict[str, Any]:
    return {name: FAULTY["kernels"][name]}


@pytest.mark.slow
def test_a_row_that_the_end_cuts_off_is_not_blamed(installed: Path, tmp_path: Path) -> None:
    with declared(installed, kernels=only("faulty.hang")):
        (run,) = canary(["faulty"], cache_dir=str(tmp_path), row_s=60, total_s=8).runs
    assert run.incomplete == "stopped after 8 s"
    assert not run.bad


@pytest.mark.slow
def test_the_difference_is_a_gate(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed and is no longer offered, or whose library is gone, is shown and ends with exit code 1; a second time nothing changes."""

    def gate() -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["canary", "--backend", "faulty", "--diff", "--cache-dir", str(tmp_path)])
        return result.exit_code, result.stdout

    name = "faulty.good|linear|float32|rows|bias+frozen"
    with declared(installed, kernels=only("faulty.good")):
        backend, store = backends.all_backends()["faulty"], open_store(str(tmp_path))
        first = canary(["faulty"], cache_dir=str(tmp_path))
        assert (first.ok, first.diff(), first.lost) == (True, "faulty on cpu: first run", ())
        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "missing", lambda self: "half installed")
            code, text = gate()
            assert (code, f"passed -> skipped: {name}" in text, "faulty on cpu: half installed" in text) == (1, True, True)
            assert gate() == (0, "nothing changed\n")
        remember(store, backend, environment("cpu"), json.loads(first.to_json())["runs"][0])
        monkeypatch.setenv("FAULTY_REFUSES", "importing it raises ImportError")
        code, text = gate()
        assert (code, f"passed -> not_offered: {name}" in text) == (1, True)
        found = last_run(store, backend, environment("cpu"))
    assert found is not None
    run = BackendRun("faulty", "cpu", "1", "", 1.0, {k: Verdict(**v) for k, v in found["capabilities"].items()})
    assert "faulty: nothing is offered: importing it raises ImportError" in str(CanaryReport((run,)))


def test_a_library_that_is_gone_for_a_while_is_not_acquitted(installed: Path, tmp_path: Path) -> None:
    store, env, backend = TimingStore.open(tmp_path), environment("cpu"), backends.all_backends()["faulty"]
    name = "faulty.good|linear|float32|contiguous|bias"
    remember(store, backend, env, {"capabilities": {name: {"status": "failed", "shape": "1x1x1", "detail": "wrong"}}})
    remember(store, backend, env, {"capabilities": {}, "skipped": "half installed"})
    assert list(Trust(store, env).failed) == [name]


def test_a_new_version_is_not_judged_by_the_old_one(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, env, backend = TimingStore.open(tmp_path), environment("cpu"), backends.all_backends()["faulty"]
    name = "faulty.good|linear|float32|contiguous|bias"
    remember(store, backend, env, {"capabilities": {name: {"status": "failed", "shape": "1x1x1", "detail": "wrong"}}})
    assert list(Trust(store, env).failed) == [name]
    assert list(Trust(store, {**env, "threads": "99"}).failed) == [name]
    assert not Trust(store, {**env, "torch": "99"}).failed
    monkeypatch.setattr(type(backend), "version", lambda self: "2")
    assert not Trust(store, env).failed


def test_a_descriptor_that_cannot_be_read_is_a_rejection(installed: Path, tmp_path: Path) -> None:
    """A plan goes on without that library; the canary says what is wrong and goes on with the next."""
    (_, ctx), *_ = canary_regions.contexts("linear", "float32", "cpu")
    path = installed / "faulty" / "faulty.json"
    path.write_text(json.dumps({**FAULTY, "schema": 7}))
    capabilities._descriptor.cache_clear()
    try:
        (rejection,) = [a for a in backends.answers(ctx) if isinstance(a, Rejection) and a.kernel == "faulty"]
        assert rejection.code == "descriptor"
        assert "version 7 is not known" in rejection.detail
        broken, good = canary(["faulty", "liger"], cache_dir=str(tmp_path)).runs  # the second is skipped: it needs a GPU
        assert "version 7 is not known" in broken.incomplete
        assert good.backend == "liger"
        path.unlink()
        capabilities._descriptor.cache_clear()
        (rejection,) = [a for a in backends.answers(ctx) if isinstance(a, Rejection) and a.kernel == "faulty"]
        assert "there is no faulty.json" in rejection.detail
    finally:
        path.write_text(json.dumps(FAULTY))
        capabilities._descriptor.cache_clear()


def test_a_worker_to_which_nobody_listens_ends_in_silence() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lz_compiler.trust.canary_worker", "aten", "cpu", "60", "0", "0", "1"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_an_unknown_backend_is_named(installed: Path) -> None:
    with pytest.raises(OptionError, match="Did you mean 'faulty'"):
        canary(["fualty"])


def test_every_region_of_the_canary_is_one_that_the_recogniser_makes() -> None:
    """Parameters of made regions have the names that real ones have, or a kernel could pass here and fail there."""
    real: dict[str, set[frozenset[str]]] = {}
    for case in CASES[::7]:
        for ctx in trace(case).contexts:
            real.setdefault(ctx.region.op, set()).add(frozenset(ctx.params) - {"absorbed", "reads", "mask"})
    for op in ("linear", "conv", "attention"):
        made = {frozenset(ctx.params) - {"reads", "mask"} for _, ctx in canary_regions.contexts(op, "float32", "cpu")}
        assert made == real[op]


def test_a_real_region_needs_a_capability_that_the_canary_tried() -> None:
    known = {capability for _, ctx, _ in regions(capabilities.descriptor(backends.all_backends()["onednn"]), "cpu")
             for answer in backends.all_backends()["onednn"].candidates(ctx) if isinstance(answer, Candidate)
             for capability in [canary_regions.capability_of(ctx, answer)]}  # fmt: skip
    case = Case("", lambda x, w, b: F.silu(F.linear(x, w, b)), (rand(7, 33), rand(16, 33), rand(16)), frozen=1)
    for ctx in trace(case).contexts:
        for answer in backends.all_backends()["onednn"].candidates(ctx):
            if isinstance(answer, Candidate):
                assert canary_regions.capability_of(ctx, answer) in known


# --- descriptors ------------------------------------------------------------------------------------------------------------


def test_every_kernel_is_declared_with_the_source_of_its_claims() -> None:
    for backend in backends.all_backends().values():
        if backend.name == "faulty":
            continue
        known = capabilities.descriptor(backend)
        assert known is not None, backend.name
        assert set(known.kernels) == set(backend.kernels)
        for kernel in known.kernels.values():
            assert kernel.forward
            assert {"ops", "dtypes", "deterministic"} <= set(kernel.source)
            assert set(kernel.devices) <= set(backend.devices)


OPENS = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import torch
def descriptors():
    return sorted(name.rpartition("/")[2] for name in opened if "backends/" in name and name.endswith(".json"))
import lz_compiler, lz_compiler.backend
print(descriptors())
options = {"backends": ["onednn"], "cost_model": "roofline", "race": False}
with torch.no_grad():
    torch.compile(torch.nn.Linear(8, 8), backend="layerzero", options=options)(torch.ones(2, 8))
print(descriptors())
"""


def test_a_descriptor_is_opened_once_and_only_for_a_backend_that_is_asked() -> None:
    done = subprocess.run([sys.executable, "-c", OPENS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['aten.json', 'onednn.json']"]


def _read(folder: Path, value: Any, name: str = "aten") -> Descriptor:
    path = folder / f"{name}.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return read(path, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: version 2 is not known; this LayerZero reads version 1"),
        ({"schema": None}, "version None"),
        ({"schema": True}, "version True"),
        ({"backend": "other"}, "'faulty' was expected"),
        ({"kernel": {}}, "Did you mean 'kernels'"),
        ({"kernels": {"k": {"dtype": ["float32"]}}}, "Did you mean 'dtypes'"),
        ({"kernels": {"k": {"dtypes": ["float23"]}}}, "Did you mean 'float32'"),
        ({"kernels": {"k": {"architectures": {"cuda": "new"}}}}, "neither cpu"),
        ({"kernels": {"k": {"libraries": {"torch": "~=2"}}}}, "is not like"),
        ({"kernels": {"k": {"constraints": ["none"]}}}, "unknown shared constraint 'none'"),
        ({"kernels": {"k": {"regions": {"x.dim0": {"=>": 2}}}}}, "unknown field '=>'"),
        ({"kernels": {"k": {"regions": {"__import__('os')": 1}}}}, "is not a term"),
        ({"kernels": {"k": {"regions": functools.reduce(lambda c, _: {"not": c}, range(20), {})}}}, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_descriptor_of_another_form_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError) as refused:
        _read(tmp_path, {**FAULTY, **change}, "faulty")
    assert message in str(refused.value)
    assert "faulty.json" in str(refused.value)


def test_what_is_not_declared_is_not_supported(tmp_path: Path) -> None:
    (_, ctx), *_ = canary_regions.contexts("linear", "float32", "cpu")
    whole = _declared(regions={})
    assert capabilities.subject(_read(tmp_path, {**FAULTY, "kernels": {"k": whole}}, "faulty").kernels["k"], ctx)
    for field in ("ops", "devices", "forward", "dtypes"):
        less = {name: value for name, value in whole.items() if name != field}
        kernel = _read(tmp_path, {**FAULTY, "kernels": {"k": less}}, "faulty").kernels["k"]
        assert not capabilities.subject(kernel, ctx) or capabilities.refusal(kernel, ctx) is not None, field
    kernel = _read(tmp_path, {**FAULTY, "kernels": {"k": _declared(regions={}, devices=["cuda"])}}, "faulty").kernels["k"]
    cuda = replace(ctx, specs=tuple(replace(s, device="cuda") for s in ctx.specs), options=replace(ctx.options, cudagraphs=True))
    refused = capabilities.refusal(kernel, cuda)  # not declared safe in a CUDA graph
    assert refused is not None
    assert refused.code == "cuda_graph"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["x.dim0", "term", "any", "=="])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real descriptor in which a value was exchanged, taken away or doubled, or some bytes are others."""
    text = draw(st.sampled_from([path.read_text() for path in OWN]))
    if draw(st.booleans()):
        data = bytearray(text.encode())
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    top = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = top
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], (dict, list)) or draw(st.integers(0, 4)) == 0:
                place[key] = draw(VALUES)
                break
            place = place[key]
    return json.dumps(top).encode()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged())
def test_a_damaged_descriptor_is_refused_or_works(tmp_path: Path, data: bytes) -> None:
    """One class of error, never another; and what was accepted can be evaluated on any region."""
    try:
        name = str(json.loads(data)["backend"])
    except (ValueError, KeyError, TypeError, RecursionError):
        name = "aten"
    try:
        (tmp_path / "any.json").write_bytes(data)
        known = read(tmp_path / "any.json", name)
    except CapabilityError:
        return
    for op in ("linear", "conv", "attention"):
        (_, ctx), *_ = canary_regions.contexts(op, "float32", "cpu")
        for kernel in known.kernels.values():
            capabilities.holds(kernel.regions, ctx)
            capabilities.refusal(kernel, ctx)


def test_reports_are_data(ran: Any) -> None:
    assert CanaryReport(()).ok
    (run,) = ran[1]["runs"]
    assert {"backend", "device", "version", "digest", "seconds", "capabilities", "counts", "date"} <= set(run)
    assert run["environment"] == environment("cpu")
