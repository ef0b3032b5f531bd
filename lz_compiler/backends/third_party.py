"""Backends of third parties: classes that installed packages register under the entry points `lz_compiler.backends`.

Nothing of a package is imported before its backend is asked for something, which an allow-list without it never does. Then it is tried
once in a process of its own, since an import may hang, crash or end the process, and only what proved to be a backend is made here.
Whatever goes wrong is a Rejection with the reason: it costs that library, and not the plan.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from ..errors import CapabilityError, told
from ..types import Candidate, Rejection
from .base import Backend, Kernel, SelectionContext
from .library import remembered, tried_elsewhere

GROUP = "lz_compiler.backends"
SLOW_S = 5.0  # in which a third party's library should have been imported
_TRY = (  # the package first: what breaks then does so before torch is there
    "import sys; name, value, *sys.path = sys.argv[1:]; __import__(value.partition(':')[0]); "
    "from lz_compiler.backends import third_party; third_party.try_out(name, value)"
)
FOREIGN = (Exception, SystemExit)  # what foreign code may raise: anything, but for the user's own interrupt


class ThirdParty:
    """A registered backend, imported when it is first asked; `fault` says why it cannot be used, once that is known.

    `taken`: names of kernels that are LayerZero's own. `loaded` is called when the package has been imported.
    """

    def __init__(self, entry: EntryPoint, taken: Collection[str], loaded: Callable[[], object]) -> None:
        self.name, self.entry, self.taken = entry.name, entry, taken
        self.fault: str | None = None
        self.is_loaded = False
        self._loaded = loaded
        self._backend: Backend | None = None
        self._version, self._kernels, self._devices = "unusable", dict[str, Kernel](), ("cpu", "cuda")

    def load(self, cache_dir: str | None = None) -> Backend | None:
        """The package's backend, or None with `fault` set. Each process tries once."""
        if not self.is_loaded:
            self.is_loaded = True
            package = f"{self.entry.dist.name}-{self.entry.dist.version}" if self.entry.dist else "?"
            what = f"{self.entry.name}={self.entry.value}-{package}"
            value = self.entry.value
            trial = lambda: tried_elsewhere(value, _TRY, self.entry.name, value)  # noqa: E731  it has no name of its own
            self.fault = remembered(what, trial, cache_dir) or self._make()
            self._loaded()
        return self._backend

    def _make(self) -> str | None:
        start = time.monotonic()
        try:
            backend = self.entry.load()()
            fault = lacking(backend, self.name, self.taken)
            version = "" if fault else backend.version()
        except FOREIGN as error:
            return f"{self.entry.value} raises {told(error)}"
        if time.monotonic() - start > SLOW_S:
            warnings.warn(f"LayerZero: the backend {self.name!r} took {time.monotonic() - start:.1f} s to import", stacklevel=2)
        if fault is None:
            self._backend, self._version = backend, version
            self._kernels, self._devices = dict(backend.kernels), tuple(backend.devices)
        return fault and f"{self.entry.value}: {fault}"

    @property
    def devices(self) -> tuple[str, ...]:
        self.load()
        return self._devices

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        self.load()
        return self._kernels

    @property
    def module(self) -> str:
        """Of the package's own class: its descriptor lies beside it."""
        return type(self.load() or self).__module__

    def version(self) -> str:
        self.load()
        return self._version

    def missing(self) -> str | None:
        backend = self.load()
        if backend is None:
            return self.fault
        try:
            why = backend.missing()
        except FOREIGN as error:
            self.fault = why = f"its missing() raises {told(error)}"
        return why if why is None else str(why)

    def candidates(self, ctx: SelectionContext) -> Iterator[Candidate | Rejection]:
        backend = self.load()
        try:
            for answer in backend.candidates(ctx) if backend is not None else ():
                known = isinstance(answer, Rejection) or (isinstance(answer, Candidate) and answer.kernel in self._kernels)
                yield answer if known else self._error(f"its candidates() gives {str(answer)[:80]!r}, which is none of its kernels")
        except CapabilityError:
            raise
        except FOREIGN as error:
            yield self._error(f"its candidates() raises {told(error)}")

    def _error(self, why: str) -> Rejection:
        return Rejection(self.name, "backend_error", why)


def lacking(backend: Any, name: str, taken: Collection[str] = ()) -> str | None:
    """What keeps an object from being the backend of that name, or None."""
    lacks = [what for what in ("name", "devices", "kernels", "version", "missing", "candidates") if not hasattr(backend, what)]
    if lacks:
        return f"no backend: it has no {', '.join(lacks)}"
    if backend.name != name:
        return f"its name is {backend.name!r}, and its entry point's {name!r}"
    devices, kernels = backend.devices, backend.kernels
    if not isinstance(devices, tuple | list) or not all(isinstance(device, str) for device in devices):
        return f"devices is {devices!r:.80}, not a tuple of names"
    if not isinstance(kernels, Mapping) or not all(isinstance(k, Kernel) and k.name == key for key, k in kernels.items()):
        return "kernels is no mapping of names to Kernels of these names"
    own = sorted(set(kernels) & set(taken))
    if own:
        return f"its kernel {own[0]!r} has the name of one of LayerZero's"
    return None if isinstance(backend.version(), str) else "version() gives no text"


def try_out(name: str, value: str) -> None:
    """In a process of its own: make the backend, ask it what every process will, and say that it could be done."""
    backend = EntryPoint(name, value, GROUP).load()()
    fault = lacking(backend, name)
    if fault is not None:
        sys.exit(fault)
    with contextlib.suppress(*FOREIGN):  # what it raises is told each time it does
        backend.missing()
    sys.stdout.write("imported")
