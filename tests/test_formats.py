"""Formats are part of the solve: a plan that pays for its conversions beats the kernels that are cheapest one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from convnet import convnet
from machine import plant
from torch import nn
from torch._inductor.utils import run_and_get_code

import lz_compiler as lz
from lz_compiler.backend import RECORDS
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models import Priced
from lz_compiler.cost_models.roofline import Roofline
from lz_compiler.planning import solve_within
from lz_compiler.types import Candidate, Cost, Format, Plan, Problem, Region, Target, TensorSpec


def planned(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[Plan, torch.Tensor]:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="layerzero", options={"race": False, "cost_model": "roofline", **options})
        y = compiled(x)
    (plan,) = RECORDS[-1].plans
    return plan, y


def dtypes(plan: Plan) -> list[str]:
    return [c.candidate.in_formats[0].dtype for c in plan.choices if c.candidate.region.op == "linear"]


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """Eight rows through wide layers: a bfloat16 product reads half the weight, but someone must convert the weight."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.Tanh())]
    return nn.Sequential(*layers).eval(), torch.randn(8, 512)


def test_conversions_make_the_best_plan_differ_from_greedy() -> None:
    model, x = mlp()
    best, y = planned(model, x, error_budget=5e-2)
    greedy, _ = planned(model, x, error_budget=5e-2, solver="greedy")
    assert dtypes(greedy) == ["bfloat16"] * 3  # cheapest kernel by kernel
    assert dtypes(best) == ["float32"] * 3  # cheapest with its conversions
    assert best.objective < greedy.objective
    assert sum(c.dst.dtype == "bfloat16" for c, _ in greedy.conversions) >= 3
    torch.testing.assert_close(y, model(x))


def test_frozen_weights_make_bfloat16_pay() -> None:
    """The same graph with conversions of weights moved to compile time: now the half-size weights win."""
    model, x = mlp()
    plan, y = planned(model, x, error_budget=5e-2, freeze=True)
    assert dtypes(plan) == ["bfloat16"] * 3
    assert 0 < plan.epsilon <= 5e-2
    assert 0 < (RECORDS[-1].error or 0) <= 5e-2  # the whole plan's, on the real input
    torch.testing.assert_close(y, model(x), rtol=5e-2, atol=5e-2)


def test_a_window_loop_on_an_image_that_is_channels_last_already() -> None:
    """Its two layouts are one: offered once, or the tie of equal candidates would ask for both."""
    model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 3)).eval()
    x = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    plan, y = planned(model, x)
    assert sum(c.candidate.region.op == "avg_pool2d" for c in plan.choices) <= 1
    torch.testing.assert_close(y, model(x))


class FirstChannelsLast:
    """A cost model by which convolutions stay with ATen, that of four channels channels last and the other as eager has it."""

    name = "first_channels_last"

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        layout = "channels_last" if ctx.specs[0].shape[1] == 4 else "strided"
        cheap = [c.kernel == "aten.conv" and c.out_formats[0].layout == layout for c in candidates]
        return [(c, Cost(1 if good else 10**9, "assumed")) for c, good in zip(candidates, cheap, strict=True)]


