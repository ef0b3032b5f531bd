"""Plans as plain data and back: JSON, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import PlanError
from .types import Candidate, Choice, Conversion, Cost, Format, Plan, Region, Rejection, Status

VERSION = 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {"schema_version": VERSION, **dataclasses.asdict(plan)}


def _is(value: Any, *kinds: type) -> Any:
    """A value of one of these types, exactly: True is no number. TypeError otherwise."""
    if type(value) not in kinds:
        raise TypeError(f"{value!r:.80} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _names(values: Any) -> tuple[str, ...]:
    return tuple(_is(value, str) for value in _is(values, list, tuple))


def _format(d: Mapping[str, Any]) -> Format:
    return Format(_is(d["layout"], str), _is(d["dtype"], str))


def _cost(d: Mapping[str, Any]) -> Cost:
    cost = Cost(**d)
    _is(cost.ns, int), _is(cost.source, str), _is(cost.spread, int), _is(cost.factor, float, int)
    return cost


def _rejection(d: Mapping[str, Any]) -> Rejection:
    return Rejection(*(_is(d[name], str) for name in ("kernel", "code", "detail")))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _candidate(d: Mapping[str, Any]) -> Candidate:
    region = Region(_is(d["region"]["op"], str), *(_names(d["region"][k]) for k in ("nodes", "inputs", "outputs")))
    return Candidate(
        kernel=_is(d["kernel"], str), region=region, in_formats=tuple(map(_format, d["in_formats"])),
        out_formats=tuple(map(_format, d["out_formats"])), epsilon=_is(d["epsilon"], float, int),
        workspace=_is(d["workspace"], int), params=tuple((_is(k, str), _tuples(v)) for k, v in d["params"]), key=_is(d["key"], str),
    )  # fmt: skip


def _choice(d: Mapping[str, Any]) -> Choice:
    return Choice(
        _candidate(d["candidate"]),
        _cost(d["cost"]),
        tuple((_candidate(c), _cost(k)) for c, k in d["alternatives"]),
        tuple(map(_rejection, d["rejections"])),
    )


def plan_from_dict(d: Mapping[str, Any]) -> Plan:
    if d.get("schema_version") != VERSION:
        raise PlanError(f"a plan of schema version {d.get('schema_version')!r}; this LayerZero reads {VERSION}. Plan again.")
    fields = {f.name: d[f.name] for f in dataclasses.fields(Plan) if f.name in d or f.name != "barred"}  # older plans have none
    conversions = tuple((Conversion(_is(c["tensor"], str), _format(c["src"]), _format(c["dst"])), _cost(k)) for c, k in d["conversions"])
    fields |= {
        "choices": tuple(map(_choice, d["choices"])), "conversions": conversions, "status": Status(d["status"]),
        "notes": _names(d["notes"]), "barred": _names(d.get("barred", ())),
        "environment": {_is(k, str): _is(v, str) for k, v in d["environment"].items()},
        **{name: _is(d[name], str) for name in ("fingerprint", "kind", "solver")},
        **{name: _is(d[name], int, float) for name in ("objective", "bound", "epsilon", "plan_s")},
    }  # fmt: skip
    return Plan(**fields)


def verdict_or_none(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A stored verdict if it can be followed; None for one that is damaged, or of another version."""
    try:
        if value is not None:
            _is(value["winner"], str)
            dict(_is(value["times"], dict)), [plan_from_dict(p) for p in value["plans"]]
            _is(value.get("error"), float, int, type(None)), _is(value.get("written"), list, type(None))
            for names in value.get("calls", {}).values():
                _names(names)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return None
    return value
