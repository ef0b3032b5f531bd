"""What the race must not change: random numbers, what autograd saves, threads, memory, and what a stored plan is for."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import plant
from test_features import CALLS, compiled, counters, dtypes, kernels, linear, same, wide
from test_kernels import prefer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lz_compiler import race
from lz_compiler.backend import RECORDS
from lz_compiler.types import EAGER, INDUCTOR, LOSSLESS, PLANNED


@pytest.fixture
def racing(tmp_path: Path) -> dict[str, Any]:
    plant(str(tmp_path))
    return {"race": True, "cache_dir": str(tmp_path)}


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = linear(32, 48, 32, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), 0.5)


# --- random numbers -----------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_result_in_every_call_of_the_race(racing: dict[str, Any]) -> None:
    run, x, first = compiled(Dropped(), **racing), torch.randn(6, 32), None
    with torch.no_grad():
        for _ in range(CALLS):
            torch.manual_seed(3)
            y = run(x)
            first = y if first is None else first
            same(y, first)
    record = RECORDS[-1]
    assert record.decided
    assert set(record.times) == {PLANNED, INDUCTOR}
    assert any("random numbers" in note for note in record.notes)


def test_random_numbers_are_no_error_of_the_plan() -> None:
    body, x = wide()
    with torch.no_grad():
        compiled(lambda x: F.dropout(body(x), 0.1), error_budget=2e-2, freeze=True)(x)
    assert RECORDS[-1].winner == PLANNED
    assert "bfloat16" in dtypes()
    assert 0 < (RECORDS[-1].error or 0) < 2e-2


def test_eager_does_not_win_for_all_sizes_by_the_first(racing: dict[str, Any]) -> None:
    model = linear(32, 48, 32, act=nn.GELU)
    run = compiled(model, dynamic=True, **racing)
    with torch.no_grad():
        for rows in (*(3 for _ in range(CALLS)), 7):
            x = torch.randn(rows, 32)
            same(run(x), model(x))
    assert RECORDS[-1].decided
    assert EAGER not in RECORDS[-1].times


# --- autograd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_pass_is_repeated_by_the_same_code(reentrant: bool, racing: dict[str, Any]) -> None:
    """Dropout tells: its zeros in the output are those of the gradient only if the repeated pass drew the same numbers."""
    model = Dropped()
    run = compiled(model, **racing)
    with torch.no_grad():
        run(torch.randn(6, 32))  # a reentrant checkpoint's first pass: one call ahead of the repeated ones
    for _ in range(CALLS):
        x = torch.randn(6, 32, requires_grad=True)
        y = checkpoint(run, x, use_reentrant=reentrant)
        (bias,) = torch.autograd.grad(y.sum(), model.body[1].bias) if not reentrant else (None,)
        if bias is None:
            model.zero_grad()
            y.sum().backward()
            bias = model.body[1].bias.grad
        same(bias, _through_gelu(model, x, (y != 0) * 2.0))


def _through_gelu(model: Dropped, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the last bias, from that of the output."""
    inner = model.body[1](model.body[0](x)).detach().requires_grad_()
    (found,) = torch.autograd.grad(model.body[2](inner), inner, gradient)
    return found.sum(0)


def test_hooks_of_the_race_are_taken_off(racing: dict[str, Any]) -> None:
    model, x = linear(32, 48, 32, act=nn.GELU), torch.randn(6, 32)
    run = compiled(model, **racing)
    for i in range(CALLS):
        loss = run(x).sum()
        if i % 3:  # some passes have no backward
            loss.backward()
    assert RECORDS[-1].decided
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
    y = run(x)
    assert y.grad_fn is not None
    calls = []
    y.grad_fn.register_prehook(lambda grads: calls.append(1))
    y.sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("of", ["parameters", "one", "input"])
