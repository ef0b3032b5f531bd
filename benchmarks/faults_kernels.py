"""Planted libraries of faults.py: kernels that lie, crash and hang, allocate too much, take long to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from planting import WORK, Row
from test_canary import FAULTY, MODULE
from torch import nn

import lz_compiler as lz
from lz_compiler import backends
from lz_compiler.target import environment
from lz_compiler.timings import open_store
from lz_compiler.trust import capabilities
from lz_compiler.trust.canary import canary
from lz_compiler.trust.verdicts import Trust

RARE = """
import os, torch
from lz_compiler.backends.base import Kernel
from lz_compiler.trust.capabilities import fitting

def run(emit, t, p):
    if os.environ.get("HUNGRY"):
        torch.empty(1 << 50, dtype=torch.uint8)
    y = emit.call(torch.ops.aten.addmm.default, t["bias"], t["x"], emit.call(torch.ops.aten.permute.default, t["w"], [1, 0]))
    return emit.call(torch.ops.aten.mul.Tensor, y, float("nan")) if p["rows"] == 7 else y

class Rare:
    name, devices = "rare", ("cpu",)
    kernels = {"rare.linear": Kernel("rare.linear", run)}
    def version(self): return "1"
    def missing(self): return None
    def candidates(self, ctx):
        fit, refused = fitting(self, ctx)
        yield from refused
        for name in fit:
            yield ctx.candidate(self.kernels[name], rows=ctx.specs[0].shape[0])
"""


def install(site: Path, name: str, module: str, kind: str, descriptor: dict[str, Any] | None = None) -> None:
    """A package as pip would leave it, with an entry point."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(module)
    if descriptor is not None:
        (site / name / f"{name}.json").write_text(json.dumps(descriptor))
    info = site / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[lz_compiler.backends]\n{name} = {name}:{kind}\n")


@contextmanager
def installed(name: str, module: str, kind: str, descriptor: dict[str, Any]) -> Iterator[None]:
    site = WORK / f"site-{name}"
    install(site, name, module, kind, descriptor)
    sys.path.insert(0, str(site))
    _forget()
    yield
    sys.path.remove(str(site))
    _forget()


def _forget() -> None:
    for cached in (backends.all_backends, backends.kernel, backends.owners, capabilities._descriptor):
        cached.cache_clear()


def compiled(model: nn.Module, x: torch.Tensor, cache: Path, **options: Any) -> tuple[bool, str]:
    """(whether the numbers are right, the explanation) of a compiled model."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="layerzero", options={"race": False, "cache_dir": str(cache), **options})
    with torch.no_grad():
        right = torch.allclose(run(x), model(x), rtol=0.05, atol=0.05)
    return right, str(lz.explain(run))


PLANTED = {  # kernel: what is wrong with it, and how the canary's verdict begins
    "faulty.lies": ("wrong numbers in one dtype", "failed: wrong: error "),
    "faulty.nan": ("NaN at one length", "failed: wrong: error nan"),
    "faulty.strided": ("wrong only for strided input", "failed: wrong: error "),
    "faulty.raises": ("raises at one length", "crashed: exit code 1: KeyError"),
    "faulty.segfault": ("segfault", "crashed: signal SIGSEGV"),
    "faulty.hang": ("hang", "timed_out: no answer within "),
    "faulty.exit": ("os._exit", "crashed: exit code 3"),
}
HEALTHY = ("faulty.good|", "faulty.busy|", "faulty.lies|linear|float32|")


def kernels(quick: bool) -> Iterator[Row]:
    """Each fault of the library costs rows of the canary's report, no later plan uses the capability, and nothing else is blamed."""
    with installed("faulty", MODULE, "Faulty", FAULTY):
        cache = WORK / "canary"
        (run,) = canary(["faulty"], cache_dir=str(cache), row_s=3.0).runs
        trust = Trust(open_store(str(cache)), environment("cpu"))
        for kernel, (fault, begins) in PLANTED.items():
            row = Row(f"kernel: {fault} (after `lz canary`)")
            for name, verdict in ((n, v) for n, v in run.bad.items() if n.startswith(f"{kernel}|") and not n.startswith(HEALTHY)):
                told = f"{verdict.status}: {verdict.detail}"
                what = f"{verdict.status}, quarantined: {verdict.detail[:40]}"
                row.add(what if told.startswith(begins) else f"{told[:80]}, and {begins} was planted",
                        wrong=int(name not in trust.failed), silent=int(not told.startswith(begins)))  # fmt: skip
            yield row
        row = Row("kernel: nothing is wrong with it, or not in this dtype (after `lz canary`)")
        for name, verdict in ((n, v) for n, v in run.capabilities.items() if n.startswith(HEALTHY)):
            blamed = verdict.status != "passed" or name in trust.failed
            row.add(f"{verdict.status}: {verdict.detail}"[:80] if blamed else "passed, not quarantined", wrong=int(blamed))
        yield row
        row = Row("kernel: wrong numbers in one dtype, never tried by the canary")
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU()).bfloat16(), torch.randn(6, 32).bfloat16()
        right, text = compiled(model, x, WORK / "untried", backends=["faulty"])
        row.add("measured on first use, found wrong, rejected", wrong=int(not right), silent=int("faulty.lies" not in text))
        right, text = compiled(model, x, cache, backends=["faulty"], cost_model="roofline")
        row.add("quarantined: another kernel ran", wrong=int(not right), silent=int("quarantined" not in text))
        yield row
    entry = {**FAULTY["kernels"]["faulty.good"], "regions": {"has": ["bias"], "transposed": False, "act": None, "binary": None}}
    with installed("rare", RARE, "Rare", {"schema": 1, "backend": "rare", "kernels": {"rare.linear": entry}}):
        yield unseen()
        yield hungry()


