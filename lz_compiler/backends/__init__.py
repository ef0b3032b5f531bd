"""The kernel libraries that LayerZero knows, and those that third parties register (entry points `lz_compiler.backends`)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points

from ..errors import CapabilityError, OptionError, PolicyError, unknown
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
from .third_party import GROUP, ThirdParty
from .torchao import TorchAO
from .triton_kernels import Triton
from .xformers import XFormers

OWN: tuple[Callable[[], Backend], ...] = (
    Aten, OneDNN, Attention, Inductor, Cublas, Cudnn, Triton, FlexAttention, FlashAttention, FlashAttention3, FlashInfer, XFormers,
    Liger, TorchAO, Collectives,
)  # fmt: skip


@functools.cache
def all_backends() -> dict[str, Backend]:
    """Every backend by name, LayerZero's own first. Third parties' packages are not imported by this."""
    found: dict[str, Backend] = {backend.name: backend for backend in (own() for own in OWN)}
    taken = {name for backend in found.values() for name in backend.kernels}
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            warnings.warn(f"LayerZero: {entry.value} is ignored: there is a backend {entry.name!r} already", stacklevel=2)
        else:
            found[entry.name] = ThirdParty(entry, taken, lambda: owners.cache_clear())
    return found


def register(backend: Backend) -> None:
    """Add a backend to this process, as an entry point does for an installed package; one of the same name is replaced."""
    all_backends()[backend.name] = backend
    owners.cache_clear()
    kernel.cache_clear()


def version_of(kernel: str) -> str:
    """The version of the library that a kernel is of."""
    return all_backends()[owners()[kernel]].version()


def allowed_backends(allow: tuple[str, ...] | None) -> list[Backend]:
    """The backends of an allow-list, in order; ATen is always there, since a graph must run at all."""
    known = all_backends()
    for name in allow or ():
        if name not in known:
            raise OptionError(unknown("backend", name, known))
    return [b for name, b in known.items() if allow is None or name in allow or name == "aten"]


def check_names(options: Options) -> None:
    """OptionError for a backend, or a policy's backend or kernel, that does not exist. Imports the third parties that are allowed."""
    for library in allowed_backends(options.backends):
        if isinstance(library, ThirdParty):
            library.load(options.cache_dir)
    if options.policy is None:
        return
    try:
        options.policy.check_names(owners(), all_backends())
    except PolicyError:  # perhaps a kernel of a library that the options do not allow
        for library in all_backends().values():
            if isinstance(library, ThirdParty):
                library.load(options.cache_dir)
        options.policy.check_names(owners(), all_backends())


@functools.cache
def owners() -> dict[str, str]:
    """The backend of each kernel, of those third parties that were imported."""
    known = [b for b in all_backends().values() if not isinstance(b, ThirdParty) or b.is_loaded]
    return {name: backend.name for backend in reversed(known) for name in backend.kernels}  # of two, the first has the name


def answers(ctx: SelectionContext) -> Iterator[Candidate | Rejection]:
    """What every allowed library of the region's device could do there, or why not."""
    for library in allowed_backends(ctx.options.backends):
        if ctx.specs[0].device not in library.devices:
            continue
        try:
            reason = library.missing()
            if reason is not None:
                broken = isinstance(library, ThirdParty) and library.fault is not None
                if broken or _serves(library, ctx):
                    yield Rejection(library.name, "backend_error" if broken else "library_missing", reason)
                continue
            known = descriptor(library)
            for answer in library.candidates(ctx):
                declared = known.kernels.get(answer.kernel) if known else None
                if not isinstance(answer, Candidate):
                    yield answer
                elif ctx.options.deterministic and not (declared or library.kernels[answer.kernel]).deterministic:
                    yield Rejection(answer.kernel, "nondeterministic", "the same inputs may give other bits, and deterministic=True")
                elif declared and declared.workspace is not None:
                    yield replace(answer, workspace=declared.workspace)
                else:
                    yield answer
        except CapabilityError as error:
            yield Rejection(library.name, "descriptor", str(error))


def _serves(library: Backend, ctx: SelectionContext) -> bool:
    """Whether a library, if it were there, would have anything for such regions."""
    known = descriptor(library)
    return known is None or any(ctx.region.op in kernel.ops for kernel in known.kernels.values())


@functools.cache
def kernel(name: str) -> Kernel:
    owner = owners().get(name)
    for backend in all_backends().values() if owner is None else (all_backends()[owner],):
        if name in backend.kernels:
            return backend.kernels[name]
    raise KeyError(name)


def set_up(names: set[str]) -> None:
    """Make the operators of these kernels exist: a graph from Inductor's cache calls them without planning again."""
    for name in names & owners().keys():
        setup = kernel(name).setup
        if setup is not None:
            setup()
