"""Running every declared capability of the kernel libraries on this machine, and what came of it.

Each backend is tried in a process of its own (canary_worker.py), against float64, for NaN, in each layout, for determinism and,
on a GPU, inside a CUDA graph. What fails is kept in the timings store, and no plan uses it (verdicts.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..backends import all_backends
from ..backends.base import Backend
from ..errors import CapabilityError, OptionError, unknown
from ..target import environment
from ..timings import TimingStore, user_store
from .canary_worker import PATIENCE, START_S, lines
from .capabilities import descriptor
from .verdicts import BAD, last_run, remember

DEVICES = ("cpu", "cuda")
ROW_S = 60.0  # a kernel that is compiled first has to fit
TOTAL_S = 1800.0  # on a GPU most of it goes into compiling Triton kernels
MAX_JOBS = 4  # unless asked for: each is a process with torch in it
_LOST = "passed -> "
_ORDER = ("not_offered", "passed", "failed", "timed_out", "crashed")  # of one capability at several shapes, the worst counts

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one capability (`kernel|operation|dtype|layout|feature`): passed, failed, crashed, timed_out, or not_offered by
    the backend's code. `shape` and `detail` are of the first shape where it went worst; `tried` counts shapes and tunings."""

    status: str
    shape: str
    detail: str
    tried: int


@dataclass(frozen=True, slots=True)
class BackendRun:
    """One backend on one device. `skipped` says why nothing was tried, `incomplete` why not everything was."""

    backend: str
    device: str
    version: str
    digest: str
    seconds: float
    capabilities: Mapping[str, Verdict]
    skipped: str = ""
    incomplete: str = ""
    changes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def count(self) -> dict[str, int]:
        """Capabilities declared, tried, and by status."""
        found = Counter(v.status for v in self.capabilities.values())
        return {"declared": len(self.capabilities), "tried": len(self.capabilities) - found["not_offered"],
                **{status: found[status] for status in _ORDER[1:]}}  # fmt: skip

    @property
    def bad(self) -> dict[str, Verdict]:
        return {name: v for name, v in self.capabilities.items() if v.status in BAD}

    @property
    def idle(self) -> str:
        """Why nothing of what is declared was offered: the commonest reason. Empty where something was tried."""
        reasons = Counter(v.detail for v in self.capabilities.values())
        return reasons.most_common(1)[0][0] if reasons and not self.count()["tried"] else ""


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """`str(report)` for people, `to_json()` for programs; `ok` is False where something failed or was not finished."""

    runs: tuple[BackendRun, ...]

    @property
    def ok(self) -> bool:
        return not any(run.bad or run.incomplete for run in self.runs)

    @property
    def lost(self) -> tuple[str, ...]:
        """Of `diff`, what passed in the last stored run and does not now, whatever the reason."""
        return tuple(line for run in self.runs for line in run.changes if line.startswith(_LOST))

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps({"ok": self.ok, "runs": [_described(run) for run in self.runs]}, indent=indent, sort_keys=True)

    def __str__(self) -> str:
        head = ("backend", "device", "declared", "tried", "passed", "failed", "crashed", "hung", "seconds")
        widths = (16, 8, 10, 8, 8, 8, 8, 6, 9)
        out = ["".join(f"{text:<{w}}" if i < 2 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(head, widths, strict=True)))]
        for run in self.runs:
            if run.skipped:
                out.append(f"{run.backend:<16}{run.device:<8}{run.skipped}"[:100])
                continue
            n = run.count()
            cells = (n["declared"], n["tried"], n["passed"], n["failed"], n["crashed"], n["timed_out"])
            out.append(f"{run.backend:<16}{run.device:<8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths[2:], strict=False))
                       + f"{run.seconds:>9.1f}")  # fmt: skip
        for run in self.runs:
            out += textwrap.wrap(f"{run.backend}: not complete: {run.incomplete}", 100) if run.incomplete else []
            out += textwrap.wrap(f"{run.backend}: nothing is offered: {run.idle}", 100) if run.idle else []
            for name, verdict in run.bad.items():
                out += [f"{verdict.status:<10}{name}"[:100], f"          at {verdict.shape}: {verdict.detail}"[:100]]
        return "\n".join(out)

    def diff(self) -> str:
        """What changed since the last stored run of each backend on this device."""
        return "\n".join(line for run in self.runs for line in run.changes) or "nothing changed"


