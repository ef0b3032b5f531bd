"""The cells of a model's plan as one integer program, in which a frozen weight has one form for all of them.

A form is what a kernel needs a weight to be in memory: plain, in another format, or packed in a library's way (Kernel.packs), alone or
merged with others. The program is the disjoint union of the cells' programs, its objective their sum, and for each weight w that some
kernel could read in several forms one more node, `weight w`, with one candidate of cost 0 for each form f, which writes the tensor
`weight w` in format f. Whatever reads w in form f, in any cell, reads that tensor too. So the planner's own rows say the rest:

    cover         sum_f z_wf <= 1, z_wf being the candidate that holds w in f
    availability  x_k <= z_wf for each candidate k of a library that reads w in f

and every solver, and `planner.check`, knows the rule without being told. Not in it: loops and plain calls (the lookup in an embedding, a
view), which read the values as they are whatever the kernels hold. Weights that the same decisions read in the same forms, those of
repeated blocks, are tied, so that 32 layers take the rows of one. All plain is a plan unless a policy refuses it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain

from torch import fx

from .. import backends, planner
from ..backends.base import natural_layout
from ..capture import GraphView
from ..cost_models import RefiningCostModel
from ..errors import SolverError
from ..options import Options
from ..planning import Posed, decode, refined, solve_within, solved
from ..types import Candidate, Conversion, Cost, Format, Plan, Problem, Region, Solution, Status

log = logging.getLogger(__name__)

PLAIN = "plain"
HELD = "weight"  # the kernel of a candidate that holds a weight in a form

Form = tuple[str, tuple[str, ...]]  # what it is, and the weights that are packed into one tensor
Reads = tuple[tuple[str, Form], ...]  # of a candidate: weight and form


@dataclass(frozen=True, slots=True)
class Joint:
    """What was decided for all cells together, in ns: `separate` is what the cells' own plans would take, whatever they hold."""

    weights: int
    objective: int
    bound: int
    separate: int
    status: Status
    solver: str

    def __str__(self) -> str:
        return (
            f"one format of each weight in all cells: {self.objective / 1e6:.3f} ms predicted over all of them, {self.status} by "
            f"{self.solver} (bound {self.bound / 1e6:.3f} ms); {self.separate / 1e6:.3f} ms with own formats for each cell"
        )


def reads(view: GraphView, candidate: Candidate) -> Reads:
    """The frozen weights that a library's kernel reads, each in the form in which it holds it; () for loops, views and plain calls."""
    params = dict(candidate.params)
    if "roles" not in params:
        return ()
    inputs = [(view.by_name[t], f) for t, f in zip(candidate.region.inputs, candidate.in_formats, strict=True)]
    frozen = [(node, f, _weights(view, node)) for node, f in inputs if view.is_constant(node)]
    packed = tuple(dict.fromkeys(w for _, f, weights in frozen if f.layout == "packed" for w in weights))
    found: dict[tuple[str, Form], None] = {}
    for node, f, weights in frozen:
        natural = f.layout.startswith("fused") or f == Format(natural_layout(view.spec(node)), view.spec(node).dtype)
        form: Form = (_packing(candidate), packed) if f.layout == "packed" else (PLAIN if natural else str(f), ())
        found |= dict.fromkeys((w, form) for w in weights)
    return tuple(found)


def _packing(candidate: Candidate) -> str:
    packs = backends.kernel(candidate.kernel).packs
    if packs is not None:
        return f"packed {packs(dict(candidate.params))}"
    place = ("values", "out_reshape")  # where it stands, not what it is
    return f"packed {candidate.kernel} {[(k, v) for k, v in candidate.params if k not in place]}"


def _weights(view: GraphView, node: fx.Node) -> tuple[str, ...]:
    """The weights on which a constant depends, by where they are in memory: one that two names share is one."""
    if node in view.frozen:
        return (f"{view.frozen[node].data_ptr():x}",)
    return tuple(dict.fromkeys(w for n in node.all_input_nodes for w in _weights(view, n)))


