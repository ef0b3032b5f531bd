"""Planted faults, and what happened: kernels that lie, crash and hang, damaged stores, kills, full disks, clocks.

    python benchmarks/faults.py [--quick] [--only WORD] [--out FILE.md]

Every fault is real: a library with such kernels is installed through its entry point, processes are killed with SIGKILL, files are
overwritten, the disk's limit is RLIMIT_FSIZE. `lost`: facts or files gone without a word, or acknowledged and not there; `wrong used`:
a wrong number that reached a plan or an output; `reported`: faults that a person is told of, where there is something to tell.
Needs POSIX and the `test` extra. Exit code 1 if anything was lost, wrong or unreported. Also: what all checks cost a warm compile.
"""

# ruff: noqa: E402  (the environment is set before torch is imported)
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # children of a fork must find no pool of workers
WORK = Path(tempfile.mkdtemp(prefix="layerzero-faults-"))
os.environ["LAYERZERO_CACHE_DIR"] = str(WORK / "cache")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(WORK / "inductor")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from checks_overhead import overhead
from test_canary import FAULTY, MODULE
from torch import nn

import lz_compiler as lz
from lz_compiler import backends, facts, planning
from lz_compiler.capture import GraphView
from lz_compiler.deploy.warming import check_manifest
from lz_compiler.errors import LayerZeroError
from lz_compiler.options import Options
from lz_compiler.target import detect, environment
from lz_compiler.timings import FILE_NAME, Timing, TimingStore, open_store
from lz_compiler.trust import capabilities
from lz_compiler.trust.canary import canary
from lz_compiler.trust.verdicts import Trust, last_run, remember

torch.set_num_threads(1)  # a fork does not take OpenMP's threads along


@dataclass(slots=True)
class Row:
    """One planted fault. `silent`: times that nobody was told of it, though there was something to tell."""

    fault: str
    times: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    wrong: int = 0
    silent: int = 0

    def add(self, what: str, lost: int = 0, wrong: int = 0, silent: int = 0) -> None:
        self.times += 1
        self.happened[what] += 1
        self.lost, self.wrong, self.silent = self.lost + lost, self.wrong + wrong, self.silent + silent

    def cells(self) -> str:
        happened = "; ".join(f"{what} ({n})" if len(self.happened) > 1 else what for what, n in self.happened.most_common())
        reported = "yes" if not self.silent else f"{self.silent} not"
        return f"| {self.fault} | {self.times} | {happened} | {self.lost} | {self.wrong} | {reported} |"


# --- a child that may be killed -----------------------------------------------------------------------------------------------


def forked(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """(process, file that holds the lines which `work` told), of a fork that does `work(tell)`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    code = 1
    try:
        os.setsid()
        work(lambda line: os.write(write, f"{line}\n".encode()) and None)
        code = 0
    except BaseException:
        os.write(write, f"ERROR {traceback.format_exc()!r}\n".encode())
    finally:
        os._exit(code)


def finished(pid: int, told: int) -> tuple[int, list[str]]:
    """(exit status, lines that were told)."""
    with os.fdopen(told, "rb") as file:
        lines = file.read().decode().splitlines()
    return os.waitpid(pid, 0)[1], lines


def killed(work: Callable[[Callable[[str], None]], None], after: float) -> tuple[bool, list[str]]:
    """(whether it was still at it, lines told) of a child that gets SIGKILL `after` seconds from its first line."""
    pid, told = forked(work)
    first = os.read(told, 6)  # "start\n"
    assert first == b"start\n", first
    time.sleep(after)
    os.killpg(pid, signal.SIGKILL)
    status, lines = finished(pid, told)
    return os.WIFSIGNALED(status), lines


@contextmanager
def caught() -> Iterator[list[str]]:
    """Warnings as texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in found if "LayerZero" in str(w.message) or "timings store" in str(w.message)]


# --- libraries ----------------------------------------------------------------------------------------------------------------

