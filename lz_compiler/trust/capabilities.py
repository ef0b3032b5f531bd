"""What each kernel can do, as data: a JSON file beside a backend's module, read when the backend is first asked about a region.

The file says which regions a kernel computes (`ops`, `regions`), where it runs (`devices`, `architectures`, `libraries`), on what
(`dtypes`, `layouts`, `constraints`), and how it behaves. What is not said is not supported. A condition is an object whose
entries must all hold:

    "<term>": value             the term equals the value; or {"<=": 256}, with one of the comparisons in `_COMPARISONS`
    "elements": true            no input or output is empty
    "contiguous": [roles]       the last dimension has stride 1; "all" for every input
    "dense": [roles]            in order and without gaps, as torch's is_contiguous() says
    "frozen": [roles]           weights that never change; "constants" for all but x and other
    "has": [roles]              the region has these inputs
    "any": [conditions], "all": [conditions], "not": condition

Terms: `role.dtype`, `role.shape`, `role.rank`, `role.dim-1`, `role.stride0` (`out` is the first output); `options.NAME`;
`kv_cache.NAME`; `default`; `device`; `roles` (how many inputs); any other word is one of the region's parameters, `word.0` its first entry.
A term that the region lacks is null. The value of a comparison may be `{"term": "..."}`.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CapabilityError
from ..types import Rejection, TensorSpec
from .descriptors import CPU_LEVELS, NUMERIC, Capability, Condition, Descriptor, read

if TYPE_CHECKING:
    from ..backends.base import Backend, SelectionContext

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "multiple_of": lambda a, b: b > 0 and a % b == 0,
    "in": lambda a, b: a in b,
    "contains": lambda a, b: b in a,
}


def descriptor(backend: Backend) -> Descriptor | None:
    """The backend's descriptor, read once: `<name>.json` beside the module of its class. None: it has no file, and says all in code."""
    return _descriptor(getattr(backend, "module", type(backend).__module__), backend.name)


@functools.cache
def _descriptor(module: str, name: str) -> Descriptor | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(file).with_name(f"{name}.json") if file else None
    return read(path, name) if path is not None and path.is_file() else None


def _term(name: str, ctx: SelectionContext) -> Any:
    head, _, attribute = name.partition(".")
    if not attribute:
        if name in ("default", "device", "roles"):
            return {"default": ctx.default, "device": ctx.specs[0].device, "roles": len(ctx.roles)}[name]
        return _plain(ctx.params.get(name))
    if head in ("options", "kv_cache"):
        return _plain(getattr(getattr(ctx, head), attribute, None))
    if attribute.isdigit():
        values = ctx.params.get(head)
        return values[int(attribute)] if isinstance(values, tuple | list) and int(attribute) < len(values) else None
    spec = ctx.outputs[0] if head == "out" else ctx.spec(head) if head in ctx.roles else None
    if spec is None:
        return None
    if attribute in ("dtype", "shape"):
        return _plain(getattr(spec, attribute))
    if attribute == "rank":
        return len(spec.shape)
    sizes, index = (spec.shape, attribute[3:]) if attribute.startswith("dim") else (spec.stride, attribute.removeprefix("stride"))
    at = int(index) if re.fullmatch(r"-?\d", index) else len(sizes)
    return sizes[at] if -len(sizes) <= at < len(sizes) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def holds(condition: Condition, ctx: SelectionContext) -> bool:
    """Whether a region satisfies a (checked) condition."""
    return all(_holds(name, test, ctx) for name, test in condition.items())


def _holds(name: str, test: Any, ctx: SelectionContext) -> bool:
    match name:
        case "any":
            return any(holds(entry, ctx) for entry in test)
        case "all":
            return all(holds(entry, ctx) for entry in test)
        case "not":
            return not holds(test, ctx)
        case "elements":
            return all(0 not in spec.shape for spec in (*ctx.specs, *ctx.outputs))
        case "contiguous":
            return all(ctx.spec(role).stride[-1:] == (1,) for role in (ctx.roles if test == "all" else test) if role in ctx.roles)
        case "dense":
            return all(_dense(ctx.spec(role)) for role in test if role in ctx.roles)
        case "frozen":
            roles = [r for r in ctx.roles if r not in ("x", "other")] if test == "constants" else test
            return all(role in ctx.frozen for role in roles)
        case "has":
            return all(role in ctx.roles for role in test)
    value = _term(name, ctx)
    if not isinstance(test, dict):
        return bool(value == test)
    return all(_compares(how, value, _term(to["term"], ctx) if isinstance(to, dict) else to) for how, to in test.items())


