"""Facts of the timings store as rows and as text, and what becomes of two facts about one thing.

Every fact says on which machine and when it was found, and is kept with a checksum: SQLite has none, and a damaged page
would else give a wrong number. Nothing here is executed, imported or used as a path.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import LayerZeroError

TIMING = "timing"  # the kind under which `ls` and `clear` know the timings
UNKNOWN = "unknown"  # the machine of a fact that was exported without its origin
MAX_VALUE = 1 << 26  # characters of one fact; more is damage
MAX_LINE, MAX_FILE = 1 << 25, 1 << 28  # bytes of an exported file
EXPORTED = ("peaks", "canary", "canary_failed", "quarantine")
STAY = ("fingerprint", "import")  # about files of one machine
KINDS = (TIMING, *EXPORTED, *STAY, "verdict", "links", "checked")

_TYPES = (str, str, int | None, int, int, str | None, float | None, str, float, str)
# Of one capability on two machines of one environment, the worse counts.
_SEVERITY = {"not_offered": 0, "passed": 1, "failed": 2, "timed_out": 3, "crashed": 4}

Name = tuple[str, str]  # kind and key
Origin = tuple[str, float]  # machine and Unix time


class StoreError(LayerZeroError, ValueError):
    """Another store, which the user asked for, cannot be read."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement. `key` says everything it depends on; a failure has no `ns` and an `error`."""

    key: str
    kernel: str
    ns: int | None
    spread: int
    samples: int
    error: str | None
    epsilon: float
    detail: str