def unseen() -> Row:
    row, cache = Row("kernel: NaN at a length that the canary does not try"), WORK / "unseen"
    report = canary(["rare"], cache_dir=str(cache), row_s=3.0)
    row.add("passed the canary" if report.ok else str(report), wrong=int(not report.ok))
    torch.manual_seed(0)
    for rows, found in ((7, "measured on first use, found wrong, rejected"), (6, "at another length: measured, right")):
        right, text = compiled(nn.Linear(32, 48), torch.randn(rows, 32), cache, backends=["rare"])
        refused = "rare.linear (wrong)" in text
        row.add(found, wrong=int(not right), silent=int(refused != (rows == 7)))
    return row


def hungry() -> Row:
    row, cache = Row("out of memory while measuring"), WORK / "hungry"
    model, x = nn.Linear(32, 48), torch.randn(6, 32)
    os.environ["HUNGRY"] = "1"
    right, text = compiled(model, x, cache, backends=["rare"])
    row.add("rejected for this plan, the others measured", wrong=int(not right), silent=int("allocate memory" not in text))
    del os.environ["HUNGRY"]
    open_store(str(cache)).clear("verdict")
    compiled(model, x, cache, backends=["rare"])
    known = open_store(str(cache)).ls().entries
    timed = [open_store(str(cache)).get(e.key) for e in known if e.kind == "timing" and e.key.startswith("rare.linear")]
    row.add("not remembered: measured when there is memory", lost=int(not any(t and t.ns for t in timed)))
    return row


SLOW = """
import time, warnings
warnings.simplefilter("always")
import torch, lz_compiler
start = time.perf_counter()
import lz_compiler.backend
model = torch.nn.Linear(8, 8)
with torch.no_grad():
    run = torch.compile(model, backend="layerzero", options={"race": False, "cost_model": "roofline"})
    print("RIGHT", torch.allclose(run(torch.ones(2, 8)), model(torch.ones(2, 8)), atol=1e-5))
"""


def slow_import(quick: bool) -> Iterator[Row]:
    row, site = Row("library that takes 6 s to import"), WORK / "site-slow"
    install(site, "slow", "import time\ntime.sleep(6)\n" + RARE.replace("rare", "slow"), "Rare")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", SLOW], env=env, capture_output=True, text=True, timeout=300, check=False)
    row.add("waited for once, then planned", wrong=int("RIGHT True" not in done.stdout), silent=int("took" not in done.stderr))
    return iter([row])