def _dense(spec: TensorSpec) -> bool:
    steps = itertools.accumulate(reversed(spec.shape), operator.mul, initial=1)
    return all(size == 1 or have == want for size, have, want in zip(reversed(spec.shape), reversed(spec.stride), steps, strict=False))


def _compares(how: str, value: Any, to: Any) -> bool:
    if how in NUMERIC and not (isinstance(value, int | float) and isinstance(to, int | float)):
        return False
    if how in ("in", "contains") and not isinstance(to if how == "in" else value, list):
        return False
    return bool(_COMPARISONS[how](value, to))


def refusal(known: Capability, ctx: SelectionContext) -> Rejection | None:
    """Why the kernel's declaration excludes this region, or None."""
    dtype, device = ctx.specs[0].dtype, ctx.specs[0].device
    if "any" not in known.dtypes and dtype not in known.dtypes:
        return _refused(known, "dtypes", "dtype", f"{', '.join(known.dtypes)}, not {dtype}")
    least = known.architectures.get(device)
    if least is not None and not _capable(device, least):
        return _refused(known, "architectures", "device", f"needs {'CPU level' if device == 'cpu' else 'compute capability'} {least}")
    for library, wanted in known.libraries.items():
        have = installed_version(library)
        if have is None or not _satisfies(have, wanted):
            return _refused(known, "libraries", "library_version", f"needs {library} {wanted}, not {have}")
    if device == "cuda" and ctx.options.graphs and not known.cuda_graph_safe:
        return Rejection(known.kernel, "cuda_graph", "not known to be safe inside a CUDA graph")
    failed = next((c for c in known.constraints if not holds(c.require, ctx)), None)
    if failed is None:
        return None
    proved = ctx.params.get("mask") if failed.code == "mask" else None  # the predicate that it cannot take
    return Rejection(known.kernel, failed.code, f"{failed.detail}; proved: {proved}" if proved else failed.detail)


def _refused(known: Capability, what: str, code: str, detail: str) -> Rejection:
    return Rejection(known.kernel, *known.reasons.get(what, (code, detail)))


@functools.cache
def _capable(device: str, least: str) -> bool:
    """Whether this machine's device is at least so capable. A card that is not here is not asked."""
    if device == "cpu":
        return CPU_LEVELS.index(least) <= _cpu_level()
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return here is None or here >= tuple(int(part) for part in least.split("."))


def _cpu_level() -> int:
    level = torch.backends.cpu.get_cpu_capability()
    return CPU_LEVELS.index(level) if level in CPU_LEVELS else 0


@functools.cache
def installed_version(library: str) -> str | None:
    """The version of an installed package by its name for pip, or None: not there, or without readable metadata."""
    if library == "torch":
        return torch.__version__
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library) or None
    except (PackageNotFoundError, KeyError, TypeError):  # the last two: its METADATA is missing or names no version
        return None


def _satisfies(have: str, wanted: str) -> bool:
    def release(text: str) -> tuple[int, ...]:
        found = re.match(r"\d+(\.\d+)*", text)
        return tuple(int(part) for part in found.group().split(".")) if found else ()

    mine = release(have)
    for part in wanted.split(","):
        operator, limit = (part[:2], release(part[2:])) if part[1] == "=" else (part[:1], release(part[1:]))
        if not (mine >= limit if operator == ">=" else mine < limit if operator == "<" else mine[: len(limit)] == limit):
            return False
    return True


def subject(known: Capability, ctx: SelectionContext) -> bool:
    """Whether the kernel is for such regions at all; where it is not, nothing need be explained."""
    return known.forward and ctx.region.op in known.ops and ctx.specs[0].device in known.devices and holds(known.regions, ctx)


def fitting(backend: Backend, ctx: SelectionContext) -> tuple[list[str], list[Rejection]]:
    """The backend's kernels whose declaration allows the region, in the file's order, and why the others of its operation do not.

    CapabilityError if the file is missing or cannot be read.
    """
    known = descriptor(backend)
    if known is None:
        raise CapabilityError(f"backend {backend.name!r}: there is no {backend.name}.json beside {type(backend).__module__}")
    fit, refused = [], []
    for name, capability in known.kernels.items():
        if subject(capability, ctx):
            why = refusal(capability, ctx)
            if why is None:
                fit.append(name)
            else:
                refused.append(why)
    return fit, refused