def test_convolutions_run_in_the_layouts_that_were_priced() -> None:
    """A frozen weight is brought into its layout once, and a convolution that stays does not follow the layout of the one before."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(2, 4, 16, 16)
    (_, y), (code,) = run_and_get_code(planned, model, x, freeze=True, cost_model=FirstChannelsLast())
    torch.testing.assert_close(y, model(x))
    assert y.is_contiguous()
    calls = re.findall(r"(buf\d+) = extern_kernels.convolution\(\w+, (\w+),.*\n +assert_size_stride\(\1, \S+ .*?\), \(([\d, ]+)\)", code)
    (_, first, last), (_, second, eager) = calls
    assert (last, eager) == ("1568, 1, 112, 8", "1152, 144, 12, 1")
    assert "_layerzero" in first
    assert "arg" in second  # the parameter itself
    assert code.count("async_compile.cpp_pybinding(") == 2  # x channels last, relu


def test_blocks_that_cannot_take_the_same_decision_are_untied() -> None:
    fmt = Format("strided", "float32")
    regions = Region("a", ("n",), (), ("n",)), Region("b", ("n",), (), ("n",))
    twins = tuple(Candidate(region.op, region, (), (fmt,)) for region in regions)
    problem = Problem(twins, (Cost(2, "test"), Cost(1, "test")), sinks=(("n", fmt),), candidate_class=(0, 0), tensor_class={"n": 0})
    assert solve_within(problem, lz.Options()).chosen == (1,)


def test_every_solver_gives_a_plan_that_runs() -> None:
    model, x = mlp()
    objectives = {}
    for solver in ("cp_sat", "highs", "dynamic", "greedy"):
        plan, y = planned(model, x, solver=solver)
        torch.testing.assert_close(y, model(x))
        objectives[solver] = plan.objective
    assert objectives["cp_sat"] == objectives["highs"] <= objectives["greedy"]


@pytest.mark.slow
def test_strict_layouts_keep_eagers() -> None:
    """layout_mode='strict' leaves every tensor in eager's strides."""
    model, args, _ = convnet()
    plan, y = planned(model, args[0], layout_mode="strict")
    layouts = {f.layout for c in plan.choices for f in (*c.candidate.in_formats, *c.candidate.out_formats)}
    assert "channels_last" not in layouts
    torch.testing.assert_close(y, model(args[0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def cancel(model: nn.Sequential, difference: float = 1e-3) -> None:
    """Let the last layer take differences of nearly equal numbers: what bfloat16 rounds away is what remains."""
    wide, last = model[-2], model[-1]
    wide.weight[256:] = wide.weight[:256] * (1 + difference)
    wide.bias[256:] = wide.bias[:256]
    last.weight[:, 256:] = -last.weight[:, :256]
    last.bias.zero_()


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def test_what_fits_the_cache_is_converted_at_its_rate() -> None:
    """A result that was just written is still in the cache when a conversion reads it; a weight, or what is too large, is not."""
    flops = {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11, "transcendental": 1e9}
    roofline = Roofline(Target("cpu", "a CPU", 1e10, flops, 0, {}, cache_bytes=8000, cache_bandwidth=1e11))
    wide, narrow = Format("strided", "float32"), Format("strided", "bfloat16")

    def ns(elements: int, cold: bool = False) -> int:
        return roofline.conversion(TensorSpec((elements,), (1,), "float32", "cpu"), wide, narrow, cold).ns

    assert ns(1000) == 40 + 20
    assert ns(1000, cold=True) == 400 + 20
    assert ns(3000) == 1200 + 60  # 12 kB are read from memory, 6 kB written to the cache
    assert ns(0) == 0


def test_a_plan_over_its_budget_is_not_used(tmp_path: Path) -> None:
    """The estimate allows bfloat16; the error measured on the real input is over the budget, so the lossless plan runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64)).eval()
    cancel(model)
    x = torch.randn(8, 512)
    plant(str(tmp_path))
    plan, y = planned(model, x, error_budget=2e-2, freeze=True, cache_dir=str(tmp_path))
    record = RECORDS[-1]
    assert (record.error or 0) > 2e-2
    assert record.winner == "layerzero-lossless"
    assert dtypes(plan) == ["float32"] * 2  # what is reported is what runs
    with torch.no_grad():
        assert relative(y, model(x)) < 1e-3


def test_a_plan_over_its_budget_is_tightened(tmp_path: Path) -> None:
    """The last layers make errors several times larger than estimated, and the next plan knows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(5)), nn.Linear(512, 64)).eval(), torch.randn(8, 512)
    cancel(model, 0.1)
    for folder in ("whole", "tight"):
        plant(str(tmp_path / folder))
    planned(model, x, error_budget=0.5, freeze=True, cache_dir=str(tmp_path / "whole"))
    whole = RECORDS[-1].error
    assert whole
    options = {"error_budget": 0.75 * whole, "freeze": True, "cache_dir": str(tmp_path / "tight")}
    narrow, winners = [], []
    for _ in range(3):
        plan, y = planned(model, x, **options)
        narrow.append(dtypes(plan).count("bfloat16"))
        winners.append(RECORDS[-1].winner)
        with torch.no_grad():
            assert relative(y, model(x)) < 0.75 * whole
    assert winners == ["layerzero-lossless", "layerzero", "layerzero"]
    assert narrow[0] == 0  # over the budget: the lossless plan runs at once
    assert 0 < narrow[1] < 6  # in the next process as many as the budget bears
    assert narrow[2] == narrow[1]


def test_packings_of_one_product_are_not_tied(tmp_path: Path) -> None:
    """One row has two packings that differ in a parameter alone: taken for a repeated block, neither could be chosen."""
    plant(str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3))).eval()
    plan, _ = planned(model, torch.randn(1, 512), error_budget=0.5, freeze=True, cache_dir=str(tmp_path))
    assert dtypes(plan) == ["bfloat16"] * 3


