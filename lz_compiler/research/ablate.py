"""Cost models and solvers compared on stored problems: `lz ablate`.

Every case (corpus.py) is planned with the prices of each cost model and by each solver, and every plan is judged by the same
measured prices: the median of the later measurements, where there are several, while models are given the first. So the regret
of planning by measurements (`measured`) is the noise floor, not zero by definition. Learned models never see the family of the
case that they price (experiment `models`), nor, in a second one (`device`), its device.

Two long tables are written row by row, so that a stopped run goes on where it was: `plans.csv` (a plan a row) and `prices.csv`
(a kernel a row). The first is also written as Parquet where pyarrow is installed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import planner
from ..backends.base import SelectionContext
from ..cost_models import CostModel, Priced, RefiningCostModel, learned
from ..cost_models.constant import Constant
from ..cost_models.hybrid import TOLERANCE, Hybrid
from ..cost_models.inductor import Inductor, unknown_rates
from ..cost_models.learned import Forest, Learned
from ..cost_models.roofline import Roofline, traffic_ns
from ..errors import OptionError, SolverError, TooFewError, unknown
from ..plan_io import write_whole
from ..types import Candidate, Cost, Problem, Rejection, Solution, Target
from .corpus import Case, Sample, with_prices

# And `hybrid:0.05`, of another tolerance. `learned:always` never abstains.
MODELS = ("measured", "hybrid", "learned", "learned:always", "roofline", "inductor", "constant")
SOLVERS = ("cp_sat", "highs", "dynamic", "lp_rounding", "local_search", "greedy", "one_layout", "priority")
EXPERIMENTS = ("models", "device")
KEY = ("case", "digest", "experiment", "cost_model", "seed")  # of one cost model on one case
FOLDS = 6
SOLVE_S = 20.0


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One plan. `predicted_ns`: its price by the model; `judged_ns`: by the measured prices; `best_ns`: the least there is by these
    (`regret` = judged / best - 1). `gap`: what the solver left unproved. `tau`: Kendall's, within regions. `measured`, `kernels`: kernels
    that the model measured, of all. `moved`: regions decided otherwise than in the best plan. `estimated_measure_s`: nothing is measured
    here, so this is the time that measuring the whole case once took, times `measured` / `kernels`."""

    case: str
    family: str
    device: str
    digest: str
    experiment: str
    cost_model: str
    solver: str
    seed: int
    status: str
    predicted_ns: int
    judged_ns: int
    best_ns: int
    regret: float
    gap: float
    tau: float
    pairs: int
    measured: int
    kernels: int
    abstained: int
    moved: str
    price_s: float
    solve_s: float
    estimated_measure_s: float


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One kernel: the model's price (0 where it abstained) and the measured one; `spread_ns`: of the measurement."""

    case: str
    device: str
    digest: str
    experiment: str
    cost_model: str
    seed: int
    region: int
    op: str
    kernel: str
    predicted_ns: int
    measured_ns: int
    spread_ns: int


