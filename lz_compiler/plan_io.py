"""Plans and problems as plain data and back: JSON, nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import PlanError
from .types import Candidate, Choice, Conversion, Cost, Format, Plan, Problem, Region, Rejection, Status

VERSION = 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {"schema_version": VERSION, **dataclasses.asdict(plan)}


def _format(d: Mapping[str, Any]) -> Format:
    return Format(d["layout"], d["dtype"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _candidate(d: Mapping[str, Any]) -> Candidate:
    region = Region(d["region"]["op"], *(tuple(d["region"][k]) for k in ("nodes", "inputs", "outputs")))
    return Candidate(
        kernel=d["kernel"], region=region, in_formats=tuple(map(_format, d["in_formats"])),
        out_formats=tuple(map(_format, d["out_formats"])), epsilon=d["epsilon"], workspace=d["workspace"],
        params=tuple((k, _tuples(v)) for k, v in d["params"]), key=d["key"],
    )  # fmt: skip


def _choice(d: Mapping[str, Any]) -> Choice:
    return Choice(
        _candidate(d["candidate"]),
        Cost(**d["cost"]),
        tuple((_candidate(c), Cost(**k)) for c, k in d["alternatives"]),
        tuple(Rejection(**r) for r in d["rejections"]),
        d.get("flops", 0), d.get("nbytes", 0), tuple(d.get("after", ())),
    )  # fmt: skip


def plan_from_dict(d: Mapping[str, Any]) -> Plan:
    if d.get("schema_version") != VERSION:
        raise PlanError(f"a plan of schema version {d.get('schema_version')!r}; this LayerZero reads {VERSION}. Plan again.")
    later = ("barred", "peaks")  # older plans have none
    fields = {f.name: d[f.name] for f in dataclasses.fields(Plan) if f.name in d or f.name not in later}
    conversions = tuple((Conversion(c["tensor"], _format(c["src"]), _format(c["dst"])), Cost(**k)) for c, k in d["conversions"])
    fields |= {
        "choices": tuple(map(_choice, d["choices"])), "conversions": conversions, "status": Status(d["status"]),
        "notes": tuple(d["notes"]), "barred": tuple(d.get("barred", ())),
    }  # fmt: skip
    return Plan(**fields)


PROBLEM_VERSION = 1


def problem_name(fingerprint: str, kind: str, lossy: bool) -> str:
    """The file of a graph's problem in the folder of the option `problems`."""
    return f"{fingerprint}.{kind}.{'lossy' if lossy else 'lossless'}.problem.json"


def save_problem(problem: Problem, path: str | os.PathLike[str]) -> None:
    """Write a problem as JSON, whole or not at all: it can be solved again without the model or its device."""
    rest = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if f.name not in ("sources", "sinks", "tensor_class")}
    data = {"layerzero_problem": PROBLEM_VERSION, **{name: _plain(value) for name, value in rest.items()}}
    data["tensor_class"] = dict(problem.tensor_class)
    data["sources"] = [[t, dataclasses.asdict(f)] for t, f in sorted(problem.sources)]
    data["sinks"] = [[t, dataclasses.asdict(f)] for t, f in problem.sinks]
    target = Path(path)
    half = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        half.write_text(json.dumps(data, separators=(",", ":")))
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise PlanError(f"cannot write the problem to {os.fspath(path)!r}: {error}. Give a file in a folder that is writable.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def load_problem(path: str | os.PathLike[str]) -> Problem:
    """Read what `save_problem` wrote. PlanError for a file that is not one, is damaged, or is of another schema."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the problem {os.fspath(path)!r}: {error}. `lz solve --problems FOLDER` writes some.") from error
    version = data.get("layerzero_problem") if isinstance(data, dict) else None
    if version != PROBLEM_VERSION:
        raise PlanError(f"{os.fspath(path)!r} is a problem of schema {version!r}; this LayerZero reads {PROBLEM_VERSION}.")
    try:
        return _problem(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"the problem {os.fspath(path)!r} is damaged ({type(error).__name__}: {error}).") from error


def _problem(d: Mapping[str, Any]) -> Problem:
    problem = Problem(
        tuple(map(_candidate, d["candidates"])), tuple(map(_cost, d["costs"])),
        tuple(Conversion(str(c["tensor"]), _format(c["src"]), _format(c["dst"])) for c in d["conversions"]),
        tuple(map(_cost, d["conversion_costs"])), frozenset((str(t), _format(f)) for t, f in d["sources"]),
        tuple((str(t), _format(f)) for t, f in d["sinks"]), float(d["error_budget"]),
        None if d["memory_limit"] is None else int(d["memory_limit"]), tuple(map(int, d["candidate_class"])),
        {str(t): int(c) for t, c in d["tensor_class"].items()},
    )  # fmt: skip
    sizes = len(problem.candidates), len(problem.conversions)
    if (len(problem.costs), len(problem.conversion_costs)) != sizes or len(problem.candidate_class) not in (0, sizes[0]):
        raise ValueError("as many costs as candidates and conversions are needed, and a class for each candidate or for none")
    for c in problem.candidates:
        if (len(c.in_formats), len(c.out_formats)) != (len(c.region.inputs), len(c.region.outputs)) or not c.region.nodes:
            raise ValueError(f"a candidate of {c.kernel} needs nodes, and one format for each input and output")
    return problem


def _cost(d: Mapping[str, Any]) -> Cost:
    cost = Cost(int(d["ns"]), str(d["source"]), int(d["spread"]), float(d["factor"]))
    if cost.ns < 0 or not 0 < cost.factor < float("inf"):
        raise ValueError(f"a price of {cost.ns} ns with factor {cost.factor}")
    return cost
