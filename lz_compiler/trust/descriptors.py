"""Reading a backend's descriptor: typed fields out of JSON, every complaint a CapabilityError that names the place.

What the fields mean is said in capabilities.py, how to write one in docs/backends.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, unknown
from ..plan_io import read_limited

SCHEMA = 1
MAX_BYTES = 1 << 20
MAX_DEPTH = 8
FLOATS = ("bfloat16", "float16", "float32", "float64")
DTYPES = (*FLOATS, "int8", "float8_e4m3fn", "float8_e5m2", "any")  # any: whatever torch's own operator takes
LAYOUTS = ("strided", "channels_last", "packed")
CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")  # as torch names them, each with the one before
COMPARISONS = ("==", "!=", ">=", "<=", ">", "multiple_of", "in", "contains")
NUMERIC = (">=", "<=", ">", "multiple_of")

Condition = Mapping[str, Any]

_TERM = re.compile(r"[a-z_][a-z0-9_]*(\.(dtype|shape|rank|dim-?\d|stride-?\d|\d|[a-z_]+))?")


@dataclass(frozen=True, slots=True)
class Constraint:
    """`require` must hold, or the kernel is refused with `code` and `detail`."""

    code: str
    detail: str
    require: Condition


@dataclass(frozen=True, slots=True)
class Capability:
    """What one kernel claims. `workspace`: bytes of scratch at most, None where it is not known. `source`: where claims come from."""

    kernel: str
    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    regions: Condition
    constraints: tuple[Constraint, ...]
    architectures: Mapping[str, str]
    libraries: Mapping[str, str]
    reasons: Mapping[str, tuple[str, str]]
    forward: bool
    backward: bool
    deterministic: bool
    cuda_graph_safe: bool
    frozen_weights: bool
    workspace: int | None
    source: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One backend's file. `digest` changes with every byte of it."""

    backend: str
    digest: str
    kernels: Mapping[str, Capability]


