"""The kernel libraries that LayerZero knows, and those that third parties register (entry points `lz_compiler.backends`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import entry_points

from ..capabilities import descriptor
from ..errors import CapabilityError, OptionError, unknown
from ..options import Options
from ..types import Candidate, Rejection
from .aten import Aten
from .attention import Attention
from .base import Backend, Kernel, SelectionContext
from .cublas import Cublas
from .cudnn import Cudnn
from .inductor import Inductor
from .onednn import OneDNN
from .triton_kernels import Triton


@functools.cache
def all_backends() -> dict[str, Backend]:
    found: dict[str, Backend] = {b.name: b for b in (Aten(), OneDNN(), Attention(), Inductor(), Cublas(), Cudnn(), Triton())}
    for entry in entry_points(group="lz_compiler.backends"):
        found[entry.name] = entry.load()()
    return found


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
