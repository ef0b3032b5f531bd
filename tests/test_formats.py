"""Formats are part of the solve: a plan that pays for its conversions beats the kernels that are cheapest one by one."""

from __future__ import annotations

import torch
from convnet import convnet
from torch import nn

from lz_compiler.backend import RECORDS
from lz_compiler.types import Plan


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


def test_every_solver_gives_a_plan_that_runs() -> None:
    model, x = mlp()
    objectives = {}
    for solver in ("cp_sat", "highs", "dynamic", "greedy"):
        plan, y = planned(model, x, solver=solver)
        torch.testing.assert_close(y, model(x))
        objectives[solver] = plan.objective
    assert objectives["cp_sat"] == objectives["highs"] <= objectives["greedy"]


def test_strict_layouts_keep_eagers() -> None:
    """layout_mode='strict' leaves every tensor in eager's strides."""
    model, args, _ = convnet()
    plan, y = planned(model, args[0], layout_mode="strict")
    layouts = {f.layout for c in plan.choices for f in (*c.candidate.in_formats, *c.candidate.out_formats)}
    assert "channels_last" not in layouts
    torch.testing.assert_close(y, model(args[0]), rtol=1e-4, atol=1e-5)


def test_a_plan_over_its_budget_is_not_used() -> None:
    """The estimate allows bfloat16; the error measured on the real input is over the budget, so the lossless plan runs."""
    torch.manual_seed(0)
    wide = nn.Linear(512, 512)
    model = nn.Sequential(wide, nn.Linear(512, 64)).eval()
    x = torch.randn(8, 512)
    with torch.no_grad():
        # The second layer takes differences of nearly equal numbers: what bfloat16 rounds away is what remains.
        wide.weight[256:] = wide.weight[:256] * (1 + 1e-3)
        wide.bias[256:] = wide.bias[:256]
        model[1].weight[:, 256:] = -model[1].weight[:, :256]
        model[1].bias.zero_()
        expected = model(x)
    plan, y = planned(model, x, error_budget=2e-2, freeze=True)
    record = RECORDS[-1]
    assert "bfloat16" in dtypes(plan)
    assert (record.error or 0) > 2e-2
    assert record.winner == "layerzero-lossless"
    assert float((y - expected).norm() / expected.norm()) < 1e-3