HUNGRY = """
import os, torch
from lz_compiler.backends.base import Kernel
from lz_compiler.trust.capabilities import fitting

def run(emit, t, p):
    if os.environ.get("HUNGRY"):
        raise torch.OutOfMemoryError("no memory (planted)")
    return emit.call(torch.ops.aten.addmm.default, t["bias"], t["x"], emit.call(torch.ops.aten.permute.default, t["w"], [1, 0]))

class Hungry:
    name, devices = "hungry", ("cpu",)
    kernels = {"hungry.linear": Kernel("hungry.linear", run)}
    def version(self): return "1"
    def missing(self): return None
    def candidates(self, ctx):
        fit, refused = fitting(self, ctx)
        yield from refused
        for name in fit:
            yield ctx.candidate(self.kernels[name])
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


def kernels(quick: bool) -> Iterator[Row]:
    """Each fault of the library costs rows of the canary's report, and no later plan uses the capability."""
    known = {
        "faulty.lies": "wrong numbers in one dtype", "faulty.nan": "NaN at one length", "faulty.strided": "wrong only for strided input",
        "faulty.raises": "raises at one length", "faulty.segfault": "segfault", "faulty.hang": "hang", "faulty.exit": "os._exit",
    }  # fmt: skip
    with installed("faulty", MODULE, "Faulty", FAULTY):
        cache = WORK / "canary"
        (run,) = canary(["faulty"], cache_dir=str(cache), row_s=3.0).runs
        trust = Trust(open_store(str(cache)), environment("cpu"))
        for kernel, fault in known.items():
            row, bad = Row(f"kernel: {fault} (after `lz canary`)"), {n: v for n, v in run.bad.items() if n.startswith(f"{kernel}|")}
            for name, verdict in bad.items():
                row.add(f"{verdict.status}, quarantined: {verdict.detail[:40]}", wrong=int(name not in trust.failed))
            row.silent += int(not bad)
            yield row
        row = Row("kernel: wrong numbers in one dtype, never tried by the canary")
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU()).bfloat16(), torch.randn(6, 32).bfloat16()
        right, text = compiled(model, x, WORK / "untried", backends=["faulty"])
        row.add("measured on first use, found wrong, rejected", wrong=int(not right), silent=int("faulty.lies" not in text))
        right, text = compiled(model, x, cache, backends=["faulty"], cost_model="roofline")
        row.add("quarantined: another kernel ran", wrong=int(not right), silent=int("quarantined" not in text))
        yield row
    yield from hungry()


def hungry() -> Iterator[Row]:
    entry = {**FAULTY["kernels"]["faulty.good"], "regions": {"has": ["bias"], "transposed": False, "act": None, "binary": None}}
    row = Row("out of memory while measuring")
    with installed("hungry", HUNGRY, "Hungry", {"schema": 1, "backend": "hungry", "kernels": {"hungry.linear": entry}}):
        model, x = nn.Linear(32, 48), torch.randn(6, 32)
        os.environ["HUNGRY"] = "1"
        right, text = compiled(model, x, WORK / "hungry", backends=["hungry"])
        row.add("rejected for this plan, the others measured", wrong=int(not right), silent=int("no memory" not in text))
        del os.environ["HUNGRY"]
        open_store(str(WORK / "hungry")).clear("verdict")
        compiled(model, x, WORK / "hungry", backends=["hungry"])
        timings = open_store(str(WORK / "hungry")).ls().entries
        known = any(e.kind == "timing" and e.key.startswith("hungry.linear") for e in timings)
        row.add("not remembered: measured when there is memory", lost=int(not known))
    yield row


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
    install(site, "slow", "import time\ntime.sleep(6)\n" + HUNGRY.replace("hungry", "slow"), "Hungry")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", SLOW], env=env, capture_output=True, text=True, timeout=300, check=False)
    row.add("waited for once, then planned", wrong=int("RIGHT True" not in done.stdout), silent=int("took" not in done.stderr))
    return iter([row])


# --- the store ----------------------------------------------------------------------------------------------------------------


def timing(i: int, prefix: str = "k") -> Timing:
    return Timing(f"{prefix}{i}|{environment('cpu')['name']}", "aten.addmm", 1000 + i, i % 9, 9, None, 0.5 * i, "linear")


