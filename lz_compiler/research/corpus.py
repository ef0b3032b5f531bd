"""Problems with their regions and timings as files: what cost models are trained on, and what `lz ablate` solves again.

A case is one graph planned for one device. It holds the integer program, the facts of every region that was priced (enough
to ask any cost model for its prices again), and every timing, by the candidates' keys. Gzipped JSON, nothing else.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backends.base import SelectionContext
from ..cost_models import CostModel, Priced
from ..errors import PlanError
from ..measure import PLACE
from ..options import Options
from ..plan_io import problem_from_dict, problem_to_dict, write_whole
from ..types import Candidate, Problem, Region, Rejection, Target, TensorSpec

VERSION = 1
SUFFIX = ".json.gz"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one kernel: median ns, spread (p80 - p20) in ns, and how many rounds counted."""

    ns: int
    spread: int
    samples: int


@dataclass(frozen=True, slots=True)
class Case:
    """`regions`: each distinct region with the keys of its candidates. `timings`: for each key one Sample or more, each from an
    independent measurement. `family`: cases of one family are never split between training and test."""

    name: str
    family: str
    target: Target
    options: Mapping[str, Any]
    problem: Problem
    regions: tuple[tuple[SelectionContext, tuple[str, ...]], ...]
    timings: Mapping[str, tuple[Sample, ...]]
    measuring_s: float = 0.0
    date: str = ""

    def candidates(self) -> dict[str, Candidate]:
        """One candidate for each key that has a timing."""
        return {c.key: c for c in reversed(self.problem.candidates) if c.key in self.timings}


class Recorder:
    """A cost model around another that remembers which regions were asked for, each once."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self.regions: dict[str, tuple[SelectionContext, tuple[str, ...]]] = {}

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        answers = self.model.price(ctx, candidates)
        keys = tuple(a[0].key for a in answers if not isinstance(a, Rejection) and a[0].key)
        if keys:
            self.regions.setdefault(json.dumps([region_to_dict(ctx), keys]), (ctx, keys))
        return answers


def region_to_dict(ctx: SelectionContext) -> dict[str, Any]:
    """A region's facts without its place in a graph. Parameters that are no plain values, and names, are left out."""
    return {
        "op": ctx.region.op, "roles": ctx.roles, "specs": [_spec(s) for s in ctx.specs], "outputs": [_spec(s) for s in ctx.outputs],
        "params": {k: v for k, v in sorted(ctx.params.items()) if k not in PLACE and _is_plain(v)},
        "frozen": sorted(ctx.frozen), "default": ctx.default,
    }  # fmt: skip


def region_from_dict(d: Mapping[str, Any]) -> SelectionContext:
    specs = [[TensorSpec(tuple(s[0]), tuple(s[1]), *s[2:]) for s in d[k]] for k in ("specs", "outputs")]
    region = Region(d["op"], (), tuple(d["roles"]), tuple(f"out{i}" for i in range(len(specs[1]))))
    params = {k: _tuples(v) for k, v in d["params"].items()}
    frozen, default = frozenset(d["frozen"]), bool(d["default"])
    return SelectionContext(region, tuple(d["roles"]), tuple(specs[0]), tuple(specs[1]), params, frozen, Options(), default)


def save(case: Case, folder: Path) -> Path:
    """Write FOLDER/NAME.json.gz, whole or not at all; the same case gives the same bytes."""
    data = {
        "layerzero_case": VERSION, "name": case.name, "family": case.family, "date": case.date, "measuring_s": case.measuring_s,
        "target": dataclasses.asdict(case.target), "options": dict(case.options), "problem": problem_to_dict(case.problem),
        "regions": [[region_to_dict(ctx), keys] for ctx, keys in case.regions],
        "timings": {key: [dataclasses.astuple(s) for s in taken] for key, taken in sorted(case.timings.items())},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}{SUFFIX}"
    write_whole(path, gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 9, mtime=0))
    return path


def load(path: Path) -> Case:
    """PlanError for a file that is not a case, is damaged, or is of another version."""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        if data["layerzero_case"] != VERSION:
            raise PlanError(f"{path} is a case of version {data['layerzero_case']!r}; this LayerZero reads {VERSION}. Collect it again.")
        return Case(
            data["name"], data["family"], Target(**data["target"]), data["options"], problem_from_dict(data["problem"]),
            tuple((region_from_dict(region), tuple(keys)) for region, keys in data["regions"]),
            {key: tuple(Sample(*s) for s in taken) for key, taken in data["timings"].items()},
            float(data["measuring_s"]), data["date"],
        )  # fmt: skip
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"cannot read the case {path} ({type(error).__name__}: {error}). Collect it again: benchmarks/corpus.py."
        ) from error


def load_all(folders: Iterable[Path]) -> list[Case]:
    """All cases below the folders, by name. PlanError if there are none."""
    folders = list(folders)
    paths = sorted(p for folder in folders for p in folder.rglob(f"*{SUFFIX}"))
    if not paths:
        raise PlanError(
            f"no case ({SUFFIX}) in {', '.join(map(str, folders))}. Run in a clone of the repository, "
            "which has them in benchmarks/corpora, or give --corpus DIR: python benchmarks/corpus.py --out DIR makes some."
        )
    return [load(path) for path in paths]


def with_prices(problem: Problem, prices: Mapping[str, Any]) -> Problem:
    """The problem with other prices: a Cost by candidate key. None bars the candidate; what is not named stays."""
    costs, candidates = list(problem.costs), list(problem.candidates)
    for i, c in enumerate(candidates):
        if c.key in prices:
            price = prices[c.key]
            if price is None:
                candidates[i] = replace(c, epsilon=float("inf"))  # no budget allows it: solvers leave it out, with its class
            else:
                costs[i] = price
    return replace(problem, costs=tuple(costs), candidates=tuple(candidates))


def _spec(s: TensorSpec) -> list[Any]:
    return [s.shape, s.stride, s.dtype, s.device]


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
