"""Cells planned together: a weight has one form, at the least cost over all cells; the baked file holds it once."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_planner import A, B, agree, kernel, problem, problems
from torch import nn

import lz_compiler as lz
from lz_compiler import backends
from lz_compiler.deploy.joint import PLAIN, Form, Reads, forms, held, join, split
from lz_compiler.planner import check, solve
from lz_compiler.trust import canary_regions
from lz_compiler.types import Candidate, Problem, Solution, Status

FORMS: tuple[Form, ...] = ((PLAIN, ()), ("packed 16", ()), ("packed", ("u", "v")))
CELL: Any = problems(low=2, high=4, groups=1)


@st.composite
def cells(draw: st.DrawFn, tied: bool = False) -> tuple[list[Problem], list[list[Reads]]]:
    """Two small problems whose candidates read two weights, each in some form; a node's first candidate reads them plain."""
    source = problems(low=2, high=4, groups=1, tied=True) if tied else CELL
    first = draw(source)
    given = [first, *(replace(draw(source), error_budget=first.error_budget, memory_limit=first.memory_limit) for _ in range(1))]
    table = []
    for cell in given:
        seen: set[str] = set()
        rows: list[Reads] = []
        classes: dict[int, Reads] = {}
        for k, candidate in enumerate(cell.candidates):
            node = candidate.region.nodes[0]
            weight = "uv"[int(node[1:]) // 2]
            form = FORMS[0] if node not in seen else draw(st.sampled_from(FORMS))
            seen.add(node)
            row: Reads = () if draw(st.integers(0, 7)) == 0 else ((weight, form),)
            rows.append(classes.setdefault(cell.candidate_class[k], row) if cell.candidate_class else row)
        table.append(rows)
    return given, table


def by_hand(given: list[Problem], table: list[list[Reads]]) -> int | None:
    """The cheapest pair of plans, over each assignment of one form to each weight: cells are solved alone, what reads otherwise barred."""
    names = sorted({w for rows in table for row in rows for w, _ in row})
    best: int | None = None
    for choice in itertools.product(FORMS, repeat=len(names)):
        fixed = dict(zip(names, choice, strict=True))
        total = 0
        for cell, rows in zip(given, table, strict=True):
            barred = [any(fixed[w] != form for w, form in row) for row in rows]
            some = tuple(replace(k, epsilon=float("inf")) if bar else k for k, bar in zip(cell.candidates, barred, strict=True))
            found = solve(replace(cell, candidates=some), "exhaustive", 60.0)
            if found.status is not Status.OPTIMAL:
                break
            total += found.objective
        else:
            best = total if best is None else min(best, total)
    return best


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.booleans().flatmap(lambda tied: cells(tied=tied)))
def test_the_joint_optimum_is_the_best_over_all_assignments_of_forms(drawn: tuple[list[Problem], list[list[Reads]]]) -> None:
    given, table = drawn
    whole = join(given, table)
    best = agree(whole, "cp_sat", "highs", "dynamic", "greedy")
    assert (best.objective if best.status is Status.OPTIMAL else None) == by_hand(given, table)
    event(f"{best.status}")
    assume(best.status is Status.OPTIMAL)
    parts = split(given, best)
    assert all(check(cell, part) == [] for cell, part in zip(given, parts, strict=True))
    assert sum(part.objective for part in parts) == best.objective
    assert all(len(found) == 1 for found in held(table, parts).values())
    own = [solve(cell) for cell in given]
    event(f"rule costs {best.objective > sum(s.objective for s in own)}")


def one_product(plain: int, packed: int, other: int | None = None) -> tuple[Problem, list[Reads]]:
    """A product with weight w: plain, or packed in the way that both cells know, or in a way of its own."""
    ways = [(plain, (PLAIN, ())), (packed, ("packed", ())), *([] if other is None else [(other, ("packed for 1 row", ()))])]
    made = problem([(kernel("mm", {"x": A}, {"y": A}), ns) for ns, _ in ways], [], {("x", A)}, [("y", A)])
    return made, [(("w", form),) for _, form in ways]


def test_two_packings_by_cell_become_one() -> None:
    """Alone: 5 (packed for one row) and 40 (packed), two forms. One form: plain 12 + 90, packed 8 + 40 = 48."""
    (step, a), (prompt, b) = one_product(12, 8, 5), one_product(90, 40)
    own = [solve(step), solve(prompt)]
    assert [s.objective for s in own] == [5, 40]
    assert len(held([a, b], own)["w"]) == 2
    whole = join([step, prompt], [a, b])
    best = solve(whole)
    assert (best.objective, best.status, [p.chosen for p in split([step, prompt], best)]) == (48, Status.OPTIMAL, [(1,), (1,)])
    # The same two plans with both holders: the check does not let it pass.
    first = len(step.candidates) + len(prompt.candidates)
    assert [str(c.out_formats[0]) for c in whole.candidates[first:]] == ["form 0:", "form 1:", "form 2:"]
    ours = next(i for i, row in enumerate(a) if row[0][1][0] == "packed for 1 row")
    for extra in ((first + 1,), (first + 2,), (first + 1, first + 2)):
        claim = Solution((ours, len(step.candidates) + 1, *extra), (), 45, 45, Status.OPTIMAL, "by hand")
        assert check(whole, claim) != []