def filled(folder: Path, count: int) -> dict[str, Timing]:
    store, known = TimingStore.open(folder), {t.key: t for t in map(timing, range(count))}
    store.put_many(known.values())
    for i in range(count // 10):
        store.put_record("verdict", f"g{i}", {"number": i, "text": "x" * 900})
    store.close()
    return known


def corrupt(quick: bool) -> Iterator[Row]:
    """1 KiB overwritten at every KiB of the file, with zeros, with ones and with noise."""
    known = filled(WORK / "whole", 40 if quick else 200)
    number, noise = len(known) // 10, random.Random(0)
    whole = (WORK / "whole" / FILE_NAME).read_bytes()
    for name in ("zeros", "ones", "noise"):
        row = Row(f"store: 1 KiB of {name} at every 1 KiB offset")
        for offset in range(0, len(whole), 1024):
            folder = WORK / f"corrupt-{name}-{offset}"
            folder.mkdir(mode=0o700)
            block = {"zeros": b"\0" * 1024, "ones": b"\xff" * 1024}.get(name) or noise.randbytes(1024)
            (folder / FILE_NAME).write_bytes(whole[:offset] + block + whole[offset + 1024 :])
            with caught() as told:
                store = TimingStore.open(folder)
                found, records = store.get_many(known), store.get_records("verdict")
                store.put(timing(9, "after"))
            wrong = sum(known.get(key) != value for key, value in found.items())
            wrong += sum(key != f"g{v.get('number')}" or v.get("text") != "x" * 900 for key, v in records.items())
            gone = len(known) - len(found) + number - len(records)
            aside = bool(list(folder.glob("*.corrupt-*")))
            what = "moved aside and built anew" if aside else "damaged rows left out" if gone else "nothing that counts was hit"
            row.add(what, wrong=wrong, silent=int(bool(gone) and not told), lost=gone if gone and not told else 0)
            store.close()
            again = TimingStore.open(folder)
            row.lost += again.get(timing(9, "after").key) != timing(9, "after")
            again.close()
            shutil.rmtree(folder)
        yield row


def _graph() -> GraphView:
    """A small functional graph, as Inductor would hand it to the planner."""
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    w, v, x = torch.randn(64, 32), torch.randn(32, 64), torch.randn(16, 32)
    with torch.no_grad():
        gm = make_fx(lambda x, w, v: torch.relu(x @ w.t()) @ v.t(), tracing_mode="fake")(x, w, v)
    return GraphView(gm.graph, {})


def _planned(view: GraphView, store: TimingStore, **options: Any) -> int:
    chosen = Options.resolve({"cost_model": "roofline", "race": False, "backends": ["aten", "onednn"], **options})
    target = detect("cpu", store)
    plan = planning.make_plan(view, chosen, target, store, fingerprint="f", kind="inference")
    return sum(c.candidate.region.op in ("linear", "bmm", "mm") for c in plan.choices)


def _peaks(folder: Path) -> TimingStore:
    """A store that knows the machine's peaks: measuring them takes a second."""
    store = TimingStore.open(folder)
    for kind, key, value in _known_peaks:
        store.put_record(kind, key, value)
    return store


_known_peaks: list[tuple[str, str, dict[str, Any]]] = []


def planning_killed(times: int) -> Row:
    """Every acknowledged fact is there afterwards, right, and the next planner goes on."""
    row, view, noise = Row("kill -9 while planning and storing"), _graph(), random.Random(1)
    folder = WORK / "killed-planning"
    _peaks(folder).close()
    acknowledged: set[str] = set()

    for turn in range(times):

        def work(tell: Callable[[str], None], turn: int = turn) -> None:
            store = TimingStore.open(folder)
            tell("start")
            for i in range(10_000):
                store.put_many([timing(i, f"{turn}-{j}-") for j in range(20)])
                tell(timing(i, f"{turn}-0-").key)
                if i % 5 == 0:
                    assert _planned(view, store)
                store.put_record("verdict", f"{turn}-{i}", {"number": i})

        alive, lines = killed(work, noise.uniform(0, 0.5))
        errors = [line for line in lines if line.startswith("ERROR")]
        acknowledged |= set(lines) - set(errors)
        with caught() as told:
            store = TimingStore.open(folder)
            found = store.get_many(acknowledged)
        wrong = sum(t.detail != "linear" or t.ns is None for t in found.values())
        row.add(
            "killed; store whole" if alive and not told else str(errors or told)[:200], lost=len(acknowledged) - len(found), wrong=wrong
        )
        store.close()
    store = TimingStore.open(folder)
    row.wrong += int(not _planned(view, store))
    store.close()
    return row


def merging_killed(times: int) -> Row:
    """A merge is there whole, or not at all; what the store knew before is not touched."""
    row, noise, source, count = Row("kill -9 while merging"), random.Random(2), TimingStore.open(WORK / "source"), 4000
    source.put_many(timing(i, "theirs") for i in range(count))
    source.export(WORK / "theirs.jsonl")
    source.close()
    theirs = [timing(i, "theirs").key for i in range(count)]
    took = 1.0
    for turn in range(times + 1):
        folder = WORK / "killed-merging" / str(turn)
        mine = filled(folder, 50)

        def work(tell: Callable[[str], None], folder: Path = folder) -> None:
            store = TimingStore.open(folder)
            tell("start")
            begin = time.perf_counter()
            store.merge(WORK / "theirs.jsonl")
            tell(str(time.perf_counter() - begin))
            store.close()

        if turn == 0:
            pid, told = forked(work)
            took = float(finished(pid, told)[1][1])
            continue
        alive, _ = killed(work, noise.uniform(0, 1.1 * took))
        store = TimingStore.open(folder)
        there, kept = len(store.get_many(theirs)), store.get_many(mine)
        whole = there in (0, count)
        row.add(
            f"{'killed' if alive else 'done before'}: {'all' if there == count else 'nothing' if not there else 'a part'} of it there",
            lost=int(kept != mine), wrong=int(not whole),
        )  # fmt: skip
        store.merge(WORK / "theirs.jsonl")
        row.lost += count - len(store.get_many(theirs))
        store.close()
        shutil.rmtree(folder)
    return row


def baking_killed(times: int) -> Row:
    """The folder is not there, or it is whole: every file as its manifest says."""
    row, noise = Row("kill -9 while baking"), random.Random(3)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 16)
    plan = lz.solve(model, (x,), race=False, cost_model="roofline", freeze=True)

    def bake(folder: Path) -> Callable[[Callable[[str], None]], None]:
        def work(tell: Callable[[str], None]) -> None:
            tell("start")
            begin = time.perf_counter()
            lz.bake(plan, folder, model, (x,))
            tell(str(time.perf_counter() - begin))

        return work

    took = 0.0
    for turn in range(2):  # the first fills Inductor's cache
        pid, told = forked(bake(WORK / f"baked-{turn}"))
        status, lines = finished(pid, told)
        assert status == 0, lines
        took = float(lines[1])
    for turn in range(times):
        folder = WORK / "killed-baking" / str(turn)
        alive, _ = killed(bake(folder), noise.uniform(0, 1.05 * took))
        if not folder.exists():
            row.add("killed: no folder")
            continue
        try:
            check_manifest(folder)
            row.add("killed after it was there: whole" if alive else "done before: whole")
        except LayerZeroError as error:
            row.add(str(error), wrong=1)
    return row