def test_gradients_by_autograd_grad_are_raced_too(of: str, racing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not tell autograd's hooks which leaves' gradients it computes: asking for them raises."""
    model, timed = linear(32, 48, 32, act=nn.GELU), set()
    median = race.Race._median
    monkeypatch.setattr(race.Race, "_median", lambda self, name: timed.add((name, bool(self.backward[name]))) or median(self, name))
    run = compiled(model, **racing)
    for _ in range(CALLS):
        x = torch.randn(6, 32, requires_grad=True)
        wanted = {"parameters": [*model.parameters()], "one": [model[1].weight], "input": [x]}[of]
        ours, theirs = (torch.autograd.grad(f(x).pow(2).sum(), wanted) for f in (run, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert RECORDS[-1].decided
    assert {(name, True) for name in (PLANNED, INDUCTOR, EAGER)} <= timed
    assert not any(p._backward_hooks for p in model.parameters())


def test_backward_plans_are_lossless_since_no_check_sees_gradients() -> None:
    model, x = wide()
    compiled(model, error_budget=2e-2)(x.repeat(64, 1)).sum().backward()
    forward, backward = RECORDS[-1].plans
    assert (forward.kind, backward.kind, backward.epsilon) == ("forward", "backward", 0.0)
    assert forward.epsilon > 0


# --- threads, memory ----------------------------------------------------------------------------------------------------


def test_threads_share_a_race() -> None:
    """One verdict, every call answered by a finalist, none timed beside another."""
    beside, most, verdicts = [0], [0], []

    def finalist(seconds: float) -> race.Finalist:
        def run(x: int) -> int:
            beside[0] += 1
            most[0] = max(most[0], beside[0])
            time.sleep(seconds)
            beside[0] -= 1
            return x + 1

        return run

    def rescue(name: str, error: Exception, args: tuple[Any, ...]) -> Any:
        raise error

    run = race.Race(
        {PLANNED: finalist(2e-4), INDUCTOR: finalist(1e-4), EAGER: finalist(5e-4)}, lambda *told: verdicts.append(told), PLANNED,
        rescue=rescue, reference=None,
    )  # fmt: skip
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.extend(run(i) for i in range(40))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(8 * list(range(1, 41)))
    assert most[0] > 1
    for _ in range(CALLS):
        run(0)
    ((times, winner, measured),) = verdicts
    assert measured
    assert winner in times


def test_what_raises_in_a_race_is_named() -> None:
    """Also where another thread's call has moved the race on meanwhile."""
    blamed: list[str] = []

    def rescue(name: str, error: Exception, args: tuple[Any, ...]) -> Any:
        blamed.append(name)
        return -1

    def broken(x: int) -> int:
        threading.Thread(target=run, args=(1,)).start()
        time.sleep(0.01)
        raise RuntimeError("a kernel failed")

    run = race.Race({PLANNED: lambda x: x, INDUCTOR: broken}, lambda *_: None, PLANNED, rescue=rescue, reference=None)
    assert [run(1) for _ in range(4)] == [1, -1, 1, 1]
    assert blamed == [INDUCTOR]


@pytest.mark.parametrize("options", [{}, {"freeze": True, "error_budget": 2e-2}])
def test_what_eager_has_no_memory_for_runs(options: dict[str, Any], racing: dict[str, Any]) -> None:
    """Eager makes the whole range, in the race and where a budget is checked; TorchInductor only what is read of it."""
    body, x = wide()
    run = compiled(lambda x: body(x) + torch.arange(2**46, dtype=x.dtype)[:1] * x.mean(), **racing | options)
    kept = 2e-2 if options else 1e-5
    with torch.no_grad():
        for _ in range(CALLS):
            y, e = run(x), body(x)
            assert (y - e).norm() < kept * e.norm()
    record = RECORDS[-1]
    assert record.decided
    assert PLANNED in record.times
    assert EAGER not in record.times
    assert bool(record.error) == bool(options)  # the budget was checked


@pytest.mark.parametrize("options", [{"race": True}, {"freeze": True}])
def test_the_first_inputs_may_be_freed(options: dict[str, Any], racing: dict[str, Any]) -> None:
    run = compiled(linear(32, 48, 32, act=nn.GELU), **racing | {"race": False} | options)
    x = torch.randn(6, 32)
    with torch.no_grad():
        run(x)
        seen = weakref.ref(x)
        del x
        run(torch.randn(6, 32))
    gc.collect()
    assert seen() is None


# --- what stored plans are for ------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


def test_a_plan_without_a_mask_is_for_that_masks_values_only(tmp_path: Path) -> None:
    plant(str(tmp_path))
    length = 128
    causal, other = torch.ones(length, length, dtype=torch.bool).tril(), torch.rand(length, length) > 0.5
    other[:, 0] = True
    qkv = [torch.randn(1, 4, length, 64) for _ in range(3)]
    for mask, known in ((causal, 0), (other, 0), (causal.clone(), 1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Masked(mask).eval()
        with torch.no_grad():
            same(compiled(model, freeze=True, deterministic=True, cache_dir=str(tmp_path))(*qkv), model(*qkv))
        assert counters()["known_plans"] == known
        assert kernels()


@pytest.mark.parametrize("freeze", [False, True])
def test_branches_of_a_cond(freeze: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the branches read are not the graph's inputs, whatever their number."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            def yes(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
                return F.gelu(x @ a.t()) @ b.t()

            def no(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
                return F.gelu(x @ b.t()) @ a.t()

            return torch.cond(self.a.sum() + self.b.sum() + x.sum() > 0, yes, no, (self.b, self.a, x))

    prefer(monkeypatch, "mkl.linear_packed")
    model = Branches().eval()
    run = compiled(model, freeze=freeze)
    with torch.no_grad():
        for x in (torch.rand(32, 64), -torch.rand(32, 64)):
            same(run(x), model(x))
    assert counters()["broken"] == 0


# --- errors -------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "expected", "error"),
    [
        ([1.0, NAN], [1.0, NAN], 0.0), ([1.0, INF], [1.0, INF], 0.0), ([1.0, -INF], [1.0, INF], INF), ([1.0, NAN], [1.0, INF], INF),
        ([1.0, 2.0], [1.0, INF], INF), ([3.0, 4.5], [3.0, 4.0], 0.1), ([5 + 1j], [1 + 1j], 8**0.5), ([5], [1], 0.0),
    ],
)  # fmt: skip
def test_relative_errors(value: list[Any], expected: list[Any], error: float) -> None:
    assert race._relative(torch.tensor(value), torch.tensor(expected)) == pytest.approx(error)


def test_eager_wins_with_the_lossless_plan_where_the_error_was_over_the_budget(
    racing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is stored, and baked, is within the budget whoever won."""
    monkeypatch.setattr(race, "_relative", lambda value, expected: 0.5)
    model, x = wide()
    run = compiled(model, **racing, error_budget=2e-2, freeze=True)
    with torch.no_grad():
        for _ in itertools.repeat(None, CALLS):
            run(x)
    record = RECORDS[-1]
    assert record.decided
    assert record.winner in (LOSSLESS, INDUCTOR, EAGER)
    assert [p.epsilon for p in record.plans] == [0.0]
