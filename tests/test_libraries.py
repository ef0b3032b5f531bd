"""Optional libraries: absent, half installed, of another version, slow, or broken on import, each is a rejection with its reason and
never an exception. What runs on this machine runs; a third party's package is installed by pip and its kernel chosen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import plant
from torch import Tensor, nn
from torch.nn import functional as F

import lz_compiler as lz
from lz_compiler import backends, measure
from lz_compiler.backend import RECORDS
from lz_compiler.backends import library
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models import cost_model
from lz_compiler.errors import OptionError
from lz_compiler.target import detect
from lz_compiler.timings import TimingStore
from lz_compiler.trust import canary_regions, capabilities
from lz_compiler.types import Candidate, Rejection

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_backend"
OPTIONAL = {name: b for name, b in backends.all_backends().items() if isinstance(b, library.LibraryBackend)}
ONES = {"flash_attn": ("flash-attn", "2.8.3"), "flash_attn_3": ("flash-attn-3", "3.0.0"), "flashinfer": ("flashinfer-python", "0.7.2"),
        "xformers": ("xformers", "0.0.35"), "liger": ("liger-kernel", "0.8.5"), "torchao": ("torchao", "0.18.0")}  # fmt: skip


def _forget() -> None:
    for cached in (backends.all_backends, backends.kernel, backends.owners, capabilities._descriptor, capabilities.installed_version,
                   library._missing, library._import_error):  # fmt: skip
        cached.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of packages, before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LAYERZERO_CACHE_DIR", str(tmp_path / "cache"))
    before = set(sys.modules)
    _forget()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    monkeypatch.undo()
    _forget()


def _install(site: Path, name: str, source: str | None, version: str | None = "") -> None:
    """A distribution as pip leaves it: its module (None: without), and metadata (None: without; "": of a version that fits)."""
    backend = OPTIONAL[name]
    top, _, rest = backend.library.module.partition(".")
    if source is not None:
        (site / top).mkdir()
        (site / top / "__init__.py").write_text(source)
        if rest:
            (site / top / f"{rest}.py").write_text("")
    if version is not None:
        distribution = ONES[name][0]
        (site / f"{distribution.replace('-', '_')}-1.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version or ONES[name][1]}\n"
        (site / f"{distribution.replace('-', '_')}-1.dist-info" / "METADATA").write_text(text)


def _marks(site: Path) -> list[str]:
    """The imports that are remembered to go well."""
    return list(TimingStore.open(site / "cache").get_records(library.IMPORT))


def _context(name: str, **changes: Any) -> SelectionContext:
    """A region that one of the backend's kernels is for, on its device."""
    op = {"liger": "gated_linear", "torchao": "linear"}.get(name, "attention")
    device, dtype = OPTIONAL[name].devices[0], "bfloat16"
    for _, ctx in canary_regions.contexts(op, dtype, device):
        if op != "linear" or (ctx.default and "w" in ctx.frozen and "bias" in ctx.roles):
            return replace(ctx, **changes)
    raise AssertionError(op)


def _answers(name: str, ctx: SelectionContext | None = None) -> list[Candidate | Rejection]:
    ctx = ctx or _context(name)
    ctx = replace(ctx, options=replace(ctx.options, backends=(name,)))
    mine = {name, *OPTIONAL[name].kernels}
    return [a for a in backends.answers(ctx) if a.kernel in mine]


def _reasons(name: str, ctx: SelectionContext | None = None) -> dict[str, str]:
    answers = _answers(name, ctx)
    assert answers
    assert all(isinstance(a, Rejection) for a in answers), answers
    return {a.code: a.detail for a in answers if isinstance(a, Rejection)}