class _Reader:
    """Takes typed fields out of JSON objects; every complaint is a CapabilityError that names the place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, what: str) -> CapabilityError:
        return CapabilityError(f"{self.path}: {where}: {what}")

    def object(self, value: Any, where: str, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(where, f"an object is needed, not {value!r:.80}")
        for name in value if allowed else ():
            if name not in allowed:
                raise self.fail(where, unknown("field", name, allowed))
        return value

    def words(self, value: Any, where: str, allowed: tuple[str, ...] = ()) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.fail(where, f"a list of names is needed, not {value!r:.80}")
        for word in value if allowed else ():
            if word not in allowed:
                raise self.fail(where, unknown("name", word, allowed))
        return tuple(value)

    def texts(self, value: Any, where: str) -> dict[str, str]:
        if not all(isinstance(text, str) for text in self.object(value, where).values()):
            raise self.fail(where, "every value must be a text")
        return dict(value)

    def flag(self, entry: Mapping[str, Any], name: str, where: str) -> bool:
        value = entry.get(name, False)
        if not isinstance(value, bool):
            raise self.fail(where, f"{name} must be true or false, not {value!r:.80}")
        return value

    def condition(self, value: Any, where: str, depth: int = 0) -> Condition:
        if depth > MAX_DEPTH:
            raise self.fail(where, "conditions are nested too deeply")
        for name, test in self.object(value, where).items():
            here = f"{where}.{name}"
            if name in ("any", "all"):
                if not isinstance(test, list):
                    raise self.fail(here, "a list of conditions is needed")
                for entry in test:
                    self.condition(entry, here, depth + 1)
            elif name == "not":
                self.condition(test, here, depth + 1)
            elif name == "elements":
                if test is not True:
                    raise self.fail(here, "only true can be asked for")
            elif name in ("contiguous", "dense", "frozen", "has"):
                if (name, test) not in (("contiguous", "all"), ("frozen", "constants")):
                    self.words(test, here)
            else:
                self.test(name, test, here)
        return dict(value)

    def test(self, term: str, test: Any, where: str) -> None:
        self.term(term, where)
        if not isinstance(test, dict):
            return
        for comparison, operand in self.object(test, where, COMPARISONS).items():
            if isinstance(operand, dict):
                self.term(self.object(operand, where, ("term",)).get("term"), where)
            elif comparison in NUMERIC and (isinstance(operand, bool) or not isinstance(operand, int | float)):
                raise self.fail(where, f"{comparison} needs a number, not {operand!r:.80}")
            elif comparison == "in" and not isinstance(operand, list):
                raise self.fail(where, f"`in` needs a list, not {operand!r:.80}")

    def term(self, name: Any, where: str) -> None:
        if not isinstance(name, str) or not _TERM.fullmatch(name):
            raise self.fail(where, f"{name!r:.80} is not a term")


_FIELDS = (*(name for name in Capability.__slots__ if name not in ("kernel", "inputs", "outputs")), "layouts")


def read(path: Path, backend: str) -> Descriptor:
    """The descriptor in a file, checked. CapabilityError if it is not one of this schema version, or not of this backend."""
    reader = _Reader(path)
    try:
        return _read(reader, path, backend)
    except RecursionError as error:  # nested so deeply that not even a message can show it
        raise reader.fail("file", "is nested too deeply") from error


def _read(reader: _Reader, path: Path, backend: str) -> Descriptor:
    try:
        data = read_limited(path, MAX_BYTES)
        top = json.loads(data, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise reader.fail("file", f"cannot be read as JSON ({error})") from error
    if not isinstance(top, dict) or top.get("schema") != SCHEMA or isinstance(top["schema"], bool):
        given = top.get("schema") if isinstance(top, dict) else None
        raise reader.fail("schema", f"version {given!r:.80} is not known; this LayerZero reads version {SCHEMA}")
    reader.object(top, "file", ("schema", "backend", "shared", "kernels"))
    if top.get("backend") != backend:
        raise reader.fail("backend", f"describes {top.get('backend')!r:.80}, and {backend!r} was expected")
    shared = {
        name: _constraints(reader, value, f"shared.{name}", {}) for name, value in reader.object(top.get("shared", {}), "shared").items()
    }
    kernels = reader.object(top.get("kernels", {}), "kernels")
    known = {name: _capability(reader, name, entry, shared) for name, entry in kernels.items()}
    return Descriptor(backend, hashlib.sha256(data).hexdigest()[:16], known)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _capability(reader: _Reader, name: str, value: Any, shared: Mapping[str, tuple[Constraint, ...]]) -> Capability:
    entry = reader.object(value, name, _FIELDS)
    layouts = reader.object(entry.get("layouts", {}), f"{name}.layouts", ("inputs", "outputs"))
    workspace = entry.get("workspace")
    if workspace is not None and (isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 0):
        raise reader.fail(f"{name}.workspace", f"a number of bytes is needed, not {workspace!r:.80}")
    libraries = reader.texts(entry.get("libraries", {}), f"{name}.libraries")
    architectures = reader.texts(entry.get("architectures", {}), f"{name}.architectures")
    for device, least in architectures.items():
        good = least in CPU_LEVELS if device == "cpu" else device == "cuda" and re.fullmatch(r"\d\d?\.\d", least)
        if not good:
            raise reader.fail(f"{name}.architectures", f'{device!r:.80}: {least!r:.80} is neither cpu: {CPU_LEVELS} nor cuda: "8.0"')
    for library, wanted in libraries.items():
        if not all(re.fullmatch(r"(>=|<|==)\d+(\.\d+)*", part) for part in wanted.split(",")):
            raise reader.fail(f"{name}.libraries", f'{library!r:.80}: {wanted!r:.80} is not like ">=2.11,<3"')
    reasons = {}
    for what, why in reader.object(entry.get("reasons", {}), f"{name}.reasons", ("dtypes", "architectures", "libraries")).items():
        words = reader.words(why, f"{name}.reasons.{what}")
        if len(words) != 2:
            raise reader.fail(f"{name}.reasons.{what}", "a code and a detail are needed")
        reasons[what] = (words[0], words[1])
    return Capability(
        kernel=name, ops=reader.words(entry.get("ops", []), f"{name}.ops"),
        dtypes=reader.words(entry.get("dtypes", []), f"{name}.dtypes", DTYPES),
        devices=reader.words(entry.get("devices", []), f"{name}.devices", ("cpu", "cuda")),
        inputs=reader.words(layouts.get("inputs", []), f"{name}.layouts.inputs", LAYOUTS),
        outputs=reader.words(layouts.get("outputs", []), f"{name}.layouts.outputs", LAYOUTS),
        regions=reader.condition(entry.get("regions", {}), f"{name}.regions"),
        constraints=_constraints(reader, entry.get("constraints", []), f"{name}.constraints", shared),
        architectures=architectures, libraries=libraries, reasons=reasons, workspace=workspace,
        source=reader.texts(entry.get("source", {}), f"{name}.source"),
        **{flag: reader.flag(entry, flag, name) for flag in ("forward", "backward", "deterministic", "cuda_graph_safe", "frozen_weights")},
    )  # fmt: skip


def _constraints(reader: _Reader, value: Any, where: str, shared: Mapping[str, tuple[Constraint, ...]]) -> tuple[Constraint, ...]:
    """Constraints in order; a text stands for the shared ones of that name."""
    if not isinstance(value, list):
        raise reader.fail(where, "a list is needed")
    found: list[Constraint] = []
    for i, entry in enumerate(value):
        here = f"{where}[{i}]"
        if isinstance(entry, str):
            if entry not in shared:
                raise reader.fail(here, unknown("shared constraint", entry, shared))
            found += shared[entry]
            continue
        entry = reader.object(entry, here, ("code", "detail", "require"))
        code, detail = (entry.get(name) for name in ("code", "detail"))
        if not isinstance(code, str) or not isinstance(detail, str) or not code or not detail:
            raise reader.fail(here, "a code and a detail are needed")
        found.append(Constraint(code, detail, reader.condition(entry.get("require"), f"{here}.require")))
    return tuple(found)