def kills(quick: bool) -> Iterator[Row]:
    times = 5 if quick else 100
    yield planning_killed(times)
    yield merging_killed(times)
    yield baking_killed(times)


def concurrent(quick: bool) -> Iterator[Row]:
    """All start at once on one store that is not there yet: each plans, stores its own facts, and reads them back."""
    count, view, folder = 20 if quick else 200, _graph(), WORK / "concurrent"
    row, begin = Row(f"{count} planners at once on one new store"), time.time() + 3

    def planner(number: int) -> Callable[[Callable[[str], None]], None]:
        def work(tell: Callable[[str], None]) -> None:
            warnings.simplefilter("error")
            time.sleep(max(0.0, begin - time.time()))
            store = _peaks(folder)
            for i in range(5):
                store.put(timing(i, f"p{number}-"))
            assert _planned(view, store)
            assert store.path is not None, "went on in memory"
            store.close()

        return work

    children = [forked(planner(i)) for i in range(count)]
    store = TimingStore.open(folder)
    for number, child in enumerate(children):
        status, lines = finished(*child)
        found = store.get_many(timing(i, f"p{number}-").key for i in range(5))
        what = "planned, all facts stored" if status == 0 and len(found) == 5 else f"failed: {str(lines)[-160:]}"
        row.add(what, lost=5 - len(found), wrong=sum(t.kernel != "aten.addmm" for t in found.values()))
        row.lost += int(status != 0)
    row.lost += len(list(folder.glob("*.corrupt-*")))
    store.close()
    yield row


