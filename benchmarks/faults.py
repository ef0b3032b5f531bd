"""Planted faults, and what happened: kernels that lie, crash and hang, damaged stores, kills, full disks, clocks.

    python benchmarks/faults.py [--quick] [--only WORD] [--out FILE.md]

Every fault is real: a library with such kernels is installed through its entry point, processes are killed with SIGKILL, files are
overwritten, the disk's limit is RLIMIT_FSIZE. `lost`: facts or files gone without a word, or acknowledged and not there; `wrong used`:
a wrong number that reached a plan or an output; `reported`: faults that a person is told of, where there is something to tell.
Needs POSIX and the `test` extra. Exit code 1 if anything was lost, wrong or unreported. Also: what all checks cost a warm compile.
"""

# ruff: noqa: I001  (planting sets the environment before torch is imported)
from __future__ import annotations

from planting import WORK, Row, caught, finished, forked, killed, spread

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checks_overhead import overhead
from faults_kernels import kernels, slow_import
from torch import nn

import lz_compiler as lz
from lz_compiler import backends, facts, planning
from lz_compiler.capture import GraphView
from lz_compiler.deploy.warming import check_manifest
from lz_compiler.errors import LayerZeroError
from lz_compiler.options import Options
from lz_compiler.target import detect, environment
from lz_compiler.timings import FILE_NAME, Timing, TimingStore
from lz_compiler.trust.verdicts import last_run, remember

torch.set_num_threads(1)  # a fork does not take OpenMP's threads along


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
        row, total = Row(f"store: 1 KiB of {name} at every 1 KiB offset"), 0
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
            total += gone
            kept = "built anew with what could be read" if found else "nothing could be read, begun anew"
            what = kept if aside else "damaged rows left out" if gone else "nothing that counts was hit"
            row.add(what, wrong=wrong, silent=int(bool(gone) and not told), lost=gone if gone and not told else 0)
            store.close()
            again = TimingStore.open(folder)
            row.lost += again.get(timing(9, "after").key) != timing(9, "after")
            again.close()
            shutil.rmtree(folder)
        share = 100 * total / row.times / (len(known) + number)
        row.fault += f": on average {share:.1f} % of the facts gone, each time with a warning"
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


THEIRS = [timing(i, "theirs") for i in range(4000)]


def merging(folder: Path, limit: int | None = None) -> tuple[dict[str, Timing], Callable[[Callable[[str], None]], None]]:
    """(what a new store knows, the work of merging another into it). With a limit to a file's size."""
    mine, source = filled(folder, 50), WORK / "theirs.jsonl"
    if not source.exists():
        store = TimingStore.open(WORK / "source")
        store.put_many(THEIRS)
        store.export(source)
        store.close()

    def work(tell: Callable[[str], None]) -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with caught() as told:
            store = TimingStore.open(folder)
            tell("start")
            begin = time.perf_counter()
            store.merge(source)
        tell(str(time.perf_counter() - begin))
        tell(str(len(told)))
        store.close()

    return mine, work


def merged(folder: Path, mine: dict[str, Timing]) -> tuple[str, int, int]:
    """(how much of it is there, lost, wrong) in a store into which another was merged, or not; and merging goes on from there."""
    store = TimingStore.open(folder)
    keys = [t.key for t in THEIRS]
    there, kept = len(store.get_many(keys)), store.get_many(mine)
    store.merge(WORK / "theirs.jsonl")
    lost = int(kept != mine) + len(keys) - len(store.get_many(keys))
    store.close()
    shutil.rmtree(folder)
    return "all" if there == len(keys) else "nothing" if not there else "a part", lost, int(there not in (0, len(keys)))


def merging_killed(times: int) -> Row:
    """A merge is there whole, or not at all; what the store knew before is not touched."""
    row, root = Row("kill -9 while merging"), WORK / "killed-merging"
    took = float(finished(*forked(merging(root / "first")[1]))[1][1])
    for turn, after in enumerate(spread(times, took, random.Random(2))):
        mine, work = merging(root / str(turn))
        alive, _ = killed(work, after)
        there, lost, wrong = merged(root / str(turn), mine)
        row.add(f"{'killed' if alive else 'done before'}: {there} of it there", lost=lost, wrong=wrong)
    return row


def baking(plan: Any, folder: Path, limit: int | None = None) -> Callable[[Callable[[str], None]], None]:
    def work(tell: Callable[[str], None]) -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        tell("start")
        begin = time.perf_counter()
        lz.bake(plan, folder, *_small())
        tell(str(time.perf_counter() - begin))

    return work


def _small() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), (torch.randn(4, 16),)


def baked_before() -> tuple[Any, float, int]:
    """(a plan, seconds to bake it with warm caches, bytes of the largest file)."""
    plan, took = lz.solve(*_small(), race=False, cost_model="roofline", freeze=True), 0.0
    folders = [WORK / f"baked-{time.monotonic_ns()}" for _ in range(2)]  # the first fills Inductor's cache
    for folder in folders:
        status, lines = finished(*forked(baking(plan, folder)))
        assert status == 0, lines
        took = float(lines[1])
    return plan, took, max(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())


def whole(folder: Path) -> str | None:
    """What is wrong with a baked folder, or None."""
    try:
        check_manifest(folder)
    except LayerZeroError as error:
        return str(error)
    return None


def baking_killed(times: int) -> Row:
    """The folder is not there, or it is whole: every file as its manifest says."""
    row, (plan, took, _) = Row("kill -9 while baking"), baked_before()
    for turn, after in enumerate(spread(times, took, random.Random(3))):
        folder = WORK / "killed-baking" / str(turn)
        alive, _ = killed(baking(plan, folder), after)
        if not folder.exists():
            row.add("killed: no folder")
            continue
        why = whole(folder)
        row.add(why or ("killed after it was there: whole" if alive else "done before: whole"), wrong=int(why is not None))
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
    yield planning_on_full_disk(quick)
    yield merging_on_full_disk(quick)
    yield baking_on_full_disk(quick)


def merging_on_full_disk(quick: bool) -> Row:
    row, folder = Row("full disk (RLIMIT_FSIZE) while merging"), WORK / "full-merging"
    for limit in (60_000, 300_000) if quick else range(60_000, 660_000, 60_000):
        mine, work = merging(folder, limit)
        status, lines = finished(*forked(work))
        there, lost, wrong = merged(folder, mine)
        what = f"went on in memory; {there} of it in the file" if status == 0 else str(lines)[-200:]
        row.add(what, lost=lost, wrong=wrong, silent=int(status == 0 and there != "all" and lines[2] != "1"))
    return row


def baking_on_full_disk(quick: bool) -> Row:
    """The folder is not there, and an error says why."""
    row, (plan, _, largest) = Row("full disk (RLIMIT_FSIZE) while baking"), baked_before()
    for turn in range(2 if quick else 6):
        folder = WORK / "full-baking" / str(turn)
        status, lines = finished(*forked(baking(plan, folder, largest * (turn + 1) // 8)))
        half = list(folder.parent.glob(f".{folder.name}.*"))
        error = re.search(r"(\w+(?:Error|Exception)): [^\n]*$", lines[-1].replace("\\n", "\n").rstrip("\"'\n ")) if status else None
        if folder.exists():
            why = whole(folder)
            row.add(why or "it was enough: whole", wrong=int(why is not None))
        else:
            row.add(f"no folder, {error[1] if error else str(lines)[-200:]}", wrong=len(half), silent=int(error is None))
    return row


def planning_on_full_disk(quick: bool) -> Row:
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
    return row


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
