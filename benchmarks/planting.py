"""What the planted faults of faults.py share. It sets the environment: import it before torch."""

from __future__ import annotations

import os
import random
import select
import signal
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

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # children of a fork must find no pool of workers
WORK = Path(tempfile.mkdtemp(prefix="layerzero-faults-"))
os.environ["LAYERZERO_CACHE_DIR"] = str(WORK / "cache")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(WORK / "inductor")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


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


def killed(work: Callable[[Callable[[str], None]], None], after: float | None) -> tuple[bool, list[str]]:
    """(whether it was still at it, lines told) of a child that gets SIGKILL `after` seconds from its first line; None: at its second."""
    pid, told = forked(work)
    first = os.read(told, 6)  # "start\n"
    assert first == b"start\n", first
    if after is None:
        select.select([told], [], [])
    time.sleep(after or 0.0)
    os.killpg(pid, signal.SIGKILL)
    status, lines = finished(pid, told)
    return os.WIFSIGNALED(status), lines


def spread(times: int, took: float, noise: random.Random) -> Iterator[float | None]:
    """When to kill something that takes `took` seconds: all over it and a little beyond, and the last time just after it is done."""
    for turn in range(times - 1):
        yield (turn + noise.random()) / (times - 1) * 1.1 * took
    yield None


@contextmanager
def caught() -> Iterator[list[str]]:
    """Warnings as texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in found if "LayerZero" in str(w.message) or "timings store" in str(w.message)]
