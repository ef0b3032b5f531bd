"""Backends of packages that may be absent, half installed, of another version, or break when they are imported.

Listing backends reads only what pip left on disk. The package is imported when the first region fits one of its kernels: first in a
process of its own, since an import may hang or crash, then here. Whatever goes wrong is a Rejection with the reason.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import first_line, told
from ..facts import machine
from ..timings import user_store
from ..trust.capabilities import installed_version
from ..types import Candidate, Rejection
from .base import Described, Kernel, SelectionContext

IMPORT = "import"  # kind of the records that say that an import was tried, and went well
IMPORT_S = 60.0  # an import that takes longer hangs
_TRY = "import sys; sys.path[:] = sys.argv[2:]; __import__(sys.argv[1]); print('imported')"


@dataclass(frozen=True, slots=True)
class Library:
    """An optional package: its name for pip, the module that kernels use, and how to get it. `builds`: a kernel's first call on a
    machine compiles it, which can take minutes."""

    distribution: str
    module: str
    install: str
    builds: bool = False

    def version(self) -> str:
        """The installed version, or `absent`."""
        return installed_version(self.distribution) or "absent"

    def missing(self) -> str | None:
        """Why it cannot be used as far as files tell, or None. Imports nothing."""
        return _missing(self)

    def broken(self, cache_dir: str | None = None) -> str | None:
        """Why the module cannot be imported, or None once it is. That it can is remembered for this version, torch and Python."""
        return None if self.module in sys.modules else _import_error(self.module, f"{self.distribution}-{self.version()}", cache_dir)

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
def _import_error(module: str, package: str, cache_dir: str | None) -> str | None:
    why = remembered(f"{module}-{package}", lambda: tried_elsewhere(module, _TRY, module), cache_dir)
    if why is not None:
        return why
    try:
        import_module(module)
    except Exception as error:  # it is foreign code, and may raise anything
        return f"importing {module} raises {told(error)}"
    return None


def remembered(what: str, trial: Callable[[], str | None], cache_dir: str | None) -> str | None:
    """What a trial says: nothing once it went well, on this machine with this torch and Python. A failure is tried again."""
    store = user_store(cache_dir)
    key = f"{what}-torch{torch.__version__}-py{sys.version_info.major}.{sys.version_info.minor}-{machine()}"
    if store.get_record(IMPORT, key) is not None:
        return None
    why = trial()
    if why is None:
        store.put_record(IMPORT, key, {})
    return why


def tried_elsewhere(what: str, code: str, *args: str) -> str | None:
    """Why a fresh process cannot import something, or None. `code` gets `args` and then this process' path."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *args, *sys.path], capture_output=True, text=True, errors="replace", timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing {what} takes more than {IMPORT_S:.0f} s"
    if done.returncode == 0 and done.stdout.rstrip().endswith("imported"):
        return None
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"importing {what} ends its process ({how}): {first_line(done.stderr.strip().rpartition(chr(10))[2])}"


class LibraryBackend(Described):
    """What such backends share. They say `name`, `devices`, `kernels`, `library`, and in `offers` what data cannot say."""

    library: Library

    def version(self) -> str:
        return self.library.version()

    def missing(self) -> str | None:
        return self.library.missing()

    def broken(self, cache_dir: str | None) -> str | None:
        return self.library.broken(cache_dir)


def at_last_key(ctx: SelectionContext, kernel: Kernel, **extra: Any) -> Candidate | Rejection:
    """A candidate where the predicate is what these libraries call causal: the last query sees the last key, the one before it one key
    less."""
    p = ctx.params
    if p["causal"]:
        fits = p["square"] if p["dynamic_rows"] else p["shift"] == p["keys"] - p["queries"] and p["queries"] <= p["keys"]
    else:
        fits = not (p["window"] or p["shift"])
    return ctx.candidate(kernel, **extra) if fits else ctx.reject(kernel.name, "mask", "a causal mask or window must end at the last key")


def like_query(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """An attention's result in q's sizes, in memory order (B, Q, H, D)."""
    batch, heads, length, head = q.shape
    return q.new_empty((batch, length, heads, head)).transpose(1, 2)
