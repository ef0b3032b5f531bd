"""What a price is made of: the rounds that count, and the part of a kernel that counts."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from machine import plant

from lz_compiler import backends, measure, pace, torch_private
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models.measured import Measured
from lz_compiler.pace import PACE, Pace
from lz_compiler.target import detect
from lz_compiler.timings import TimingStore, open_store
from lz_compiler.trust import canary_regions
from lz_compiler.types import Candidate


class Told(Pace):
    """A CPU as fast as it is told: seconds of the product before the first round and after each."""

    def __init__(self, times: list[float], patience_s: float = 1e9) -> None:
        super().__init__()
        self.times, self.best_s, self.patience_s = iter(times), 1.0, patience_s

    def now(self) -> float:
        return next(self.times)


def rounds(monkeypatch: pytest.MonkeyPatch, told: Told, deadline: float = math.inf) -> list[float]:
    """The numbers of the rounds that count, of one kernel."""
    monkeypatch.setattr(measure, "PACE", told)
    taken = iter(range(-1, 1000))  # the first is for how often a sample repeats its call
    monkeypatch.setattr(measure, "_sample", lambda *_: (float(next(taken)), 1.0))
    return measure._rounds({0: [lambda: None]}, deadline)[0]


def products() -> tuple[SelectionContext, list[Candidate]]:
    """A frozen linear with a bias, and its kernels."""
    contexts = [ctx for shape, ctx in canary_regions.contexts("linear", "float32", "cpu") if shape == "17x33x47"]
    ctx = next(c for c in contexts if "bias" in c.roles and "w" in c.frozen)
    return ctx, [a for a in backends.answers(ctx) if isinstance(a, Candidate)]


def test_rounds_of_a_slow_cpu_are_waited_for_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told([1.0, 1.3, 1.3, *[1.05] * 40])
    assert rounds(monkeypatch, told) == list(range(3, 3 + measure.ROUNDS))
    assert len(list(told.times)) == 40 - measure.ROUNDS - 1


def test_a_cpu_that_stays_slow_is_not_waited_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best rounds count then: there must be a price."""
    times = [1.6, 1.3, 1.3, 1.3, 1.6, *[1.31] * 400]
    told = Told(times, patience_s=1e-12)
    assert rounds(monkeypatch, told) == [1, 2, 5, 6, 7, 8, 9]  # one round more, and the patience is gone
    assert told.patience_s < 0
    assert rounds(monkeypatch, Told(times, told.patience_s)) == [1, 2, 5, 6, 7, 8]
    assert rounds(monkeypatch, Told(times), deadline=time.perf_counter()) == [1, 2]


def test_the_best_pace_is_kept_with_the_peaks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known, fresh = Pace(), Pace()
    monkeypatch.setattr("lz_compiler.target.PACE", known)
    plant(str(tmp_path), product_s=1e-9)
    detect("cpu", open_store(str(tmp_path)))
    assert known.best_s == 1e-9
    assert known.brisk([1e-9, 1.1e-9, 1.2e-9, 1e-9, 1e-9]) == [0, 3]
    for damaged in ("1", None, -1.0, math.nan, True):
        known.expect(damaged)
    assert known.best_s == 1e-9
    monkeypatch.setattr("lz_compiler.target.PACE", fresh)
    store = TimingStore(None)
    detect("cpu", store)
    (peaks,) = store.get_records("peaks").values()
    assert 0 < fresh.best_s <= peaks["product_s"] < 1


@pytest.mark.parametrize("inference", [True, False])
def test_the_pace_is_taken_in_any_mode(inference: bool) -> None:
    pace._matrices.cache_clear()
    with torch.inference_mode(inference):
        assert PACE.now() > 0
    with torch_private.real_tensors(), torch.inference_mode(not inference):
        assert PACE.now() >= PACE.best_s


def test_a_bias_that_ends_in_another_loop_is_no_part_of_the_price() -> None:
    ctx = next(
        c for s, c in canary_regions.contexts("linear", "float32", "cpu") if s == "17x33x47" and "bias" in c.roles and "w" in c.frozen
    )
    candidate = next(a for a in backends.answers(ctx) if isinstance(a, Candidate) and a.kernel == "mkl.linear_packed")
    with torch_private.real_tensors():
        given = measure.Inputs(measure.inputs(ctx, 0))
        bound = measure.Bound(candidate, ctx)
        whole, alone = bound.on(given)(), bound.on(given, timed=True)()
    assert torch.equal(whole, alone + given.values["bias"])
    assert not torch.equal(whole, alone)


@pytest.mark.parametrize(("then", "now", "second"), [(100, 200, 90), (200, 100, 360), (100, 100, 180)])
def test_what_is_measured_later_is_comparable(then: int, now: int, second: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is slower by two now, or was so then: the known kernel is timed again, and tells."""
    store = open_store(str(tmp_path))
    plant(str(tmp_path))
    ctx, (known, other, *_) = products()
    times = {known.kernel: then, other.kernel: 180}
    asked: list[list[str]] = []

    def measured(_: Any, candidates: Any, *__: Any) -> dict[int, measure.Measurement]:
        asked.append([c.kernel for c in candidates])
        return {i: measure.Measurement(times[c.kernel], 0, 9, 0.0, None) for i, c in enumerate(candidates)}

    monkeypatch.setattr("lz_compiler.cost_models.measured.measure", measured)
    prices = Measured(detect("cpu", store), store, 60.0)
    prices.price(ctx, [known])
    times[known.kernel] = now
    for _ in range(2):  # and stays so
        assert [c.ns for _, c in prices.price(ctx, [known, other])] == [then, second]  # type: ignore[misc]
    assert asked == [[known.kernel], [known.kernel, other.kernel]]
    assert prices.measured == 2
    monkeypatch.undo()
    again = TimingStore.open(tmp_path).get_many([prices.key(ctx, known), prices.key(ctx, other)])
    assert [t.ns for t in again.values()] == [then, second]


def test_waiting_and_compiling_once_take_no_turn(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is for measuring: what is compiled for the machine, or waited for, leaves the other regions theirs."""
    plant(str(tmp_path))
    ctx, (first, second, *_) = products()
    tried: list[str] = []

    def setup() -> None:
        tried.append(first.kernel)
        now[0] += 40
        raise RuntimeError("no compiler")

    def measured(_: Any, candidates: Any, deadline: float) -> dict[int, measure.Measurement]:
        assert deadline == now[0] + 30
        now[0] += 40
        told.patience_s -= 40
        return {i: measure.Measurement(100, 0, 9, 0.0, None) for i, _ in enumerate(candidates)}

    now = [0.0]
    monkeypatch.setattr("lz_compiler.cost_models.measured.time", SimpleNamespace(perf_counter=lambda: now[0]))
    told, kernel = Told([]), backends.kernel
    monkeypatch.setattr("lz_compiler.cost_models.measured.PACE", told)
    monkeypatch.setattr("lz_compiler.cost_models.measured.measure", measured)
    monkeypatch.setattr(backends, "kernel", lambda name: replace(kernel(name), setup=setup if name == first.kernel else None))
    prices = Measured(detect("cpu", open_store(str(tmp_path))), open_store(str(tmp_path)), 30.0)
    for candidate in (first, second):
        assert [c.ns for _, c in prices.price(ctx, [candidate])] == [100]  # type: ignore[misc]
    assert tried == [first.kernel]
