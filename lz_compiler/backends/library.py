"""Backends of packages that may be absent, half installed, of another version, or break when they are imported.

Listing backends reads only what pip left on disk. The package is imported when the first region fits one of its kernels: first in a
process of its own, since an import may hang or crash, then here. Whatever goes wrong is a Rejection with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..trust.capabilities import fitting, installed_version
from ..types import Candidate, Rejection
from .base import Kernel, SelectionContext

IMPORT_S = 60.0  # an import that takes longer hangs
_TRY = "import sys; sys.path[:] = sys.argv[2:]; __import__(sys.argv[1]); print('imported')"


@dataclass(frozen=True, slots=True)
class Library:
    """An optional package: its name for pip, the module that kernels use, and how to get it."""

    distribution: str
    module: str
    install: str

    def version(self) -> str:
        """The installed version, or `absent`."""
        return installed_version(self.distribution) or "absent"

    def missing(self) -> str | None:
        """Why it cannot be used as far as files tell, or None. Imports nothing."""
        return _missing(self)

    def broken(self) -> str | None:
        """Why the module cannot be imported, or None once it is. That it can is remembered on disk for this version, torch and Python."""
        return None if self.module in sys.modules else _import_error(self.module, f"{self.distribution}-{self.version()}")

    def load(self, module: str = "") -> Any:
        """The module, or another one of the package. For kernels, which run only after `broken` said None."""
        return import_module(module or self.module)


@functools.cache
def _missing(library: Library) -> str | None:
    top = library.module.partition(".")[0]
    try:
        found = top in sys.modules or find_spec(top) is not None
    except (ImportError, ValueError) as error:
        return f"{top} is half installed: {error}"
    if found and installed_version(library.distribution) is not None:
        return None
    if found or installed_version(library.distribution) is not None:
        lacks = f"there is no module {top}" if not found else f"its metadata ({library.distribution}) or the version in it is missing"
        return f"{library.distribution} is half installed: {lacks}; reinstall it: {library.install}"
    return f"{library.distribution} is not installed: {library.install}"


@functools.cache
def _import_error(module: str, package: str) -> str | None:
    known = _remembered(f"{module}-{package}")
    if not known.exists():
        why = _tried_elsewhere(module)
        if why is not None:
            return why
        with contextlib.suppress(OSError):  # a read-only cache: tried again in the next process
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
    try:
        import_module(module)
    except Exception as error:  # it is foreign code, and may raise anything
        return f"importing {module} raises {type(error).__name__}: {_line(str(error))}"
    return None


def _remembered(what: str) -> Path:
    import platformdirs

    from ..options import Options

    folder = Path(Options.resolve().cache_dir or platformdirs.user_cache_dir("layerzero")).expanduser() / "imports"
    return folder / re.sub(r"[^\w.+-]", "_", f"{what}-torch{torch.__version__}-py{sys.version_info.major}.{sys.version_info.minor}")


def _tried_elsewhere(module: str) -> str | None:
    """Why a fresh process cannot import the module, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY, module, *sys.path], capture_output=True, text=True, errors="replace", timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing {module} takes more than {IMPORT_S:.0f} s"
    if done.returncode == 0 and done.stdout.rstrip().endswith("imported"):
        return None
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"importing {module} ends its process ({how}): {_line(done.stderr.strip().rpartition(chr(10))[2])}"


def _line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no message"


class LibraryBackend:
    """What such backends share. They say `name`, `devices`, `kernels`, `library`, and in `offers` what data cannot say."""

    name: str
    devices: tuple[str, ...]
    kernels: Mapping[str, Kernel]
    library: Library

    def version(self) -> str:
        return self.library.version()

    def missing(self) -> str | None:
        return self.library.missing()

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        fit, refused = fitting(self, ctx)
        yield from refused
        why = self.library.broken() if fit else None
        for name in fit:
            if why is not None:
                yield ctx.reject(name, "library_import", why)
            else:
                yield from self.offers(ctx, name)

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        """The candidates of one kernel whose declaration allows the region."""
        yield ctx.candidate(self.kernels[name])


def sees_last_keys(ctx: SelectionContext) -> bool:
    """Whether the predicate is what these libraries call causal: the last query sees the last key, the one before it one key less."""
    p = ctx.params
    if p["causal"] and p["dynamic_rows"]:
        return bool(p["square"])
    return bool(p["shift"] == p["keys"] - p["queries"] and p["queries"] <= p["keys"]) if p["causal"] else not (p["window"] or p["shift"])