def canary(
    backends: Iterable[str] | None = None, *, devices: Iterable[str] | None = None, cache_dir: str | None = None, row_s: float = ROW_S,
    total_s: float = TOTAL_S, jobs: int | None = None, progress: Progress | None = None,
) -> CanaryReport:  # fmt: skip
    """Try every declared capability of the named backends on the named devices, cpu and cuda (default: all), and keep the verdicts.

    `row_s`, `total_s`: seconds for one kernel on one shape, and for one backend; `jobs`: processes at once, by default one for each core,
    at most 4, and one on a GPU.
    `progress(label, done, regions)` is told as it goes.
    OptionError for a backend or a device that does not exist, and for a wrong number. A descriptor that cannot be read is an incomplete
    run of its backend.
    """
    known = all_backends()
    for label, names in (("backends", backends), ("devices", devices)):
        if isinstance(names, str):  # its letters would be names
            raise OptionError(f"{label} is {names!r}. Give a list: [{names!r}].")
    wanted = list(known) if backends is None else list(backends)
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise OptionError(f"jobs is {jobs!r}. Give 1 or more.")
    for label, seconds in (("row_s", row_s), ("total_s", total_s)):
        if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
            raise OptionError(f"{label} is {seconds!r}. Give a number of seconds above 0.")
    for name in wanted:
        if name not in known:
            raise OptionError(unknown("backend", name, known))
    asked = DEVICES if devices is None else tuple(devices)
    for device in asked:
        if device not in DEVICES:
            raise OptionError(unknown("device", device, DEVICES))
    store, runs = user_store(cache_dir), []
    for name in wanted:
        for device in (d for d in known[name].devices if d in asked):
            try:
                run = _run(known[name], device, row_s, total_s, jobs or (1 if device == "cuda" else _cores()), progress)
            except CapabilityError as error:
                run = BackendRun(name, device, "", "", 0.0, {}, incomplete=str(error))
            runs.append(_compared(store, known[name], run) if device == "cpu" or torch.cuda.is_available() else run)
    return CanaryReport(tuple(runs))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_JOBS)


def _compared(store: TimingStore, backend: Backend, run: BackendRun) -> BackendRun:
    """The run with what it changes, which is kept for the next one. A library that was never here is no change."""
    env = environment(run.device)
    run = replace(run, environment=env, date=time.strftime("%Y-%m-%d"))
    before, value = last_run(store, backend, env), _described(run)
    if run.skipped and (before is None or before.get("skipped") == run.skipped):
        return run
    if run.capabilities or run.skipped:  # what was not reached is as good as never tried
        remember(store, backend, env, value)
    return replace(run, changes=tuple(_changes(before, value)))


def _described(run: BackendRun) -> dict[str, Any]:
    return {**asdict(run), "changes": list(run.changes), "counts": run.count()}


def _run(backend: Backend, device: str, row_s: float, total_s: float, jobs: int, progress: Progress | None) -> BackendRun:
    known = descriptor(backend)
    why = "no device" if device == "cuda" and not torch.cuda.is_available() else backend.missing() or ""
    why = why or ("" if known else "no descriptor: nothing is declared")
    if why or known is None:
        return BackendRun(backend.name, device, "", known.digest if known else "", 0.0, {}, why)
    verdicts: dict[str, Verdict] = {}
    start, lock = time.monotonic(), threading.Lock()
    done: set[int] = set()
    # The worker finds the same modules and entry points as this process, and no compiler pool outlives its children.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env |= {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))} if jobs > 1 else {}  # or they wait for each other's cores

    def begin(job: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lz_compiler.trust.canary_worker", backend.name, device, str(row_s), str(total_s)]
        return subprocess.Popen([*command, str(job), str(jobs)], stdout=subprocess.PIPE, env=env, start_new_session=True)

    def listen(worker: subprocess.Popen[bytes]) -> str:
        """Enter what a worker finds; returns why it did not come to its end, or nothing."""
        incomplete, regions = "the worker ended early", 0
        assert worker.stdout is not None
        for message in lines(worker.stdout.fileno(), lambda: max(PATIENCE * row_s, START_S) + 30):
            if message is None:
                incomplete = "the worker does not answer"
            elif "end" in message:
                incomplete = message["end"]
            elif "regions" in message:
                regions = message["regions"]
            else:
                with lock:
                    _enter(verdicts, message)
                    done.add(message["at"][0])
                    if progress:
                        progress(f"{backend.name} on {device}", len(done), regions)
        return incomplete

    def stop(worker: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):  # a child that hangs, a compiler that it started
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    with ThreadPoolExecutor(jobs) as pool, ExitStack() as running:
        workers = [begin(job) for job in range(jobs)]
        for worker in workers:
            running.callback(stop, worker)
        incomplete = "; ".join(dict.fromkeys(filter(None, pool.map(listen, workers))))
    return BackendRun(backend.name, device, backend.version(), known.digest, time.monotonic() - start, verdicts, "", incomplete)


def _enter(verdicts: dict[str, Verdict], row: Mapping[str, Any]) -> None:
    """One row into its capability's verdict."""
    name, new = row["capability"], Verdict(row["status"], row["shape"], row["detail"], int(row["status"] != "not_offered"))
    old = verdicts.get(name)
    if old is not None:
        worst = new if _ORDER.index(new.status) > _ORDER.index(old.status) else old
        new = Verdict(worst.status, worst.shape, worst.detail, old.tried + new.tried)
    verdicts[name] = new


def _changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    label = f"{now['backend']} on {now['device']}"
    if before is None:
        return [f"{label}: first run"]
    out = [f"{label}: {what} {before.get(what)} -> {now[what]}" for what in ("version", "digest") if before.get(what) != now[what]]
    out += [f"{label}: {now['skipped']}"] if now["skipped"] else []
    for name in sorted({*before["capabilities"], *now["capabilities"]}):
        was, is_now = (_status(side, name) for side in (before, now))
        if was != is_now:
            out.append(f"{was} -> {is_now}: {name}")
    return out


def _status(run: Mapping[str, Any], name: str) -> str:
    absent = "skipped" if run.get("skipped") else "not reached" if run.get("incomplete") else "not declared"
    return str(run["capabilities"].get(name, {}).get("status", absent))