@dataclass(slots=True)
class Facts:
    """Timings by key, records (JSON text) by kind and key, where each comes from, and how many rows were unreadable."""

    timings: dict[str, Timing] = field(default_factory=dict)
    records: dict[Name, bytes] = field(default_factory=dict)
    origins: dict[Name, Origin] = field(default_factory=dict)
    damaged: int = 0

    def names(self) -> list[Name]:
        return [*((TIMING, key) for key in self.timings), *self.records]

    def add(self, other: Facts) -> None:
        self.timings |= other.timings
        self.records |= other.records
        self.origins |= other.origins

    def drop(self, name: Name) -> None:
        self.records.pop(name, None)
        if name[0] == TIMING:
            self.timings.pop(name[1], None)
        self.origins.pop(name, None)


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` did: facts that were new here, by machine, and those that differ under the same environment, in words."""

    added: int
    machines: Mapping[str, int]
    conflicts: tuple[str, ...]
    damaged: int  # rows of the other store


@functools.cache
def machine() -> str:
    """This machine's name, as facts have it; many machines are called `localhost`, so with a hash of the system's own id."""
    import platform

    try:
        known = Path("/etc/machine-id").read_bytes()
    except OSError:
        known = b""
    return f"{platform.node() or UNKNOWN}-{zlib.crc32(known):08x}" if known else platform.node() or UNKNOWN


# --- rows -------------------------------------------------------------------------------------------------------------------


def _timing(values: Sequence[Any], epsilon: float | None, detail: str) -> Timing:
    key, kernel, ns, spread, samples, error = values
    return Timing(key, kernel, ns, spread, samples, error, math.nan if epsilon is None else epsilon, detail)


def _crc(values: Sequence[Any]) -> int:
    return zlib.crc32(repr(tuple(values)).encode("utf-8", "surrogatepass"))


def timing_rows(facts: Facts) -> Iterator[tuple[Any, ...]]:
    """Rows of the table `timings`, in its columns' order."""
    for timing in facts.timings.values():
        where, when = facts.origins[TIMING, timing.key]
        *values, epsilon, detail = astuple(timing)
        # SQLite makes NULL of a NaN, and does not keep the sign of -0.0.
        row = (*values, None if math.isnan(epsilon) else float(epsilon) + 0.0, detail, when, where)
        yield (*row, _crc(row))


def record_rows(facts: Facts) -> Iterator[tuple[Any, ...]]:
    """Rows of the table `records`, in its columns' order."""
    for (kind, key), text in facts.records.items():
        value = text.decode("utf-8", "replace")
        where, when = facts.origins[kind, key]
        yield (kind, key, value, when, where, _crc((kind, key, value.encode(), when, where)))


def read_rows(timings: Iterable[Sequence[Any]] = (), records: Iterable[Sequence[Any]] = ()) -> Facts:
    """The facts in rows; SQLite lets any column hold any type, so damage is told by types and checksum, and left out."""
    found = Facts()
    for *row, crc in timings:
        if all(isinstance(value, kind) for value, kind in zip(row, _TYPES, strict=True)) and _crc(row) == crc:
            *values, epsilon, detail, when, where = row
            timing = _timing(values, epsilon, detail)
            found.timings[timing.key] = timing
            found.origins[TIMING, timing.key] = where, when
        else:
            found.damaged += 1
    for *row, crc in records:
        kind, key, text, when, where = row
        if isinstance(text, bytes) and isinstance(when, float) and _crc(row) == crc:
            found.records[kind, key] = text
            found.origins[kind, key] = where, when
        else:
            found.damaged += 1
    return found


def parsed(text: bytes | None) -> dict[str, Any] | None:
    """A record's JSON object; None if it is none."""
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _formed(kind: str, value: Any) -> bool:
    """Whether a record is what this kind holds, as far as `join` and the canary's readers rely on it."""
    if not isinstance(value, dict):
        return False
    if kind == "canary":
        found = value.get("capabilities", {})
        entries = found.values() if isinstance(found, dict) else [None]
        return type(value.get("run", 0)) is int and all(isinstance(v, dict) and isinstance(v.get("status"), str) for v in entries)
    names = value.get("backends") if kind == "canary_failed" else []
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


# --- text -------------------------------------------------------------------------------------------------------------------


def to_lines(facts: Facts) -> list[str]:
    """What may travel, as JSON lines, sorted: timings, peaks, what the canary found and what is in quarantine, with their origins."""
    rows: list[dict[str, Any]] = []
    for (kind, key), text in sorted(facts.records.items()):
        value = parsed(text)
        if kind in EXPORTED and value is not None:
            rows.append({"kind": kind, "key": key, "value": value} | _origin(facts, (kind, key)))
    for key, timing in sorted(facts.timings.items()):
        known = asdict(timing)
        rows.append(known | ({"epsilon": None} if math.isnan(timing.epsilon) else {}) | _origin(facts, (TIMING, key)))
    return [json.dumps(row) + "\n" for row in rows]


def _origin(facts: Facts, name: Name) -> dict[str, Any]:
    where, when = facts.origins[name]
    return {} if where == UNKNOWN and not when else {"machine": where, "measured": when}


def read_lines(path: Path) -> Facts:
    """All facts of an exported file. StoreError with the line if one is damaged."""
    found = Facts()
    try:
        if not path.is_file():
            raise OSError("no such file")
        if path.stat().st_size > MAX_FILE:
            raise OSError(f"more than {MAX_FILE} bytes")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                found.add(_line(line, path, number))
    except OSError as error:
        raise StoreError(f"{path} cannot be read as exported timings: {error}.") from error
    return found


def _line(line: bytes, path: Path, number: int) -> Facts:
    found = Facts()
    try:
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes")
        row = json.loads(line)
        origin = row.get("machine", UNKNOWN), float(row.get("measured", 0.0))
        if not math.isfinite(origin[1]):
            raise ValueError(f"measured is {origin[1]}")
        if "kind" in row:
            kind, key, value = row["kind"], row["key"], row["value"]
            if kind not in EXPORTED:
                raise ValueError(f"kind is {kind!r}, not one of {', '.join(EXPORTED)}")
            if not isinstance(key, str) or not isinstance(origin[0], str) or not _formed(kind, value):
                raise TypeError("a field of this record has the wrong type")
            f"{key}{origin[0]}".encode()  # SQLite takes no lone surrogate
            found.records[kind, key] = json.dumps(value, sort_keys=True).encode()
            found.origins[kind, key] = origin
            return found
        values = [row[f.name] for f in fields(Timing)]
        *_, epsilon, detail = values
        values[-2:] = [float(epsilon) if type(epsilon) is int else epsilon, detail]
        typed = zip((*values, origin[1], origin[0]), _TYPES, strict=True)
        if not all(isinstance(v, kind) and not isinstance(v, bool) for v, kind in typed):
            raise TypeError("a field of this timing has the wrong type")
        if any(type(v) is int and not -(2**63) <= v < 2**63 for v in values):
            raise ValueError("a number is out of range")
        "".join(v for v in (*values, origin[0]) if isinstance(v, str)).encode()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"{error!r:.200}"
        raise StoreError(f"{path}, line {number}: not an exported fact ({what}). Export the store again.") from None
    timing = _timing(values[:-2], values[-2], detail)
    found.timings[timing.key] = timing
    found.origins[TIMING, timing.key] = origin
    return found


# --- two facts about one thing ----------------------------------------------------------------------------------------------


def join(ours: Facts, theirs: Facts) -> tuple[Facts, Merged]:
    """What of `theirs` is to be put beside `ours`, or in its place.

    A key holds the whole environment (device, driver, library versions), so facts of other environments stand side by side. Under
    one environment what was found on this machine stays; of two others the one that is more careful. Dates decide nothing.
    """
    fresh, conflicts, machines = Facts(), [], dict[str, int]()
    for name in theirs.names():
        if name[0] in STAY:
            continue
        origin, known = theirs.origins[name], name in ours.origins
        merged, differs = _chosen(name, ours, theirs) if known else (_value(theirs, name), False)
        if differs:
            conflicts.append(_told(name, ours.origins[name], origin, merged is not None))
        if merged is None:
            continue
        if not known:
            machines[origin[0]] = machines.get(origin[0], 0) + 1
        if isinstance(merged, Timing):
            fresh.timings[name[1]] = merged
        else:
            fresh.records[name] = merged
        fresh.origins[name] = ours.origins[name] if known and name[0].startswith("canary") else origin
    return fresh, Merged(sum(machines.values()), machines, tuple(conflicts), theirs.damaged)


def _value(facts: Facts, name: Name) -> Timing | bytes:
    return facts.timings[name[1]] if name[0] == TIMING else facts.records[name]


def _told(name: Name, mine: Origin, other: Origin, replaced: bool) -> str:
    """Two facts in words: the whole key, since its end says under which environment they differ."""
    kept = "the other is taken over" if replaced else "this one is kept"
    return f"{name[0]} {name[1]}: found on {mine[0]} and, otherwise, on {other[0]}; {kept}"


def _chosen(name: Name, ours: Facts, theirs: Facts) -> tuple[Timing | bytes | None, bool]:
    """(what replaces ours: None if nothing, whether the two differ)."""
    mine, other = _value(ours, name), _value(theirs, name)
    if repr(mine) == repr(other):  # NaN equals nothing
        return None, False
    here = ours.origins[name][0] == machine()
    if isinstance(mine, Timing) and isinstance(other, Timing):
        better = _timing_rank(other) > _timing_rank(mine)
        return (other if better and not here else None), True
    assert isinstance(mine, bytes)
    assert isinstance(other, bytes)
    one, two = (value if _formed(name[0], value := parsed(text)) else None for text in (mine, other))
    if one is None or two is None:
        return (other if one is None and two is not None else None), True
    how = _JOINS.get(name[0])
    merged, differs = how(one, two, here, theirs.origins[name][0]) if how else (one, True)
    return (None if merged == one else json.dumps(merged, sort_keys=True).encode()), differs


def _timing_rank(timing: Timing) -> tuple[Any, ...]:
    """Wrong numbers on one machine of an environment outweigh a time on another; else more samples, then the smaller spread."""
    wrong = (timing.error or "").startswith(("wrong", "nan"))
    return wrong, timing.ns is not None, timing.samples, -timing.spread, -(timing.ns or 0), repr(timing)


def _join_peaks(one: dict[str, Any], two: dict[str, Any], here: bool, _: str) -> tuple[dict[str, Any], bool]:
    """A peak is the best that was seen."""
    better = str(two.get("bandwidth")).rjust(40) > str(one.get("bandwidth")).rjust(40)
    if all(isinstance(v.get("bandwidth"), int | float) for v in (one, two)):
        better = two["bandwidth"] > one["bandwidth"]
    return (two if better and not here else one), True


def _join_canary(one: dict[str, Any], two: dict[str, Any], here: bool, where: str) -> tuple[dict[str, Any], bool]:
    """Verdicts by capability: what was tried here stays; what was not is taken over, and of two others the worse."""
    found, differs = dict(one.get("capabilities", {})), False
    for name, verdict in two.get("capabilities", {}).items():
        old = found.get(name)
        if verdict["status"] not in _SEVERITY:
            continue
        if old is None or old["status"] not in _SEVERITY:
            found[name] = {"machine": where, **verdict}
            continue
        new_rank, old_rank = _SEVERITY[verdict["status"]], _SEVERITY[old["status"]]
        differs |= new_rank != old_rank
        if new_rank > old_rank and not (here and "machine" not in old):
            found[name] = {"machine": where, **verdict}
    return {**one, "capabilities": found}, differs


def _join_failed(one: dict[str, Any], two: dict[str, Any], here: bool, _: str) -> tuple[dict[str, Any], bool]:
    return {"backends": sorted({*one["backends"], *two["backends"]})}, False


_JOINS: Mapping[str, Callable[[dict[str, Any], dict[str, Any], bool, str], tuple[dict[str, Any], bool]]] = {
    "peaks": _join_peaks, "canary": _join_canary, "canary_failed": _join_failed,
    "quarantine": lambda one, *_: (one, False),  # that it raised counts, not how
}  # fmt: skip
