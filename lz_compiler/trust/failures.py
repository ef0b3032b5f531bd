"""Failures that baked files report: read from the cache folder, put into quarantine, and removed.

A baked file runs without LayerZero. What a kernel in it raises is written there as one JSON file in the folder `failures` of the cache
folder (deploy/baked_template.txt), whole or not at all. Whoever plans next takes it over; a report of another torch or device is
left for a planner that runs there. Files are read as anybody's: plain, of limited size and number, every field's type.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import backends, cache_folder
from ..target import environment
from ..timings import TimingStore
from .verdicts import hardware

KIND = "quarantine"
FOLDER, SUFFIX, DAMAGED = "failures", ".json", ".damaged"
VERSION = 1
MAX_FILES, MAX_BYTES, MAX_KERNELS, MAX_TEXT = 256, 1 << 16, 64, 1000
WORD = re.compile(r"[\w.+:<>-]{1,100}")  # of a kernel, an operation, a dtype
SAME = {"cpu": ("torch", "cpu_capability"), "cuda": ("torch", "cuda", "name")}  # what a baked file compares when it is loaded


@dataclass(frozen=True, slots=True)
class Failed:
    """A kernel of some version, of a library of some version, that raised in a graph."""

    kernel: str
    version: str
    library: str
    op: str
    dtype: str

    def capability(self, suffix: str) -> str:
        return f"{self.kernel}#{self.version}|{self.library}|{self.op}|{self.dtype}|{suffix}"


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What a baked file wrote: what raised, where, and for which environment the file was made."""

    failed: tuple[Failed, ...]
    error: str
    cell: str
    plan: str
    environment: Mapping[str, str]

    @property
    def here(self) -> bool:
        """Whether it speaks of this machine's device and torch, and of kernels that are known here."""
        device = self.environment["device"]
        if device == "cuda" and not torch.cuda.is_available():
            return False
        own = environment(device)
        known = all(f.kernel in backends.owners() for f in self.failed)
        return known and all(self.environment.get(name) == own.get(name) for name in SAME[device])

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Its rows of the quarantine."""
        suffix = hardware(environment(self.environment["device"]))
        for f in self.failed:
            value = {"kernel": f.kernel, "op": f.op, "dtype": f.dtype, "graph": f"baked plan {self.plan}, {self.cell}", "error": self.error}
            yield f.capability(suffix), value


def take(store: TimingStore) -> None:
    """Put what baked files reported into the store's quarantine. A file that is no report is set aside with a warning."""
    folder = None if store.folder is None else store.folder / FOLDER
    if folder is None or not folder.is_dir():
        return
    try:
        cache_folder.check_plain(folder)
        with os.scandir(folder) as entries:
            names = sorted(itertools.islice((e.name for e in entries if e.name.endswith(SUFFIX) and e.name[0] != "."), MAX_FILES))
    except OSError as error:
        warnings.warn(f"reports of baked files in {folder} are not read: {error}.", stacklevel=2)
        return
    for path in map(folder.joinpath, names):
        try:
            report = read(path)
        except FileNotFoundError:  # another planner was faster
            continue
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{path.name!r:.80} in {folder} is no report of a baked file ({error!r:.200}): set aside.", stacklevel=2)
            with suppress(OSError):
                path.rename(path.with_name(path.name + DAMAGED))
            continue
        if report.here:
            for key, value in report.records():
                store.put_record(KIND, key, value)
            with suppress(OSError):  # a folder that is only read: it is taken again by the next process
                path.unlink()


def read(path: Path) -> FailureReport:
    """One report. OSError, ValueError, KeyError or the like for anything else."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        cache_folder.check_open(file.fileno(), path)
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    data = json.loads(text)
    if data["layerzero_failure"] != VERSION:
        raise ValueError("of another version")
    if not 1 <= len(data["failed"]) <= MAX_KERNELS or not isinstance(data["failed"], list):
        raise ValueError("no kernels, or too many")
    failed = tuple(Failed(*(_word(row[f], spaces=f == "library") for f in Failed.__slots__)) for row in data["failed"])
    env = {_word(k): _line(v) for k, v in data["environment"].items()}
    if env["device"] not in SAME or len(env) > MAX_KERNELS:
        raise ValueError("of no known device")
    return FailureReport(failed, _line(data["error"]), _word(data["cell"]), _word(data["plan"]), env)


def _word(value: object, spaces: bool = False) -> str:
    if not isinstance(value, str) or not WORD.fullmatch(value.replace(" ", "_") if spaces else value):
        raise ValueError(f"{value!r:.40} is no name")
    return value


def _line(value: object) -> str:
    """A text as one line, without what a terminal would obey."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError("a text is too long, or none")
    return "".join(c for c in " ".join(value.split()) if c.isprintable())
