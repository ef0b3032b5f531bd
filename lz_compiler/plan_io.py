"""Plans as plain data and back: JSON, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    )


def plan_from_dict(d: Mapping[str, Any]) -> Plan:
    if d.get("schema_version") != VERSION:
        raise PlanError(f"a plan of schema version {d.get('schema_version')!r}; this LayerZero reads {VERSION}. Plan again.")
    fields = {f.name: d[f.name] for f in dataclasses.fields(Plan) if f.name in d or f.name != "barred"}  # older plans have none
    conversions = tuple((Conversion(c["tensor"], _format(c["src"]), _format(c["dst"])), Cost(**k)) for c, k in d["conversions"])
    fields |= {
        "choices": tuple(map(_choice, d["choices"])), "conversions": conversions, "status": Status(d["status"]),
        "notes": tuple(d["notes"]), "barred": tuple(d.get("barred", ())),
    }  # fmt: skip
    return Plan(**fields)


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    """A problem as plain data, so that it can be solved again without the model or its device."""
    d: dict[str, Any] = {f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)}
    for name in ("candidates", "costs", "conversions", "conversion_costs"):
        d[name] = [dataclasses.asdict(item) for item in d[name]]
    d["tensor_class"] = dict(problem.tensor_class)
    d["sources"] = [[t, dataclasses.asdict(f)] for t, f in sorted(problem.sources)]
    d["sinks"] = [[t, dataclasses.asdict(f)] for t, f in problem.sinks]
    return d


def problem_from_dict(d: Mapping[str, Any]) -> Problem:
    """KeyError, TypeError or ValueError for data that is no problem."""
    return Problem(
        tuple(map(_candidate, d["candidates"])), tuple(Cost(**c) for c in d["costs"]),
        tuple(Conversion(c["tensor"], _format(c["src"]), _format(c["dst"])) for c in d["conversions"]),
        tuple(Cost(**c) for c in d["conversion_costs"]), frozenset((t, _format(f)) for t, f in d["sources"]),
        tuple((t, _format(f)) for t, f in d["sinks"]), float(d["error_budget"]), d["memory_limit"],
        tuple(d["candidate_class"]), dict(d["tensor_class"]),
    )  # fmt: skip