class Recorded:
    """A case's own measurements as a cost model: the first, or (`judge`) the median of the others, where there are others."""

    name = "recorded"

    def __init__(self, case: Case, judge: bool = False) -> None:
        self.case, self.judge, self.asked = case, judge, 0

    def sample(self, key: str) -> Sample:
        first, *others = self.case.timings[key]
        others = sorted(others, key=lambda s: s.ns)
        return others[(len(others) - 1) // 2] if self.judge and others else first

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        self.asked += len(candidates)
        return [(c, self.cost(c)) for c in candidates]

    def cost(self, candidate: Candidate) -> Cost:
        target, taken = self.case.target, self.sample(candidate.key)
        ns = max(taken.ns, target.least_ns)
        extra = traffic_ns(target, candidate.param("traffic", 0))
        return Cost(ns + extra, "measured", taken.spread)


class Nothing:
    """Knows no price."""

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        return [Rejection(c.kernel, "not_measured", "nothing is known yet") for c in candidates]


def digest(case: Case) -> str:
    """Changes with the case's prices and candidates."""
    text = repr((case.name, case.problem.costs, sorted(case.timings.items()), [c.key for c in case.problem.candidates]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def training_rows(cases: Iterable[Case], without: Iterable[Case] = ()) -> list[learned.Row]:
    """One row for each kernel, of the first measurement; none for regions that the cases in `without` have too."""
    barred = {_shape(ctx) for case in without for ctx, _ in case.regions}
    seen: set[str] = set()
    found: list[tuple[SelectionContext, Candidate, Target, int, str]] = []
    for case in cases:
        candidates = case.candidates()
        for ctx, keys in case.regions:
            for key in keys:
                if key in candidates and key not in seen and _shape(ctx) not in barred:
                    seen.add(key)
                    found.append((ctx, candidates[key], case.target, case.timings[key][0].ns, case.family))
    return learned.rows_of(found)


def _shape(ctx: SelectionContext) -> object:
    return ctx.region.op, ctx.specs, ctx.outputs


class Forests:
    """Trained models by what they may not have seen; each trained once. Families are dealt into folds by the seed."""

    def __init__(self, cases: Sequence[Case], size: Mapping[str, int]) -> None:
        self.cases, self.size = cases, size
        self._made: dict[object, Forest] = {}

    def of(self, case: Case, experiment: str, seed: int) -> Forest:
        families = sorted({c.family for c in self.cases})
        random.Random(seed).shuffle(families)
        fold = families.index(case.family) % FOLDS
        held = {f for i, f in enumerate(families) if i % FOLDS == fold} if experiment == "models" else set()
        device = case.target.name if experiment == "device" else None
        key = experiment, device, tuple(sorted(held)), seed
        if key not in self._made:
            out = [c for c in self.cases if c.family in held or c.target.name == device]
            rows = training_rows([c for c in self.cases if c not in out], out)
            self._made[key] = learned.fit(rows, seed, **self.size, trained_on=f"all but {experiment} {device or sorted(held)}")
        return self._made[key]


def make_model(name: str, case: Case, forest: Callable[[], Forest]) -> CostModel:
    if name == "measured":
        return Recorded(case)
    if name == "roofline":
        return Roofline(case.target)
    if name == "inductor":
        return Inductor(case.target)
    if name == "constant":
        return Constant(case.target)
    if name.startswith("learned"):
        return Learned(case.target, forest(), abstains=name != "learned:always")
    tolerance = float(name.partition(":")[2] or TOLERANCE)  # hybrid:0.05
    return Hybrid(Learned(case.target, forest()), Nothing(), Recorded(case), lambda ctx, c: c.key, tolerance=tolerance)


def is_trained(name: str) -> bool:
    return name.startswith(("learned", "hybrid"))


def priced(case: Case, model: CostModel) -> tuple[dict[str, Cost | None], list[tuple[int, str, Cost | None]]]:
    """The model's prices by key, None where it abstains, and the same by region."""
    candidates, prices, listed = case.candidates(), {}, []
    for i, (ctx, keys) in enumerate(case.regions):
        known = [key for key in keys if key in candidates]
        for key, answer in zip(known, model.price(ctx, [candidates[key] for key in known]), strict=True):
            prices[key] = None if isinstance(answer, Rejection) else answer[1]
            listed.append((i, key, prices[key]))
    return prices, listed


def kendall(pairs: Iterable[tuple[float, float]]) -> tuple[int, int]:
    """(concordant - discordant, pairs that differ in truth) among (predicted, measured); ties in the prediction count 0."""
    items = list(pairs)
    score = count = 0
    for i, (p, m) in enumerate(items):
        for q, n in items[:i]:
            if m != n:
                count += 1
                score += 0 if p == q else 1 if (p < q) == (m < n) else -1
    return score, count


def tau_of(case: Case, listed: Sequence[tuple[int, str, Cost | None]], judge: Recorded) -> tuple[float, int]:
    """Kendall's tau over pairs of kernels of the same region, and the number of pairs."""
    by_region: dict[int, list[tuple[float, float]]] = {}
    candidates = case.candidates()
    for region, key, cost in listed:
        if cost is not None:
            by_region.setdefault(region, []).append((cost.ns, judge.cost(candidates[key]).ns))
    scores = [kendall(pairs) for pairs in by_region.values()]
    total = sum(n for _, n in scores)
    return (sum(s for s, _ in scores) / total if total else float("nan")), total


def judged(problem: Problem, solution: Solution) -> int:
    return sum(problem.costs[k].weighed for k in solution.chosen) + sum(problem.conversion_costs[c].weighed for c in solution.converted)


def moved(problem: Problem, solution: Solution, best: Solution) -> str:
    """Kernels that one plan uses where the other does not: `3 aten.mm > 3 onednn.linear_packed` (best plan's on the right). Those that both
    sides name with what they absorb and the formats that they read and write."""
    chosen, other = set(solution.chosen), set(best.chosen)
    sides = [[problem.candidates[k] for k in side if problem.candidates[k].key] for side in (chosen - other, other - chosen)]
    both = {c.kernel for c in sides[0]} & {c.kernel for c in sides[1]}
    counts = [Counter(_told(c, c.kernel in both) for c in side) for side in sides]
    texts = [" + ".join(f"{n} {name}" for name, n in sorted(c.items())) for c in counts]
    return " > ".join(texts) if any(texts) else ""


def _told(candidate: Candidate, closely: bool) -> str:
    if not closely:
        return candidate.kernel
    absorbed = " + ".join(str(p) for name, p in candidate.params if name in ("act", "binary") and p)
    formats = dict.fromkeys(map(str, (candidate.in_formats[0], *candidate.out_formats)))
    size = len(candidate.region.nodes)
    words = (absorbed, " to ".join(formats), f"{size} nodes" if size > 1 else "")
    return f"{candidate.kernel} ({', '.join(filter(None, words))})"


@dataclass(frozen=True, slots=True)
class Work:
    """One cost model on one case, for all solvers that are not done."""

    case: Case
    experiment: str
    cost_model: str
    seed: int
    solvers: tuple[str, ...]

    def key(self) -> tuple[str, ...]:
        return self.case.name, digest(self.case), self.experiment, self.cost_model, str(self.seed)  # as in KEY


def plan_rows(work: Work, forests: Forests, best: tuple[Problem, Solution]) -> tuple[list[PlanRow], list[PriceRow]]:
    """All plans of one case by one cost model, and its prices."""
    case, (judge_problem, best_solution) = work.case, best
    judge = Recorded(case, judge=True)
    model = make_model(work.cost_model, case, lambda: forests.of(case, work.experiment, work.seed))
    start = time.perf_counter()
    prices, listed = priced(case, model)
    price_s = time.perf_counter() - start
    problem = with_prices(case.problem, prices)
    rows, name = [], digest(case)
    for solver in work.solvers:
        start = time.perf_counter()
        problem, solution = _solved(problem, solver, model)
        solve_s = time.perf_counter() - start
        if solution is None or not solution.chosen:
            continue
        cost = judged(judge_problem, solution)
        tau, pairs = tau_of(case, listed, judge)
        asked = model.measured + model.checked if isinstance(model, Hybrid) else len(case.timings) if isinstance(model, Recorded) else 0
        rows.append(PlanRow(
            case.name, case.family, case.target.name, name, work.experiment, work.cost_model, solver, work.seed,
            str(solution.status), solution.objective, cost, best_solution.objective, cost / best_solution.objective - 1,
            solution.gap, tau, pairs, asked, len(case.timings), sum(p is None for p in prices.values()),
            moved(judge_problem, solution, best_solution), price_s, solve_s, case.measuring_s * asked / max(len(case.timings), 1),
        ))  # fmt: skip
    candidates = case.candidates()
    kernels = [
        PriceRow(
            case.name, case.target.name, name, work.experiment, work.cost_model, work.seed, region,
            case.regions[region][0].region.op, candidates[key].kernel, cost.ns if cost else 0,
            judge.cost(candidates[key]).ns, judge.sample(key).spread,
        )
        for region, key, cost in listed
    ]  # fmt: skip
    return rows, kernels


def _solved(problem: Problem, solver: str, model: CostModel) -> tuple[Problem, Solution | None]:
    """None where the solver refuses the problem."""

    def solve(posed: Problem) -> Solution:
        solution = planner.solve(posed, solver, SOLVE_S)
        assert not planner.check(posed, solution)
        return solution

    try:
        if isinstance(model, RefiningCostModel):
            return model.refine(problem, solve)
        return problem, solve(problem)
    except SolverError:
        return problem, None


def best_plan(case: Case) -> tuple[Problem, Solution]:
    """The problem with the judge's prices, and the least plan by them."""
    judge = Recorded(case, judge=True)
    prices = {key: judge.cost(c) for key, c in case.candidates().items()}
    problem = with_prices(case.problem, prices)
    return problem, planner.solve(problem, "cp_sat", 3 * SOLVE_S)


def schedule(cases: Sequence[Case], models: Sequence[str], solvers: Sequence[str], seeds: Sequence[int]) -> Iterator[Work]:
    """Solvers other than the first are compared on measured prices only; no case has a model that knows nothing of its device."""
    devices = {c.target.name for c in cases}
    for case in cases:
        for model in models:
            if model == "inductor" and unknown_rates(case.target):
                continue
            for experiment in EXPERIMENTS if is_trained(model) and len(devices) > 1 else EXPERIMENTS[:1]:
                for seed in seeds if is_trained(model) and experiment == "models" else seeds[:1]:
                    yield Work(case, experiment, model, seed, tuple(solvers if model == "measured" else solvers[:1]))


def run(
    cases: Sequence[Case], out: Path, models: Sequence[str] = MODELS, solvers: Sequence[str] = SOLVERS, seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], object] = lambda _: None, size: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Append what is missing to OUT/plans.csv and OUT/prices.csv. `size`: members and trees of learned models.

    OptionError for names that do not exist, or if no model prices any case.
    """
    for what, names, known in (("cost model", models, MODELS), ("solver", solvers, planner.SOLVERS)):
        for name in names:
            if name not in known and not (what == "cost model" and re.fullmatch(r"hybrid:0\.\d+", name)):
                raise OptionError(unknown(what, name, known))
    out.mkdir(parents=True, exist_ok=True)
    plans, prices = Table(out / "plans.csv", PlanRow), Table(out / "prices.csv", PriceRow)
    current = {c.name: digest(c) for c in cases}
    plans.keep(lambda r: current.get(r["case"], r["digest"]) == r["digest"])
    done: dict[tuple[str, ...], set[str]] = {}  # solvers
    for r in plans.rows():
        done.setdefault(tuple(r[name] for name in KEY), set()).add(r["solver"])
    prices.keep(lambda r: tuple(r[name] for name in KEY) in done)
    if "inductor" in models:
        for why in dict.fromkeys(filter(None, (unknown_rates(c.target) for c in cases))):
            say(f"inductor left out: {why}")
    forests = Forests(cases, size or {})
    planned = [(work, done.get(work.key(), set())) for work in schedule(cases, models, solvers, seeds)]
    if not planned:
        raise OptionError("none of the cost models asked for prices any of these cases. Ask for others, or for other cases.")
    todo = [replace(work, solvers=tuple(s for s in work.solvers if s not in known)) for work, known in planned]
    todo = [work for work in todo if work.solvers]
    best: dict[str, tuple[Problem, Solution]] = {}
    for i, work in enumerate(todo):
        say(f"{i + 1}/{len(todo)} {work.case.name}: {work.cost_model}, {work.experiment} held out, seed {work.seed}")
        if work.case.name not in best:
            best = {work.case.name: best_plan(work.case)}
        try:
            rows, kernels = plan_rows(work, forests, best[work.case.name])
        except TooFewError as error:
            say(f"  left out: {error}")
            continue
        if work.key() not in done:
            prices.append(kernels)
        plans.append(rows)  # last: what is here is done
    plans.to_parquet()


class Table:
    """A CSV file that only grows: a call's rows reach the disk together, and half a line of a killed run is cut off."""

    def __init__(self, path: Path, kind: type[PlanRow] | type[PriceRow]) -> None:
        self.path, self.names = path, [f.name for f in fields(kind)]
        header = ",".join(self.names) + "\n"
        text = path.read_bytes() if path.exists() else b""
        if not text.startswith(header.encode()):
            path.write_text(header)
        elif not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def keep(self, wanted: Callable[[Mapping[str, str]], bool]) -> None:
        """Drop the other rows: of cases that have changed, or of a unit of work that was killed before its end."""
        rows = self.rows()
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            text = io.StringIO()
            writer = csv.DictWriter(text, self.names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
            write_whole(self.path, text.getvalue().encode())

    def append(self, rows: Sequence[PlanRow] | Sequence[PriceRow]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([[_cell(getattr(row, name)) for name in self.names] for row in rows])
            file.flush()
            os.fsync(file.fileno())

    def to_parquet(self) -> None:
        try:
            import pyarrow.csv
            import pyarrow.parquet
        except ImportError:  # of the extra `research`: the CSV file holds the same
            return
        pyarrow.parquet.write_table(pyarrow.csv.read_csv(self.path), self.path.with_suffix(".parquet"))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def train(cases: Sequence[Case], path: Path) -> Forest:
    """Train on all cases and write the model that `cost_model="learned"` reads. OptionError for a file in no folder."""
    if not path.absolute().parent.is_dir():  # told now, not after the training
        raise OptionError(f"there is no folder for {str(path)!r}. Make it first.")
    devices = sorted({c.target.name for c in cases})
    forest = learned.fit(training_rows(cases), trained_on=f"{len(cases)} cases on {', '.join(devices)}")
    forest.save(path)
    return forest