# --- what can be wrong with a package ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ONES))
def test_a_half_installed_library_is_a_rejection(name: str, site: Path) -> None:
    if OPTIONAL[name].missing() is None:
        pytest.skip("really installed, further down the path")
    _forget()
    top = OPTIONAL[name].library.module.partition(".")[0]
    _install(site, name, "", None)
    assert "half installed: its metadata" in _reasons(name)["library_missing"]
    (site / top / "__init__.py").unlink()
    for file in (site / top).iterdir():
        file.unlink()
    (site / top).rmdir()
    _forget()
    _install(site, name, None)
    assert f"half installed: there is no module {top}" in _reasons(name)["library_missing"]
    _forget()
    (site / f"{ONES[name][0].replace('-', '_')}-1.dist-info" / "METADATA").write_text("")
    assert set(_reasons(name)) == {"library_missing"}


@pytest.mark.parametrize("name", sorted(ONES))
def test_a_wrong_version_is_a_rejection_and_nothing_is_imported(name: str, site: Path) -> None:
    _install(site, name, "raise AssertionError('imported')", "99.0")
    assert "not 99.0" in _reasons(name)["library_version"]
    assert not _marks(site)
    assert OPTIONAL[name].version() == "99.0"


def test_an_absent_library_says_how_to_get_it(site: Path) -> None:
    assert _reasons("flash_attn_3")["library_missing"].startswith("flash-attn-3 is not installed: build `hopper`")


def test_a_library_that_raises_or_dies_on_import_is_a_rejection(site: Path) -> None:
    _install(site, "flash_attn", "import no_such_extension")
    _install(site, "flash_attn_3", "import os; os.abort()")
    _install(site, "liger", "raise SystemExit(0)")
    assert "ends its process (exit code 1): ModuleNotFoundError" in _reasons("flash_attn")["library_import"]
    assert "ends its process (signal 6)" in _reasons("flash_attn_3")["library_import"]
    assert "ends its process (exit code 0)" in _reasons("liger")["library_import"]
    assert not _marks(site)  # repaired, it is tried again


def test_an_import_that_fails_only_here_is_a_rejection(site: Path) -> None:
    """As of a library that collides with one that this process has loaded."""
    _install(site, "flash_attn", "import sys\nif 'pytest' in sys.modules: raise OSError('another libcudart is loaded')")
    assert _reasons("flash_attn")["library_import"] == "importing flash_attn raises OSError: another libcudart is loaded"


def test_a_hanging_import_is_a_rejection_within_its_limit(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "IMPORT_S", 1.0)
    _install(site, "flashinfer", "import time; time.sleep(1000)")
    assert _reasons("flashinfer", _single())["library_import"] == "importing flashinfer takes more than 1 s"


def test_listing_imports_nothing_and_a_good_import_is_remembered(site: Path) -> None:
    _install(site, "xformers", "")
    backend = OPTIONAL["xformers"]
    assert backend.missing() is None
    assert backend.version() == "0.0.35"
    assert "xformers" not in sys.modules
    assert any(isinstance(a, Candidate) for a in _answers("xformers"))
    (mark,) = _marks(site)
    assert mark.startswith("xformers.ops-xformers-0.0.35-torch")


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_marks_of_imports_lie_in_a_folder_of_ones_own(site: Path) -> None:
    _install(site, "xformers", "")
    assert any(isinstance(a, Candidate) for a in _answers("xformers"))
    assert (site / "cache").stat().st_mode & 0o777 == 0o700
    (site / "open").mkdir()
    (site / "open").chmod(0o777)
    with pytest.warns(UserWarning, match="everyone may write to"):
        assert library.remembered("some import", lambda: None, str(site / "open")) is None
    assert not list((site / "open").iterdir())


# --- what each library is offered for ---------------------------------------------------------------------------------------


def _single() -> SelectionContext:
    """Attention of one batch entry with heads of 128, on a GPU."""
    return next(c for _, c in canary_regions.contexts("attention", "bfloat16", "cuda") if c.spec("q").shape == (1, 2, 65, 128))