@pytest.mark.parametrize("one_format", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_solved_plan_over_its_budget_is_tightened(one_format: bool, tmp_path: Path) -> None:
    """`lz.solve` goes on until the error that it measures is within the budget, for cells that share their weights and for others."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(5)), nn.Linear(512, 64)).eval(), torch.randn(8, 512)
    cancel(model, 0.1)
    for folder in ("whole", "tight"):
        plant(str(tmp_path / folder))
    options: dict[str, Any] = {"cost_model": "roofline", "race": False, "freeze": True, "one_format": one_format}
    options |= {"buckets": {"rows": [8]}, "dynamic": {"input": {0: "rows"}}}
    plan = lz.solve(model, (x,), **options, error_budget=0.5, cache_dir=str(tmp_path / "whole"))
    whole = max(cell.error or 0.0 for cell in plan.cells)
    for _ in range(2):
        plan = lz.solve(model, (x,), **options, error_budget=0.75 * whole, cache_dir=str(tmp_path / "tight"))
        assert [cell.winner for cell in plan.cells] == ["layerzero"] * len(plan.cells)
        for cell in plan.cells:
            assert cell.error is not None
            assert cell.error <= 0.75 * whole
            assert 0 < sum(dtypes(p).count("bfloat16") for p in cell.plans) < 6


@pytest.mark.parametrize("freeze", [True, False])
def test_a_stored_verdict_is_checked_against_the_weights_at_hand(freeze: bool, tmp_path: Path) -> None:
    """Weights are not in a verdict's key: a plan that was within its budget with one model's may be over it with another's."""
    torch.manual_seed(0)
    # Narrow products pay even with weights that are converted in each call.
    plant(str(tmp_path), flops={"float32": 1e11, "bfloat16": 8e11, "float16": 1e10, "transcendental": 1e9}, launch_ns=1000)
    x = torch.randn(1024, 512)
    options = {"error_budget": 2e-2, "freeze": freeze, "cache_dir": str(tmp_path)}
    models = [nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64)).eval() for _ in range(2)]
    cancel(models[1])
    keys, winners = [], []
    for model in (models[0], models[0], models[1], models[1]):
        plan, y = planned(model, x, **options)
        record = RECORDS[-1]
        with torch.no_grad():
            assert relative(y, model(x)) < 2e-2
        assert ("bfloat16" in dtypes(plan)) == (len(winners) < 2)
        keys.append(record.key)
        winners.append(record.winner)
        over = [note for note in record.notes if "over the budget" in note]
        assert len(over) == (len(winners) == 3)
        assert all(note in str(lz.explain(model)) for note in over)
    assert len(set(keys)) == 1
    assert winners == ["layerzero"] * 2 + ["layerzero-lossless", "layerzero"]  # the last was planned anew, and needs no check
