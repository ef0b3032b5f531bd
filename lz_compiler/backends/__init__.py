"""The kernel libraries that LayerZero knows, and those that third parties register (entry points `lz_compiler.backends`)."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points

from ..errors import CapabilityError, OptionError, unknown
from ..options import Options
from ..trust.capabilities import descriptor
from ..types import Candidate, Rejection
from .aten import Aten
from .attention import Attention
from .base import Backend, Kernel, SelectionContext
from .collectives import Collectives
from .cublas import Cublas
from .cudnn import Cudnn
from .flash_attention import FlashAttention, FlashAttention3
from .flashinfer import FlashInfer
from .flex_attention import FlexAttention
from .inductor import Inductor
from .liger import Liger
from .onednn import OneDNN
from .torchao import TorchAO
from .triton_kernels import Triton
from .xformers import XFormers

SLOW_S = 5.0  # in which a third party's library should have been imported

OWN: tuple[Callable[[], Backend], ...] = (
    Aten, OneDNN, Attention, Inductor, Cublas, Cudnn, Triton, FlexAttention, FlashAttention, FlashAttention3, FlashInfer, XFormers,
    Liger, TorchAO, Collectives,
)  # fmt: skip


class Unusable:
    """A third party's backend that cannot be imported: a rejection wherever it is asked."""

    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why
        self.kernels: Mapping[str, Kernel] = {}

    def version(self) -> str:
        return "unusable"

    def missing(self) -> str | None:
        return self.why

    def candidates(self, ctx: SelectionContext) -> Iterator[Candidate | Rejection]:
        yield from ()


@functools.cache
def all_backends() -> dict[str, Backend]:
    found: dict[str, Backend] = {backend.name: backend for backend in (own() for own in OWN)}
    for entry in entry_points(group="lz_compiler.backends"):
        start = time.monotonic()
        try:
            found[entry.name] = entry.load()()
        except Exception as error:  # it is foreign code, and may raise anything
            found[entry.name] = Unusable(entry.name, f"{entry.value} raises {type(error).__name__}: {error}")
        if time.monotonic() - start > SLOW_S:
            warnings.warn(f"LayerZero: the backend {entry.name!r} took {time.monotonic() - start:.1f} s to import", stacklevel=2)
    return found


def register(backend: Backend) -> None:
    """Add a backend to this process, as an entry point does for an installed package; one of the same name is replaced."""
    all_backends()[backend.name] = backend
    owners.cache_clear()
    kernel.cache_clear()


def allowed_backends(allow: tuple[str, ...] | None) -> list[Backend]:
    """The backends of an allow-list, in order; ATen is always there, since a graph must run at all."""
    known = all_backends()
    for name in allow or ():
        if name not in known:
            raise OptionError(unknown("backend", name, known))
    return [b for name, b in known.items() if allow is None or name in allow or name == "aten"]


def check_names(options: Options) -> None:
    """OptionError for a backend, or a policy's backend or kernel, that does not exist."""
    if options.backends is not None:
        allowed_backends(options.backends)
    if options.policy is not None:
        options.policy.check_names(owners(), all_backends())


@functools.cache
def owners() -> dict[str, str]:
    """The backend of each kernel."""
    return {name: library for library, backend in all_backends().items() for name in backend.kernels}


def answers(ctx: SelectionContext) -> Iterator[Candidate | Rejection]:
    """What every allowed library of the region's device could do there, or why not."""
    for library in allowed_backends(ctx.options.backends):
        if ctx.specs[0].device not in library.devices:
            continue
        reason = library.missing()
        if reason is not None and not _serves(library, ctx):
            continue
        if reason is not None:
            yield Rejection(library.name, "library_missing", reason)
            continue
        try:
            for answer in library.candidates(ctx):
                if ctx.options.deterministic and isinstance(answer, Candidate) and not _deterministic(library, answer.kernel):
                    yield Rejection(answer.kernel, "nondeterministic", "the same inputs may give other bits, and deterministic=True")
                else:
                    yield answer
        except CapabilityError as error:
            yield Rejection(library.name, "descriptor", str(error))


def _serves(library: Backend, ctx: SelectionContext) -> bool:
    """Whether a library, if it were there, would have anything for such regions."""
    known = descriptor(library)
    return known is None or any(ctx.region.op in kernel.ops for kernel in known.kernels.values())


def _deterministic(library: Backend, name: str) -> bool:
    known = descriptor(library)
    return known.kernels[name].deterministic if known and name in known.kernels else library.kernels[name].deterministic


@functools.cache
def kernel(name: str) -> Kernel:
    for backend in all_backends().values():
        if name in backend.kernels:
            return backend.kernels[name]
    raise KeyError(name)


def set_up(names: set[str]) -> None:
    """Make the operators of these kernels exist: a graph from Inductor's cache calls them without planning again."""
    for backend in all_backends().values():
        for known in backend.kernels.values():
            if known.name in names and known.setup is not None:
                known.setup()