def forms(table: Sequence[Sequence[Reads]]) -> dict[str, dict[Form, int]]:
    """For each weight that some kernel of some cell reads in another form than others do: its forms, numbered, plain ones first."""
    found: dict[str, dict[Form, None]] = {}
    for weight, form in chain.from_iterable(chain.from_iterable(table)):
        found.setdefault(weight, {})[form] = None
    several = {w: sorted(fs, key=lambda f: f[0] != PLAIN) for w, fs in found.items() if len(fs) > 1}
    return {w: {form: i for i, form in enumerate(ordered)} for w, ordered in several.items()}


def held(table: Sequence[Sequence[Reads]], solutions: Sequence[Solution]) -> dict[str, set[Form]]:
    """The forms in which the plans of all cells hold each weight."""
    found: dict[str, set[Form]] = {}
    for cell, solution in zip(table, solutions, strict=True):
        for weight, form in chain.from_iterable(cell[k] for k in solution.chosen):
            found.setdefault(weight, set()).add(form)
    return found


def join(problems: Sequence[Problem], table: Sequence[Sequence[Reads]]) -> Problem:
    """The cells' programs as one, with a node for each weight that has several forms. Candidates and conversions keep their order,
    cell by cell; what holds weights comes last. The cells' error budgets and memory limits must be equal."""
    linked = forms(table)
    classes: dict[Hashable, int] = {}
    candidates: list[Candidate] = []
    tied: list[int] = []
    readers: dict[str, dict[tuple[int, int], None]] = {w: {} for w in linked}
    for cell, (problem, rows) in enumerate(zip(problems, table, strict=True)):
        kinds = problem.candidate_class or range(len(problem.candidates))
        for candidate, kind, row in zip(problem.candidates, kinds, rows, strict=True):
            number = classes.setdefault((cell, kind), len(classes))
            extra = [(w, linked[w][form]) for w, form in row if w in linked]
            for weight, i in extra:
                readers[weight][number, i] = None
            candidates.append(_reading(_placed(candidate, cell), extra))
            tied.append(number)
    for weight, known in linked.items():
        same = frozenset(readers[weight])
        for i in known.values():
            region = Region(HELD, (f"{HELD} {weight}",), (), (f"{HELD} {weight}",))
            candidates.append(Candidate(HELD, region, (), (_form(i),)))
            tied.append(classes.setdefault((same, i), len(classes)))
    colours: dict[Hashable, int] = {}
    holders = sum(map(len, linked.values()))
    return Problem(
        tuple(candidates), (*chain.from_iterable(p.costs for p in problems), *[Cost(0, "assumed")] * holders),
        tuple(Conversion(f"{i}/{c.tensor}", c.src, c.dst) for i, p in enumerate(problems) for c in p.conversions),
        tuple(chain.from_iterable(p.conversion_costs for p in problems)),
        frozenset((f"{i}/{t}", f) for i, p in enumerate(problems) for t, f in p.sources),
        tuple((f"{i}/{t}", f) for i, p in enumerate(problems) for t, f in p.sinks),
        problems[0].error_budget, problems[0].memory_limit, tuple(tied),
        {f"{i}/{t}": colours.setdefault((i, c), len(colours)) for i, p in enumerate(problems) for t, c in p.tensor_class.items()},
        (*(i for i, p in enumerate(problems) for _ in p.candidates), *[0] * holders),
    )  # fmt: skip


def _form(index: int) -> Format:
    return Format(f"form {index}", "")


def _placed(candidate: Candidate, cell: int) -> Candidate:
    r = candidate.region
    nodes, inputs, outputs = (tuple(f"{cell}/{name}" for name in names) for names in (r.nodes, r.inputs, r.outputs))
    return replace(candidate, region=Region(r.op, nodes, inputs, outputs))


def _reading(candidate: Candidate, extra: Sequence[tuple[str, int]]) -> Candidate:
    region = replace(candidate.region, inputs=(*candidate.region.inputs, *(f"{HELD} {w}" for w, _ in extra)))
    return replace(candidate, region=region, in_formats=(*candidate.in_formats, *(_form(i) for _, i in extra)))