def _offered(name: str, op: str, site: Path) -> set[tuple[str, str]]:
    """(kernel, feature) of everything that the canary's regions would try on a GPU."""
    _install(site, name, "")
    found = set()
    for _, ctx in canary_regions.contexts(op, "bfloat16", "cuda"):
        found |= {(a.kernel, canary_regions.feature_of(ctx)) for a in _answers(name, ctx) if isinstance(a, Candidate)}
    return found


def test_attention_libraries_get_only_what_their_arguments_can_say(site: Path) -> None:
    same = {"plain", "scale", "causal", "gqa", "causal+gqa", "causal+shift", "causal+uniform"}
    offered = _offered("flash_attn", "attention", site)
    assert {feature for kernel, feature in offered if kernel == "flash_attn.attention"} >= same - {"causal+shift"}
    assert {feature for kernel, feature in offered if kernel == "flash_attn.cached"} == {"causal+position", "causal+gqa+position"}
    assert not any("mask" in feature or "keys" in feature for _, feature in offered)
    assert {feature for _, feature in _offered("xformers", "attention", site)} == {f for k, f in offered if k == "flash_attn.attention"}
    assert {kernel for kernel, _ in _offered("flashinfer", "attention", site)} == {"flashinfer.single"}


def test_paged_attention_is_offered_where_pages_fit(site: Path) -> None:
    assert {feature for _, feature in _offered("flashinfer", "paged_attention", site)} == {"NHD", "HND"}
    assert _offered("flash_attn", "paged_attention", site) == set()  # pages of 256 tokens only
    assert _offered("flash_attn_3", "paged_attention", site) == {("flash_attn_3.paged", "NHD")}