def test_weights_of_repeated_blocks_are_tied() -> None:
    """Two layers, tied: the node that holds a weight takes one decision for both, as their kernels do."""
    kernels = [kernel(f"mm{i}", {f"x{i}": A}, {f"x{i + 1}": f}) for i in range(2) for f in (A, B)]
    made = problem([(k, 10 - i % 2) for i, k in enumerate(kernels)], [(f"x{i}", B, A, 0) for i in (1, 2)], {("x0", A)}, [("x2", A)],
                   candidate_class=(0, 1, 0, 1), tensor_class={"x1": 0, "x2": 0})  # fmt: skip
    rows: list[Reads] = [((f"w{i}", (form, ())),) for i in range(2) for form in (PLAIN, "packed")]
    whole = join([made, made], [rows, rows])
    assert len(set(whole.candidate_class)) == 2 + 2 + 2  # of each cell two kernels, and of the weights two forms
    assert solve(whole).objective == 4 * 9
    assert list(forms([rows, rows])) == ["w0", "w1"]


def test_each_cell_has_the_error_budget_for_itself() -> None:
    cell = problem([(kernel("a", {"x": A}, {"y": A}), 9), (kernel("a", {"x": A}, {"y": A}, 4e-3), 5)], [], {("x", A)}, [("y", A)],
                   error_budget=4e-3)  # fmt: skip
    rows: list[Reads] = [(), ()]
    whole = join([cell, cell], [rows, rows])
    for name in ("cp_sat", "highs", "exhaustive", "greedy"):
        best = solve(whole, name)
        assert (best.objective, check(whole, best)) == (10, []), name
    assert "the error" in check(replace(whole, part=()), best)[0]


class Head(nn.Module):
    """A tied embedding, and a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(96, 64), nn.Linear(64, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(ids)) @ self.embed.weight.t()


@pytest.mark.parametrize("policy", [None, {"lock": [{"op": "linear", "kernel": "onednn.linear_packed"}]}], ids=["free", "locked"])
def test_a_baked_folder_holds_each_weight_once(policy: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Head().eval()
    ids = torch.randint(96, (1, 12))
    given: dict[str, Any] = {"dynamic": {"ids": {1: "n"}}, "buckets": {"n": [16, 64]}, "freeze": True, "race": False,
                             "cost_model": "roofline", "policy": policy}  # fmt: skip
    plan = lz.solve(model, (ids,), **given)
    assert plan.joint is not None
    assert plan.joint.separate <= plan.joint.objective == plan.joint.bound
    assert "one format of each weight" in str(lz.explain(plan))
    plan.save(tmp_path / "plan.json")
    assert lz.load_plan(tmp_path / "plan.json").joint == plan.joint
    text = lz.bake(plan, tmp_path / "out", model, (ids,)).read_text()
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    assert sum(w.nbytes for w in stored.values()) == sum(p.nbytes for p in model.parameters())
    loaded = re.findall(r"= _packed\(.*'((?:plain\.)?[\w.]+)'", text)
    assert len(loaded) == len(set(loaded))
    if policy:  # all three cells are to pack: one packing each, which fits one row and many; the lookup reads the table beside it
        products = [dict(c.candidate.params) for p in plan.cells[0].plans for c in p.choices if c.candidate.region.op == "linear"]
        assert (len(loaded), [p["any_rows"] for p in products]) == (2, [True, True])


def test_where_no_format_serves_all_cells_each_has_its_own() -> None:
    """A policy that locks the cell of one row to MKL's packing, which no other cell can read."""
    torch.manual_seed(0)
    rules = [
        {"op": "linear", "kernel": "mkl.linear_packed", "rows": "1"},
        {"op": "linear", "kernel": "onednn.linear_packed", "rows": "> 1"},
    ]
    given: dict[str, Any] = {"dynamic": {"ids": {1: "n"}}, "buckets": {"n": [16]}, "freeze": True, "race": False, "cost_model": "roofline"}
    plan = lz.solve(Head().eval(), (torch.randint(96, (1, 12)),), **given, policy={"lock": rules})
    kernels = [{c.candidate.kernel for p in cell.plans for c in p.choices if c.candidate.region.op == "linear"} for cell in plan.cells]
    assert (plan.joint, kernels) == (None, [{"mkl.linear_packed"}, {"onednn.linear_packed"}])
    assert all("no plan with one format was found" in str(p.notes) for cell in plan.cells for p in cell.plans)


@pytest.mark.parametrize(("rows", "offered"), [(1, True), (17, False)])
def test_one_row_may_read_what_is_packed_for_many(rows: int, offered: bool) -> None:
    """oneDNN's packing for a single row is often the slower one; for more rows the two are alike, and one is enough."""
    regions = [
        c for _, c in canary_regions.contexts("linear", "float32", "cpu") if c.default and "w" in c.frozen and c.params["rows"] == rows
    ]
    assert regions
    for ctx in regions:
        answers = [a for a in backends.answers(ctx) if isinstance(a, Candidate) and a.kernel == "onednn.linear_packed"]
        assert any(dict(a.params).get("any_rows") for a in answers) is offered