def split(problems: Sequence[Problem], whole: Solution) -> list[Solution]:
    """Each cell's part of the joint solution. Its bound: how cheap it could be while the others stay as they are."""
    parts = []
    firsts = accumulate((len(p.candidates) for p in problems), initial=0)
    moves = accumulate((len(p.conversions) for p in problems), initial=0)
    for problem, first, move in zip(problems, firsts, moves, strict=False):
        chosen = tuple(k - first for k in whole.chosen if 0 <= k - first < len(problem.candidates))
        converted = tuple(c - move for c in whole.converted if 0 <= c - move < len(problem.conversions))
        ns = sum(problem.costs[k].weighed for k in chosen) + sum(problem.conversion_costs[c].weighed for c in converted)
        parts.append(replace(whole, chosen=chosen, converted=converted, objective=ns, bound=max(0, ns - (whole.objective - whole.bound))))
    return parts


def plan_cells(cells: Sequence[Posed], options: Options) -> tuple[list[Plan], Joint | None]:
    """A plan for each cell, so that each weight has one form, and what that costs. Where the cells' own plans agree, they are it.
    Where no such plan exists (a policy locks what packs otherwise in each cell), or is found in time: each cell's own plan, and None."""
    pairs = [solved(posed) for posed in cells]
    cells, own = [posed for posed, _ in pairs], [solution for _, solution in pairs]
    table = [[reads(posed.view, k) for k in posed.problem.candidates] for posed in cells]
    start = time.perf_counter()
    problems, solutions, result = [posed.problem for posed in cells], own, None
    objective, bound = sum(s.objective for s in own), sum(s.bound for s in own)
    separate, note = objective, ""
    if any(len(fs) > 1 for fs in held(table, own).values()):
        try:
            problems, whole = _together(cells, table, options)
        except SolverError as error:
            note = f"weights have a format for each cell, since no plan with one format was found: {error}"
        else:
            solutions, objective, bound = split(problems, whole), whole.objective, whole.bound
            assert all(len(fs) == 1 for fs in held(table, solutions).values())
    if not note:
        proved = all(s.status is Status.OPTIMAL for s in solutions)
        status = Status.OPTIMAL if proved else Status.FEASIBLE
        result = Joint(len(forms(table)), objective, bound, separate, status, solutions[0].solver)
        note = str(result)
    each = (time.perf_counter() - start) / len(cells)
    log.info("%d cells together: %s; %.2f s", len(cells), note, each * len(cells))
    done = [replace(posed, problem=problem, seconds=posed.seconds + each) for posed, problem in zip(cells, problems, strict=True)]
    notes = (note,) if result is None else ()
    return [decode(posed, solution, notes) for posed, solution in zip(done, solutions, strict=True)], result


def _together(cells: Sequence[Posed], table: Sequence[Sequence[Reads]], options: Options) -> tuple[list[Problem], Solution]:
    """The cells' problems and the joint solution. A cost model that measures what matters refines each cell's prices until no cell's
    change any more."""
    problems = [posed.problem for posed in cells]

    def solve(given: Sequence[Problem]) -> Solution:
        whole = solve_within(join(given, table), options, len(given))
        untied = [replace(problem, candidate_class=(), tensor_class={}) for problem in given]  # as the whole may have had to be solved
        wrong = [line for problem, part in zip(untied, split(given, whole), strict=True) for line in planner.check(problem, part)]
        assert not wrong, f"a cell's part of the joint plan breaks its own rules: {wrong[:5]}"
        return whole

    def part(cell: int, problem: Problem) -> Solution:
        given = [*problems[:cell], problem, *problems[cell + 1 :]]
        return split(given, solve(given))[cell]

    changed = any(isinstance(posed.model, RefiningCostModel) for posed in cells)
    while changed:
        before = list(problems)
        for i, posed in enumerate(cells):
            problems[i], _ = refined(posed, problems[i], partial(part, i))
        changed = any(new is not old for new, old in zip(problems, before, strict=True))
    return problems, solve(problems)