def test_operators_have_the_shapes_and_strides_of_attention() -> None:
    """What the compiler believes of a call that cannot run here: (B, H, Q, D) in memory order (B, Q, H, D)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 4, 7, 64), torch.empty(2, 2, 9, 64)
        length, table, pool = torch.empty(2, dtype=torch.int32), torch.empty(2, 3, dtype=torch.int32), torch.empty(6, 16, 2, 64)
        results = [
            torch.ops.lz.flash_attention(q, k, k, None, True, -1, "flash_attn"),
            torch.ops.lz.flash_attention_cached(q, k, k, length, 0, None, None, -1, "flash_attn"),
            torch.ops.lz.xformers_attention(q, k, k, None, True, 0),
            torch.ops.lz.flashinfer_single(q[:1], k[:1], k[:1], None, True, -1),
            torch.ops.lz.flashinfer_paged(q[:, :, :1], pool, pool, table, length, 0.125, "NHD"),
        ]
    for y in results:
        assert y.transpose(1, 2).is_contiguous()
    assert [tuple(y.shape) for y in results] == [(2, 4, 7, 64)] * 3 + [(1, 4, 7, 64), (2, 4, 1, 64)]


# --- what runs here ---------------------------------------------------------------------------------------------------------


def _kernels(options: dict[str, Any], function: Any, *inputs: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """(kernels of the plan's regions, result, eager's result)."""
    run = torch.compile(function, backend="layerzero", options={"race": False, "measure_budget_s": 120.0, **options})
    with torch.no_grad():
        result, expected = run(*inputs), function(*inputs)
    return [c.candidate.kernel for p in RECORDS[-1].plans for c in p.choices], result, expected


def _windowed(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    first = F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - 20))
    return F.scaled_dot_product_attention(first.relu() * 2, k, v, attn_mask=j <= i + position).sigmoid()


NEEDS_AVX2 = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="FlexAttention's C++ needs AVX2")


@pytest.mark.slow
@NEEDS_AVX2
def test_flex_attention_runs_with_the_predicates_inlined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two predicates in one graph, each its own subgraph, with loops behind that must not be fused into the C++ template."""
    policy = tmp_path / "lock.json"
    policy.write_text(json.dumps({"lock": [{"op": "attention", "kernel": "flex.attention"}]}))
    for name, value in {"POLICY": str(policy), "BACKENDS": "flex_attention", "RACE": "0", "COST_MODEL": "roofline"}.items():
        monkeypatch.setenv(f"LAYERZERO_{name}", value)
    q, k, v = (torch.randn(1, heads, 80, 32) for heads in (4, 2, 2))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    run = torch.compile(_windowed, backend="layerzero", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        for position in (torch.tensor([3]), torch.tensor([0])):
            torch.testing.assert_close(run(q, k, v, position), _windowed(q, k, v, position))
    chosen = [c.candidate.kernel for p in RECORDS[-1].plans for c in p.choices]
    assert chosen.count("flex.attention") == 2, str(lz.explain(run))


@NEEDS_AVX2
def test_flex_attention_is_right_also_for_nan() -> None:
    """Measured against float64 and with a NaN in the query, which the C++ kernel by itself turns into 0."""
    (ctx,) = [c for s, c in canary_regions.contexts("attention", "float32", "cpu") if s == "2x4x17x33x64"
              and canary_regions.feature_of(c) == "causal+position" and canary_regions.worst_layout(c.specs) == "contiguous"]  # fmt: skip
    (candidate,) = [a for a in backends.answers(ctx) if isinstance(a, Candidate) and a.kernel == "flex.attention"]
    with torch.no_grad():
        assert measure.judged(measure.Bound(candidate, ctx), ctx, measure.truth_of(ctx)) == (None, 0.0)


def test_torchao_quantises_within_the_budget() -> None:
    pytest.importorskip("torchao", reason="pip install 'lz-compiler[torchao]'")
    model, x = nn.Linear(64, 48).eval(), torch.randn(32, 64)
    options = {"backends": ["torchao"], "freeze": True, "error_budget": 0.5,
               "policy": {"prefer": [{"kernel": "torchao.int8_linear", "factor": 0.001}]}}  # fmt: skip
    chosen, result, expected = _kernels(options, model, x)
    assert "torchao.int8_linear" in chosen
    error = float((result - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.05  # really int8, and near
    (ctx,) = [c for s, c in canary_regions.contexts("linear", "float32", "cpu") if s == "17x33x47" and c.default and "w" in c.frozen
              and canary_regions.feature_of(c) == "bias+frozen" and canary_regions.worst_layout(c.specs) == "contiguous"]  # fmt: skip
    (candidate,) = [a for a in backends.answers(ctx) if isinstance(a, Candidate) and a.kernel == "torchao.int8_linear"]
    with torch.no_grad():
        assert measure.judged(measure.Bound(candidate, ctx), ctx, measure.truth_of(ctx))[0] is None  # NaN comes out where eager's does
    lossless = replace(ctx, options=replace(ctx.options, error_budget=0.0))
    assert "lossy" in {a.code for a in backends.answers(lossless) if isinstance(a, Rejection) and a.kernel == "torchao.int8_linear"}


def test_the_functions_that_operators_call_exist() -> None:
    """In packages that can be imported here but not run: their real signatures take what the operators give."""
    from inspect import signature

    calls: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
        "liger_kernel": [("liger_kernel.ops.swiglu", "swiglu_forward", {"a": 0, "b": 0}),
                         ("liger_kernel.ops.geglu", "geglu_forward", {"a": 0, "b": 0})],
        "xformers": [("xformers.ops.fmha", "memory_efficient_attention_forward", {"query": 0, "key": 0, "value": 0, "scale": 1.0}),
                     ("xformers.ops.fmha.attn_bias", "LowerTriangularFromBottomRightMask", {}),
                     ("xformers.ops.fmha.attn_bias", "LowerTriangularFromBottomRightLocalAttentionMask", {"_window_size": 7})],
    }  # fmt: skip
    found = [package for package in calls if find_spec(package)]
    if not found:
        pytest.skip("neither liger-kernel nor xformers is installed")
    for package in found:
        for module, name, arguments in calls[package]:
            signature(getattr(import_module(module), name)).bind(**arguments)


# --- third parties ----------------------------------------------------------------------------------------------------------


def _residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) + x


def test_the_example_package_is_installed_and_its_kernel_runs(site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-t", str(site), str(EXAMPLE)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _forget()
    options = {"backends": ["my_backend"], "policy": {"lock": [{"op": "linear", "kernel": "my_backend.linear_add"}]}}
    chosen, result, expected = _kernels(options, _residual, torch.randn(8, 32), torch.randn(32, 32), torch.randn(32))
    assert "my_backend.linear_add" in chosen
    torch.testing.assert_close(result, expected)


GOOD = """
from lz_compiler.backends.base import Kernel
class Backend:
    name, devices = "{name}", ("cpu",)
    kernels = {{"{name}.product": Kernel("{name}.product", lambda emit, t, p: None)}}
    def version(self): return "1"
    def missing(self): return None
    def candidates(self, ctx): yield ctx.candidate(self.kernels["{name}.product"])
"""
METHOD = GOOD + "    def {what}: {body}\n"
# What can be wrong with a package: its source, and what the rejection says.
FAULTS = {
    "raises": ("raise RuntimeError('no licence')", "ends its process (exit code 1): RuntimeError: no licence"),
    "exits": ("import sys; sys.exit()", "ends its process (exit code 0)"),
    "aborts": ("import os; os.abort()", "ends its process (signal 6)"),
    "ends": ("import os; os._exit(3)", "ends its process (exit code 3)"),
    "interrupts": ("raise KeyboardInterrupt", "ends its process"),
    "hangs": ("import time; time.sleep(1000)", "takes more than 1 s"),
    "bare": ("class Backend: name = 'bare'", "no backend: it has no devices, kernels, version, missing, candidates"),
    "other": (GOOD.format(name="another"), "its name is 'another', and its entry point's 'other'"),
    "shadow": (GOOD.format(name="shadow").replace("shadow.product", "aten.mm"), "its kernel 'aten.mm' has the name of one of LayerZero's"),
    "unmade": (METHOD.format(name="unmade", what="__init__(self)", body="{}['key']"), "ends its process (exit code 1): KeyError: 'key'"),
    "here": (GOOD.format(name="here") + "import sys\nif 'pytest' in sys.modules: sys.exit(3)", "here:Backend raises SystemExit: 3"),
    "missing": (METHOD.format(name="missing", what="missing(self)", body="{}['key']"), "its missing() raises KeyError: 'key'"),
    "leaves": (METHOD.format(name="leaves", what="missing(self)", body="raise SystemExit"), "its missing() raises SystemExit: no message"),
    "offers": (METHOD.format(name="offers", what="candidates(self, ctx)", body="raise SystemExit"), "its candidates() raises SystemExit"),
    "invents": (METHOD.format(name="invents", what="candidates(self, ctx)", body="return ['mm']"), "its candidates() gives 'mm', which"),
}  # fmt: skip


def _register(site: Path, name: str, source: str, value: str = "") -> None:
    """A package with an entry point for a backend, as pip leaves it, which tells in a file that it was imported."""
    (site / f"{name}.py").write_text(f"open({str(site / 'imported')!r}, 'a').write('{name} ')\n{source}")
    (site / f"{name}-1.dist-info").mkdir()
    (site / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    text = f"[lz_compiler.backends]\n{value or name} = {name}:Backend\n"
    (site / f"{name}-1.dist-info" / "entry_points.txt").write_text(text)


def _linear(**options: Any) -> SelectionContext:
    (_, ctx), *_ = canary_regions.contexts("linear", "float32", "cpu")
    return replace(ctx, options=replace(ctx.options, **options))


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_third_party_is_a_rejection(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "IMPORT_S", 1.0 if name == "hangs" else 60.0)
    source, why = FAULTS[name]
    _register(site, name, source)
    _forget()
    (rejection,) = [a for a in backends.answers(_linear()) if a.kernel == name]
    assert isinstance(rejection, Rejection)
    assert rejection.code == "backend_error"
    assert why in rejection.detail


def _product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def test_a_declared_workspace_is_held_against_the_memory_limit(site: Path) -> None:
    run = "lambda emit, t, p: emit.call(torch.ops.aten.mm.default, t['x'], t['w'])"
    _register(site, "roomy", "import torch" + GOOD.format(name="roomy").replace("lambda emit, t, p: None", run))
    declared = {"roomy.product": {"ops": ["linear"], "workspace": 4096}}
    (site / "roomy.json").write_text(json.dumps({"schema": 1, "backend": "roomy", "kernels": declared}))
    _forget()
    options = {"backends": ["roomy"], "cost_model": "roofline", "policy": {"prefer": [{"kernel": "roomy.product", "factor": 0.001}]}}
    for limit, kernel in ((4096, "roomy.product"), (4095, "aten.mm")):
        chosen, *_ = _kernels({**options, "memory_limit": limit}, _product, torch.randn(8, 32), torch.randn(32, 16))
        assert chosen == [kernel]


@pytest.mark.slow
def test_compiling_goes_on_beside_broken_third_parties(site: Path) -> None:
    """Those that break while they are asked, and one that ends processes; an allow-list without them imports none."""
    plant(str(site / "cache"))  # which the processes use
    for name in ("ends", "here", "missing", "offers"):
        _register(site, name, FAULTS[name][0].replace("'pytest'", "'torch'"))
    code = """
import sys, torch, lz_compiler as lz
model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
run = torch.compile(model, backend="layerzero", options={"cost_model": "roofline", "race": False} | eval(sys.argv[1]))
with torch.no_grad():
    assert torch.allclose(run(x), model(x), atol=1e-5)
print("rejected:", *sorted({r["code"] + "/" + r["kernel"] for p in lz.explain(run).data["graphs"][0]["plans"] for c in p["regions"]
      for r in c["rejections"] if r["code"] == "backend_error"}))
"""
    for options, rejected, imported in (
        ({"backends": ["aten"]}, [], False),
        ({}, [f"backend_error/{name}" for name in ("ends", "here", "missing", "offers")], True),
    ):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(options)], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": f"{site}:{Path(lz.__file__).parents[1]}"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["rejected:", *rejected]
        assert (site / "imported").exists() is imported


def test_an_own_backend_is_not_replaced_and_a_good_package_is_tried_once(site: Path) -> None:
    _register(site, "pirate", GOOD.format(name="aten"), "aten")
    _register(site, "good", GOOD.format(name="good"))
    for _ in range(2):
        _forget()
        with pytest.warns(UserWarning, match="pirate:Backend is ignored: there is a backend 'aten' already"):
            assert any(a.kernel == "good.product" for a in backends.answers(_linear(backends=("good",))))
        assert type(backends.all_backends()["aten"]).__name__ == "Aten"
        assert backends.owners()["good.product"] == "good"
    assert (site / "imported").read_text().split() == ["good", "good"]  # elsewhere, and then here
    assert len(_marks(site)) == 1


def test_a_registered_cost_model_that_breaks_says_so(site: Path) -> None:
    _register(site, "priced", "class Backend:\n    def __init__(self, *args): raise SystemExit(3)")
    entry = site / "priced-1.dist-info" / "entry_points.txt"
    entry.write_text("[lz_compiler.cost_models]\nmeasured = priced:Backend\npriced = priced:Backend\n")
    store, target = TimingStore.open(site / "cache"), detect("cpu", TimingStore.open())
    assert type(cost_model("measured", target, store, 1.0)).__name__ == "Measured"
    with pytest.raises(OptionError, match=r"cost_model 'priced': priced:Backend raises SystemExit: 3\. Repair"):
        cost_model("priced", target, store, 1.0)