def full_disk(quick: bool) -> Iterator[Row]:
    row, view = Row("full disk (RLIMIT_FSIZE) while planning"), _graph()
    for turn, limit in enumerate((60_000, 120_000) if quick else range(40_000, 240_000, 20_000)):
        folder = WORK / f"full-{turn}"
        store = _peaks(folder)
        store.put(timing(1, "before"))
        store.close()

        def work(tell: Callable[[str], None], folder: Path = folder, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with caught() as told:
                store = TimingStore.open(folder)
                for i in range(40):
                    store.put_many(timing(j, f"{i}-") for j in range(50))
                assert _planned(view, store)
                kept = len(store.get_many(timing(j, f"{i}-").key for i in range(40) for j in range(50)))
                before = store.get(timing(1, "before").key) == timing(1, "before")
            tell(json.dumps({"kept": kept, "before": before, "told": len(told)}))

        status, lines = finished(*forked(work))
        found = json.loads(lines[0]) if status == 0 else {"kept": 0, "before": False, "told": 0}
        after = TimingStore.open(folder)
        lost = 2000 - found["kept"] + int(not found["before"]) + int(after.get(timing(1, "before").key) is None)
        after.close()
        row.add(
            "went on in memory, planned; the file is whole" if status == 0 else str(lines)[-200:], lost=lost, silent=int(found["told"] != 1)
        )
    yield row


def clock(quick: bool) -> Iterator[Row]:
    """Facts are dated ten years ahead, then the clock is set back: none is preferred or dropped for its date."""
    row, folder, real = Row("clock set back ten years"), WORK / "clock", time.time
    backend, env = backends.all_backends()["aten"], environment("cpu")

    def verdicts(status: str) -> dict[str, Any]:
        return {"capabilities": {"k": {"status": status, "shape": "", "detail": ""}}, "version": status, "digest": ""}

    store = TimingStore.open(folder)
    time.time = lambda: real() + 10 * 365 * 86400
    try:
        store.put(timing(1))
        remember(store, backend, {**env, "torch": "another"}, verdicts("failed"))
        with_future = WORK / "future.jsonl"
        other = TimingStore.open(WORK / "clock-other")
        other.put_many([Timing(timing(2).key, "aten.addmm", 1, 0, 99, None, 0.0, "linear")])
        other.export(with_future)
    finally:
        time.time = real
    remember(store, backend, env, verdicts("passed"))
    store.put(timing(2))
    found = last_run(store, backend, env)
    row.add("the newest canary run is told by its number, not its date", wrong=int((found or {}).get("version") != "passed"))
    row.add("a fact from the future is still a fact", lost=int(store.get(timing(1).key) != timing(1)))
    with_future.write_text(with_future.read_text().replace(facts.machine(), "elsewhere"))
    merged = store.merge(with_future)
    row.add(
        "another machine's newer fact does not replace this one's, and is named", wrong=int(store.get(timing(2).key) != timing(2)),
        silent=int(len(merged.conflicts) != 1),
    )  # fmt: skip
    yield row


# --- the table ----------------------------------------------------------------------------------------------------------------

GROUPS: tuple[Callable[[bool], Iterator[Row]], ...] = (kernels, slow_import, corrupt, kills, concurrent, full_disk, clock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 kills instead of 100, 20 planners instead of 200")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--out", help="write the page to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    _known_peaks.extend(
        [("peaks", "|".join(f"{k}={v}" for k, v in sorted(environment("cpu").items())),
          {"bandwidth": 2e10, "flops": {"float32": 1e11, "bfloat16": 1e11, "float16": 1e10, "transcendental": 1e9}, "launch_ns": 1000})]
    )  # fmt: skip
    start, rows = time.perf_counter(), []
    lines = ["| fault | times | what happened | lost | wrong used | reported |", "|---|--:|---|--:|--:|---|"]
    print("\n".join(lines))
    for group in (g for g in GROUPS if options.only in g.__name__):
        for row in group(options.quick):
            rows.append(row)
            print(row.cells(), flush=True)
    good, cost = all(not (row.lost or row.wrong or row.silent) and row.times for row in rows), ""
    if options.only in "overhead":
        cost, cheap = overhead(WORK / "bert")
        good = good and cheap
        print(cost)
    minutes = (time.perf_counter() - start) / 60
    if options.out:
        command = " ".join(["python benchmarks/faults.py", *(["--quick"] if options.quick else [])])
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {environment('cpu')['name']}, {os.cpu_count()} cores"
        text = [f"`{command}` on {time.strftime('%Y-%m-%d')}: {versions}; {minutes:.1f} minutes.", *lines, *(row.cells() for row in rows)]
        Path(options.out).write_text("\n".join(["# Planted faults, and what happened", "", text[0], "", *text[1:], "", COST, "", cost, ""]))
    shutil.rmtree(WORK, ignore_errors=True)
    print(f"{'nothing' if good else 'SOMETHING'} was lost, wrong or unreported ({minutes:.1f} minutes)")
    return 0 if good else 1


COST = "## What the checks cost a warm compile (two-layer BERT of transformers, stored timings, fresh process)"

if __name__ == "__main__":
    raise SystemExit(main())
