"""Plans and problems as plain data and back: JSON, nothing else; and files read up to a limit and written whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import PlanError
from .types import (
    EAGER,
    INDUCTOR,
    LOSSLESS,
    PLANNED,
    Candidate,
    Choice,
    Conversion,
    Cost,
    Format,
    Plan,
    Problem,
    Region,
    Rejection,
    Status,
    Verdict,
)

VERSION = 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {"schema_version": VERSION, **dataclasses.asdict(plan)}


MAX_BYTES = 1 << 26  # of a file
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)  # what reading nonsense may raise


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A plain file's bytes. OSError if it is none, or is larger than any plan, or than another limit."""
    if not path.is_file():
        raise OSError("it is a folder" if path.is_dir() else "no such file")
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise OSError(f"more than {limit} bytes")
    return text


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. OSError where that cannot be."""
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        half.write_bytes(data)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def digest(value: object) -> str:
    """A short hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _is(value: Any, *kinds: type) -> Any:
    """A value of one of these types: True is no number, and torch's version is a text. TypeError otherwise."""
    if type(value) not in kinds and not (str in kinds and isinstance(value, str)):
        raise TypeError(f"{value!r:.80} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _names(values: Any) -> tuple[str, ...]:
    return tuple(_is(value, str) for value in _is(values, list, tuple))


def _format(d: Mapping[str, Any]) -> Format:
    return Format(_is(d["layout"], str), _is(d["dtype"], str))


def _cost(d: Mapping[str, Any]) -> Cost:
    cost = Cost(**d)
    _is(cost.ns, int), _is(cost.source, str), _is(cost.spread, int), _is(cost.factor, float, int)
    if cost.ns < 0 or not 0 < cost.factor < float("inf"):
        raise ValueError(f"a price of {cost.ns} ns with factor {cost.factor}")
    return cost


def _rejection(d: Mapping[str, Any]) -> Rejection:
    return Rejection(*(_is(d[name], str) for name in ("kernel", "code", "detail")))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _candidate(d: Mapping[str, Any]) -> Candidate:
    region = Region(_is(d["region"]["op"], str), *(_names(d["region"][k]) for k in ("nodes", "inputs", "outputs")))
    ins, outs = tuple(map(_format, d["in_formats"])), tuple(map(_format, d["out_formats"]))
    if (len(ins), len(outs)) != (len(region.inputs), len(region.outputs)) or not region.nodes:
        raise ValueError(f"a candidate of {_is(d['kernel'], str):.200} needs nodes, and one format for each input and output")
    return Candidate(
        kernel=_is(d["kernel"], str), region=region, in_formats=ins, out_formats=outs, epsilon=_is(d["epsilon"], float, int),
        workspace=_is(d["workspace"], int), params=tuple((_is(k, str), _tuples(v)) for k, v in d["params"]), key=_is(d["key"], str),
    )  # fmt: skip


def _choice(d: Mapping[str, Any]) -> Choice:
    return Choice(
        _candidate(d["candidate"]),
        _cost(d["cost"]),
        tuple((_candidate(c), _cost(k)) for c, k in d["alternatives"]),
        tuple(map(_rejection, d["rejections"])),
        _is(d.get("flops", 0), int, float), _is(d.get("nbytes", 0), int, float), tuple(_is(i, int) for i in d.get("after", ())),
    )  # fmt: skip


def plan_from_dict(d: Mapping[str, Any]) -> Plan:
    if d.get("schema_version") != VERSION:
        raise PlanError(f"a plan of schema version {d.get('schema_version')!r}; this LayerZero reads {VERSION}. Plan again.")
    later = ("barred", "peaks", "modules", "problem")  # older plans have none
    fields = {f.name: d[f.name] for f in dataclasses.fields(Plan) if f.name in d or f.name not in later}
    conversions = tuple((Conversion(_is(c["tensor"], str), _format(c["src"]), _format(c["dst"])), _cost(k)) for c, k in d["conversions"])
    fields |= {
        "choices": tuple(map(_choice, d["choices"])), "conversions": conversions, "status": Status(d["status"]),
        "notes": _names(d["notes"]), "barred": _names(d.get("barred", ())),
        "environment": {_is(k, str): _is(v, str) for k, v in d["environment"].items()},
        "peaks": {_is(k, str): _is(v, int, float) for k, v in d.get("peaks", {}).items()},
        "modules": {_is(k, str): _is(v, str) for k, v in d.get("modules", {}).items()}, "problem": _is(d.get("problem", ""), str),
        **{name: _is(d[name], str) for name in ("fingerprint", "kind", "solver")},
        **{name: _is(d[name], int, float) for name in ("objective", "bound", "epsilon", "plan_s")},
    }  # fmt: skip
    return Plan(**fields)


def verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    data = {f.name: getattr(verdict, f.name) for f in dataclasses.fields(verdict)}
    return data | {name: [plan_to_dict(p) for p in data[name]] for name in ("plans", "lossless")}


def verdict_or_none(data: Mapping[str, Any] | None) -> Verdict | None:
    """A stored verdict; None for one that is damaged, or of another version."""
    try:
        if data is None or data["winner"] not in (PLANNED, LOSSLESS, INDUCTOR, EAGER):
            return None
        plans, lossless = (tuple(map(plan_from_dict, _is(some, list))) for some in (data["plans"], data.get("lossless", [])))
        written, dilution = _is(data.get("written"), list, type(None)), _is(data.get("dilution"), float, int, type(None))
        if dilution is not None and not 0 < dilution < float("inf"):
            return None
        calls = {k: {_is(name, str): _is(n, int) for name, n in _is(v, dict).items()} for k, v in _is(data.get("calls", {}), dict).items()}
        flags = {name: _is(data.get(name, False), bool) for name in ("collective", "random", "over", "race")}
        return Verdict(
            data["winner"], plans, {k: _is(v, float, int) for k, v in _is(data["times"], dict).items()},
            error=_is(data.get("error"), float, int, type(None)), written=None if written is None else tuple(_is(i, int) for i in written),
            calls=calls, why=_is(data.get("why"), str, type(None)), dilution=dilution, tightened=_is(data.get("tightened", 0), int),
            lossless=lossless, **flags,
        )  # fmt: skip
    except DAMAGE:
        return None


PROBLEM_VERSION = 1


def problem_name(fingerprint: str, kind: str, digest: str) -> str:
    """The file of a graph's problem in the folder of the option `problems`: another solve's prices are another file."""
    return f"{fingerprint}.{kind}.{digest}.problem.json"


def keep_problem(problem: Problem, folder: str, fingerprint: str, kind: str) -> str:
    """Save it in the folder under its own name, and return its digest."""
    name = digest(problem_to_dict(problem))[:12]
    save_problem(problem, Path(folder) / problem_name(fingerprint, kind, name))
    return name


def save_problem(problem: Problem, path: str | os.PathLike[str]) -> None:
    """Write a problem as JSON, whole or not at all: it can be solved again without the model or its device."""
    data = {"layerzero_problem": PROBLEM_VERSION, **problem_to_dict(problem)}
    try:
        write_whole(Path(path), json.dumps(data, separators=(",", ":")).encode())
    except OSError as error:
        why = f"cannot write the problem to {os.fspath(path)!r}: {error.strerror}"  # whose own text names the temporary file
        raise PlanError(f"{why}. Give a file in a folder that is writable.") from error


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    rest = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if f.name not in ("sources", "sinks", "tensor_class")}
    data = {name: _plain(value) for name, value in rest.items()}
    data["tensor_class"] = dict(problem.tensor_class)
    data["sources"] = [[t, dataclasses.asdict(f)] for t, f in sorted(problem.sources)]
    data["sinks"] = [[t, dataclasses.asdict(f)] for t, f in problem.sinks]
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def load_problem(path: str | os.PathLike[str]) -> Problem:
    """Read what `save_problem` wrote. PlanError for a file that is not one, is damaged, or is of another schema."""
    try:
        data = json.loads(read_limited(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the problem {os.fspath(path)!r}: {error}. `lz solve --problems FOLDER` writes some.") from error
    version = data.get("layerzero_problem") if isinstance(data, dict) else None
    if version != PROBLEM_VERSION:
        raise PlanError(f"{os.fspath(path)!r} is a problem of schema {version!r:.80}; this LayerZero reads {PROBLEM_VERSION}.")
    try:
        return problem_from_dict(data)
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"[:1000]
        raise PlanError(f"the problem {os.fspath(path)!r} is damaged ({what}).") from error


def problem_from_dict(d: Mapping[str, Any]) -> Problem:
    """The inverse of `problem_to_dict`. One of DAMAGE for data that is no problem."""
    problem = Problem(
        tuple(map(_candidate, d["candidates"])), tuple(map(_cost, d["costs"])),
        tuple(Conversion(str(c["tensor"]), _format(c["src"]), _format(c["dst"])) for c in d["conversions"]),
        tuple(map(_cost, d["conversion_costs"])), frozenset((str(t), _format(f)) for t, f in d["sources"]),
        tuple((str(t), _format(f)) for t, f in d["sinks"]), float(d["error_budget"]),
        None if d["memory_limit"] is None else int(d["memory_limit"]), tuple(map(int, d["candidate_class"])),
        {str(t): int(c) for t, c in d["tensor_class"].items()}, tuple(map(int, d.get("part", ()))),
    )  # fmt: skip
    sizes = len(problem.candidates), len(problem.conversions)
    if (len(problem.costs), len(problem.conversion_costs)) != sizes or {len(problem.candidate_class), len(problem.part)} - {0, sizes[0]}:
        raise ValueError("as many costs as candidates and conversions are needed, and a class and a part for each candidate or for none")
    return problem
