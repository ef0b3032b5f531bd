"""Plans solved once over shape buckets, stored, and followed: nothing is planned again, nothing is different from eager."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import pickle
import signal
import threading
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lz_compiler as lz
from lz_compiler import torch_private
from lz_compiler.deploy import export, offline
from lz_compiler.deploy.proof import prove
from lz_compiler.errors import OptionError, PlanError
from lz_compiler.zoo import Llama, LlamaConfig

VOCAB = 128
FAST = {"race": False, "cost_model": "roofline"}
SEQ: dict[str, Any] = {"buckets": {"seq": [8, 32]}, "dynamic": {"input_ids": {1: "seq"}}}


def llama() -> Llama:
    torch.manual_seed(0)
    # One layer: several are planned ahead and baked in test_generation.py.
    return Llama(LlamaConfig(hidden=64, layers=1, heads=4, kv_heads=2, intermediate=96, vocab=VOCAB, max_len=64)).eval()


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


@pytest.fixture(scope="module")
def planned() -> tuple[Llama, offline.ModelPlan]:
    model = llama()
    return model, lz.solve(model, (ids(20),), **SEQ, freeze=True, **FAST)


def counters() -> Any:
    return torch._dynamo.utils.counters["layerzero"]


# --- cells ------------------------------------------------------------------------------------------------------------------

ENDS = st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True).map(sorted)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), ENDS, min_size=1, max_size=3), st.data())
def test_cells_partition_the_declared_range(buckets: dict[str, list[int]], data: st.DataObject) -> None:
    """Every size vector from the lowest to the last ends is in exactly one cell, every other in none, and size 1 is alone."""
    lowest = {s: data.draw(st.just(1) | st.integers(1, ends[0])) for s, ends in buckets.items()}
    cells = export.cells(buckets, {s: low for s, low in lowest.items() if low > 1 or data.draw(st.booleans())})
    sizes = {s: data.draw(st.integers(1, 70)) for s in buckets}
    inside = all(lowest[s] <= sizes[s] <= ends[-1] for s, ends in buckets.items())
    found = list(export.covering(cells, sizes))
    assert len(found) == inside
    assert all((low == 1) == (high == 1) or low > 1 for cell in cells for low, high in cell.values())
    for s in buckets:
        assert not found or (sizes[s] == 1) == (cells[found[0]][s] == (1, 1))


# --- running by a plan ------------------------------------------------------------------------------------------------------


def test_a_stored_plan_runs_and_nothing_is_planned(planned: tuple[Llama, offline.ModelPlan], tmp_path: Path) -> None:
    model, plan = planned
    plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert lz.load_plan(tmp_path / "plan.json") == plan
    counters().clear()
    run = lz.compile(model, plan=tmp_path / "plan.json")
    with torch.no_grad():
        for length in (1, 2, 7, 8, 9, 31, 32, 8, 3):
            x = ids(length)
            expected, found = model(x), run(x)
            assert found.stride() == expected.stride()
            torch.testing.assert_close(found, expected)
    assert (counters()["plans"], counters()["known_plans"]) == (0, 3)
    assert counters()["kernels"] > 0
    kernels = {c.candidate.kernel for cell in plan.cells for p in cell.plans for c in p.choices}
    assert "cublas.merged" not in kernels
    assert any(k.startswith("onednn.") for k in kernels), kernels


def test_solving_races_on_the_given_arguments() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    plan = lz.solve(model, (torch.randn(4, 256),), freeze=True, measure_budget_s=5.0)
    (cell,) = plan.cells
    assert cell.ranges == {}
    assert cell.winner in ("layerzero", "inductor", "eager")
    if cell.times:
        assert cell.times[cell.winner] == min(cell.times.values())
    x = torch.randn(4, 256)
    torch.testing.assert_close(lz.compile(model, plan=plan)(x), model(x))


def test_a_plan_with_an_error_budget_is_followed() -> None:
    """Checked on the example when it was solved; followed without a lossless plan beside it, which would have to be made."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)).eval(), torch.randn(8, 512)
    plan = lz.solve(model, (x,), freeze=True, error_budget=5e-2, **FAST)
    (cell,) = plan.cells
    assert cell.winner == "layerzero"
    assert 0 < (cell.error or 0) <= 5e-2
    assert cell.plans[0].epsilon > 0
    counters().clear()
    torch.testing.assert_close(lz.compile(model, plan=plan)(x), model(x), rtol=5e-2, atol=5e-2)
    assert (counters()["plans"], counters()["known_plans"]) == (0, 1)


@pytest.mark.slow
def test_a_missing_cell_never_blocks_silently(planned: tuple[Llama, offline.ModelPlan], caplog: pytest.LogCaptureFixture) -> None:
    """Its first call says how long it waits; with compile_in_background it waits for the trace, and runs that until a thread is done."""
    model, plan = planned
    x = ids(20)
    with torch.no_grad():
        expected = model(x)
    lz.compile(model, plan=plan)(x)
    said = [r.message for r in caplog.records if r.name == offline.__name__]
    assert said[0].startswith("compiling the plan's cell for seq 9..32 in this call")
    assert "for seq 9..32 is compiled: this call waited" in said[1]
    caplog.clear()
    run = lz.compile(model, plan=plan, compile_in_background=True)
    with torch_private.compile_lock():  # something else compiles: the model itself runs
        torch.testing.assert_close(_in_a_thread(lambda: run(x)), expected)
        assert not run._cells
    with held(offline.BACKGROUND):
        torch.testing.assert_close(run(x), expected)
        program, call = run._cells[2]
        assert call.__self__ is program.gm, "the exported graph, uncompiled"
    run.wait()
    assert run._cells[2][1] is not call
    torch.testing.assert_close(run(x), expected)
    assert lz.warmup(run, (x,), calls=1) is run
    assert (len(run._cells), run._building) == (3, {})
    said = [r.message for r in caplog.records if r.name == offline.__name__]
    assert "for seq 9..32 is traced, and compiles in the background while calls run its graph: this call waited" in said[0]
    assert any("for seq 9..32 is compiled: calls run it from now on" in line for line in said)
    wider = Llama(LlamaConfig(hidden=64, layers=1, heads=4, kv_heads=4, intermediate=96, vocab=VOCAB, max_len=64)).eval()
    with pytest.raises(PlanError, match="not the one that was planned"):
        lz.compile(wider, plan=plan, compile_in_background=True)(ids(4))
    with pytest.raises(OptionError, match="CUDA graphs belong to the thread"):
        lz.compile(model, plan=dataclasses.replace(plan, options={**plan.options, "cudagraphs": True}), compile_in_background=True)


class Slow(nn.Module):
    """Two threads meet in a trace of it, or one is alone there for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.meeting: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if torch_private.is_fake(self.linear.weight):
            self.meeting()
        return self.linear(x)


def test_one_thread_traces_at_a_time() -> None:
    """torch.export puts fake tensors into the model: another thread's solve, and calls that run the model itself, wait for the end."""
    model, x = Slow().eval(), torch.randn(4, 8)
    rows: dict[str, Any] = {"dynamic": {"x": {0: "n"}}, "buckets": {"n": [4]}}
    plan, expected = lz.solve(model, (x,), **rows, **FAST), model(torch.ones(9, 8))
    meeting = threading.Barrier(2)

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=1)

    model.meeting = meet
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(lz.solve, model, (x,), **rows, **FAST) for _ in range(2)]:
            assert done.result().cells[0].fingerprint == plan.cells[0].fingerprint
    assert meeting.broken
    assert type(model.linear.weight) is nn.Parameter
    traced = threading.Event()
    model.meeting = lambda: traced.set() or time.sleep(0.5)
    run = lz.compile(model, plan=plan)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, x)
        traced.wait()
        torch.testing.assert_close(run(torch.ones(9, 8)), expected)
        torch.testing.assert_close(first.result(), model(x))
    traced.clear()

    def in_a_kernel() -> None:
        """While a fake kernel runs, fake tensors say that they are on `meta`."""
        with unittest.mock.patch.object(model.linear.weight.fake_mode, "in_kernel_invocation", True):
            traced.set()
            time.sleep(0.5)

    model.meeting = in_a_kernel
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lz.compile(model, plan=plan), x)
        traced.wait()
        export.check_tensors(model, {})
        model.meeting = lambda: None
        torch.testing.assert_close(first.result(), model(x))


def test_what_compiled_in_the_background_is_taken_over_once(small: tuple[nn.Module, Tensor, offline.ModelPlan]) -> None:
    model, x, plan = small
    run = lz.compile(model, plan=plan)
    run(x)
    both = threading.Barrier(2)

    class Done(Future[Any]):
        def done(self) -> bool:
            return True

        def result(self, timeout: float | None = None) -> Any:
            both.wait(timeout=5)
            return run._cells[0][1]

    run._building[0] = os.getpid(), Done()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run, x) for _ in range(2)]:
            assert done.result().shape == x.shape
    assert run._building == {}


def test_a_child_process_compiles_by_itself(small: tuple[nn.Module, Tensor, offline.ModelPlan]) -> None:
    """What the parent's threads held or had begun when it forked is not waited for."""
    model, x, plan = small
    run = lz.compile(model, plan=plan)
    run(x)
    stop, holds = threading.Event(), threading.Event()

    def hold() -> None:
        assert export.begin_tracing()
        holds.set()
        stop.wait()
        torch_private.compile_lock().release()
        export.TRACING.release()

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait()
    with held(offline.BACKGROUND):
        run._building[0] = os.getpid(), offline.BACKGROUND.submit(lambda: run._cells[0][1])
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends it where it hangs
            run.wait()
            free = export.begin_tracing(blocking=False)
            os._exit(0 if free and not run._cells and offline.BACKGROUND.submit(int).result() == 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    holder.join()


def test_a_recompilation_never_blocks_silently(caplog: pytest.LogCaptureFixture) -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    run = lz.compile(double, race=False, cost_model="roofline")
    for n in (4, 4, 5, 6):
        run(torch.zeros(n, 3))
    said = [r.message for r in caplog.records if r.name == "lz_compiler.backend" and r.levelname == "WARNING"]
    assert len(said) == 1
    assert "/1 is compiled again, for other sizes or conditions: the call waited" in said[0]


def _in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@contextmanager
def held(pool: ThreadPoolExecutor) -> Iterator[None]:
    """The pool's only thread is busy."""
    done = threading.Event()
    pool.submit(done.wait)
    try:
        yield
    finally:
        done.set()


class Counting(nn.Module):
    """Writes into a buffer and into an argument, returns a structure with a constant and an alias."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, cache: dict[str, Tensor], *, scale: float = 2.0) -> dict[str, Any]:
        self.calls.add_(1)
        y = self.linear(x) * scale
        cache["sum"].add_(y.sum(0))
        return {"y": y, "view": y[:1], "n": 3}


def test_written_buffers_and_arguments() -> None:
    model = Counting().eval()
    other = copy.deepcopy(model)
    args: Any = (torch.randn(3, 16), {"sum": torch.zeros(16)})
    plan = lz.solve(model, args, {"scale": 3.0}, dynamic={"x": {0: "rows"}}, buckets={"rows": [8]}, **FAST)
    assert model.calls == 0, "solving must not leave traces in the model"
    assert not args[1]["sum"].any()
    run = lz.compile(model, plan=plan)
    mine, theirs = torch.zeros(16), torch.zeros(16)
    for rows in (1, 5, 8):
        x = torch.randn(rows, 16)
        found, expected = run(x, {"sum": mine}, scale=3.0), other(x, {"sum": theirs}, scale=3.0)
        torch.testing.assert_close(found, expected)
        assert found["view"].data_ptr() == found["y"].data_ptr()
        torch.testing.assert_close(mine, theirs)
    assert model.calls == other.calls == 3
    with pytest.raises(PlanError, match=r"scale is 2\.0; the plan is for 3\.0"):
        run(torch.randn(8, 16), {"sum": mine}, scale=2.0)


class Structured(nn.Module):
    """Tensors in a dict and a tuple, tensors that may be left out, and keywords of any name."""

    def forward(self, d: dict[str, Tensor], pair: Any, mul: Tensor | None = None, add: Tensor | None = None, **more: Tensor) -> Tensor:
        y = d["a"] - 2 * d["b"] + pair[0] * (2 if mul is None else mul) + (more["u"] - 3 * more["v"])
        return y if add is None else y + add


def test_arguments_are_known_by_where_they_are() -> None:
    """The order of keys and keywords is free; what is elsewhere, or a constant in place of a tensor, is an error."""
    model = Structured().eval()
    a, b, c, z, u, v = (torch.randn(4, 8) for _ in range(6))
    plan = lz.solve(model, ({"a": a, "b": b}, (c, 1)), {"mul": z, "u": u, "v": v}, **FAST)
    assert plan.leaves == ("d['a']", "d['b']", "pair[0]", "pair[1]", "mul", "add", "u", "v")
    for first in ({"b": b, "a": a}, {"a": a, "b": b}):
        run = lz.compile(model, plan=plan)
        for d in (first, {"b": b, "a": a}, {"a": a, "b": b}):
            torch.testing.assert_close(run(d, (c, 1), mul=z, v=v, u=u), model(d, (c, 1), mul=z, u=u, v=v))
    cases: dict[str, Any] = {
        r"mul is None; the plan is for a tensor of sizes \(4, 8\)": (({"a": a, "b": b}, (c, 1)), {"add": z}),
        r"hold d\['c'\]; the plan is for d\['b'\] there": (({"a": a, "c": b}, (c, 1)), {"mul": z}),
        r"hold pair\[0\]\[0\]; the plan is for pair\[0\] there": (({"a": a, "b": b}, ((c,), 1)), {"mul": z}),
        r"pair\[1\] is 2; the plan is for 1\.": (({"a": a, "b": b}, (c, 2)), {"mul": z}),
    }
    for message, (args, kwargs) in cases.items():
        with pytest.raises(PlanError, match=message):
            run(*args, **kwargs, u=u, v=v)


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.linear(q) - 2 * k


def test_a_tensor_that_is_given_twice_is_two_arguments(tmp_path: Path) -> None:
    """In solve, compile and bake alike; also where an argument is a weight."""
    model = Difference().eval().requires_grad_(False)
    x, y, weight = torch.randn(8, 8), torch.randn(8, 8), model.linear.weight
    first, second = ((lz.solve(model, args, **FAST)) for args in ((x, x), (weight, y)))
    assert first.cells[0].fingerprint == second.cells[0].fingerprint
    lz.bake(first, tmp_path / "out", model, (x, x))
    for run in (lz.compile(model, plan=first), lz.load_baked(tmp_path / "out").forward):
        for args in ((x, x), (x, y), (weight, y)):
            torch.testing.assert_close(run(*args), model(*args))


def test_one_symbol_of_two_arguments(tmp_path: Path) -> None:
    """torch has a symbol for each; that they are equal is no assumption, within the buckets and beyond. Others are named as declared."""
    model, x = Difference().eval(), torch.randn(4, 8)
    both: dict[str, Any] = {"dynamic": {"q": {0: "n"}, "k": {0: "n"}}, "buckets": {"n": [8]}}
    plan = lz.solve(model, (x, x), **both, **FAST)
    lz.bake(plan, tmp_path / "out", model, (x, x))
    baked, run = lz.load_baked(tmp_path / "out"), lz.compile(model, plan=plan)
    for rows in (1, 2, 7, 8, 9, 30):
        q, k = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(baked.forward(q, k), model(q, k))
        if rows <= 8:
            torch.testing.assert_close(run(q, k), model(q, k))
    with pytest.raises(ValueError, match="n is 3 and 4"):
        baked.forward(torch.randn(4, 8), torch.randn(3, 8))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert prove((tmp_path / "out" / "_layerzero_plan.py").read_text(), manifest)[0] == []


def test_an_example_of_one_row_has_the_order_that_is_compiled(tmp_path: Path) -> None:
    """Strides of a dimension of size 1 say nothing of the order; channels_last with one image is channels_last."""

    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.arange(5.0)).softmax(-1)

    model, odd = Ramp().eval(), torch.randn(5, 3)[:, :1].t()
    plan = lz.solve(model, (odd,), dynamic={"x": {0: "n"}}, buckets={"n": [4]}, **FAST)
    lz.bake(plan, tmp_path / "out", model, (odd,))
    baked, run, x = lz.load_baked(tmp_path / "out"), lz.compile(model, plan=plan), torch.randn(4, 5)
    torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(baked.forward(x), model(x))
    assert (run.adapted, baked.adapted) == ({}, {})
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    assert export.Argument.of(image).order == (0, 2, 3, 1)


def test_what_the_model_writes_into_is_never_converted(tmp_path: Path) -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.add_(x)
            return x * 2

    plan = lz.solve(Cached(), (torch.randn(8, 8), torch.zeros(8, 8)), **FAST)
    plan.save(tmp_path / "p.json")
    run = lz.compile(Cached(), plan=tmp_path / "p.json")
    for cache in (torch.zeros(8, 8).t(), torch.zeros(8, 8, dtype=torch.float64)):
        with pytest.raises(PlanError, match=r"cache .*planned as .*The model writes into it"):
            run(torch.randn(8, 8), cache)
    with pytest.warns(UserWarning, match="x is torch.float64"):
        run(torch.ones(8, 8).double(), cache := torch.zeros(8, 8))
    assert torch.equal(cache, torch.ones(8, 8))


@pytest.mark.slow
def test_inputs_that_were_not_planned(planned: tuple[Llama, offline.ModelPlan]) -> None:
    model, plan = planned
    run, strict = lz.compile(model, plan=plan), lz.compile(model, plan=plan, layout_mode="strict")
    cases = {
        "outside of the plan": ids(33), "torch.int32, planned as torch.int64": ids(8).int(),
        "not dense": ids(16).repeat_interleave(2, 1)[:, ::2],
    }  # fmt: skip
    for what, x in cases.items():
        with pytest.warns(UserWarning, match=what):
            found = run(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
        run(x)
        assert [n for case, n in run.adapted.items() if what in case] == [2]
        with pytest.raises(PlanError, match=what):
            strict(x)
    part = ids(32)[:, :20]  # one row of a longer one: its strides differ only where the size is 1
    torch.testing.assert_close(strict(part), model(part), rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="arguments given"):
        lz.compile(Counting(), plan=plan)(ids(8), {})
    for called, x in ((run, ids(8)[None]), (strict, ids(8, batch=2))):
        with pytest.raises(PlanError, match=r"sizes .*\(1, -1\)\]? \(-1 varies\)"):
            called(x)


def test_a_conversion_warns_once_for_all_sizes_and_says_what_it_costs() -> None:
    model = nn.Linear(8, 8).eval()
    plan = lz.solve(model, (torch.randn(4, 8),), dynamic={"input": {0: "rows"}}, buckets={"rows": [32]}, **FAST)
    run = lz.compile(model, plan=plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (2, 3, 4, 5):
            for x in (torch.randn(8, rows).t(), torch.randn(rows, 16)[:, ::2], torch.randn(rows, 8).double()):
                torch.testing.assert_close(run(x), model(x.float()))
    said = [str(w.message) for w in caught]
    assert len(said) == 3, said
    assert "in the order (1, 0)" in said[0]
    assert "writes 64 bytes for (2, 8) with strides (1, 2)" in said[0]
    assert list(run.adapted.values()) == [4, 4, 4]
    assert not any("strides" in case for case in run.adapted)


def test_arguments_that_require_gradients_are_taken_as_values() -> None:
    model = nn.Linear(8, 8)
    plan = lz.solve(model, (torch.randn(4, 8),), **FAST)
    run = lz.compile(model, plan=plan)
    for x in (torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True) * 2):
        found = run(x)
        torch.testing.assert_close(found, model(x))
        assert not found.requires_grad
    assert lz.solve(model, (torch.randn(4, 8, requires_grad=True),), **FAST).cells[0].fingerprint == plan.cells[0].fingerprint


def test_buckets_that_do_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are counted before anything is made; what the allocator says later is told in the same words."""
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    rows: dict[str, Any] = {"dynamic": {"input": {0: "rows"}}}
    with pytest.raises(PlanError, match=r"cell rows 9\.\.1000000000000 does not fit in memory \(its inputs alone need 32,000\.0 GB"):
        lz.solve(model, (x,), buckets={"rows": [8, 10**12]}, **rows, **FAST)
    monkeypatch.setattr(torch_private, "free_memory", lambda device: None)
    for end, words in ((10**15, "RuntimeError: .*can.t allocate memory"), (2**61, "RuntimeError: .*overflowed")):
        with pytest.raises(PlanError, match=rf"cell rows 2\.\.{end} does not fit in memory \({words}.*lower the last end"):
            lz.solve(model, (x,), buckets={"rows": [end]}, **rows, **FAST)


def test_a_plan_is_saved_to_a_folder_that_is_there(small: tuple[nn.Module, Tensor, offline.ModelPlan], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none/p\.json': there is no folder '.*none'\. Make it"):
        small[2].save(tmp_path / "none" / "p.json")


def test_sizes_beyond_the_plan_run_the_model_and_each_case_warns_once(planned: tuple[Llama, offline.ModelPlan]) -> None:
    """Sizes beyond the last bucket are one case however many there are, a dimension that was not declared another; strict refuses both."""
    model, plan = planned
    run, strict = lz.compile(model, plan=plan), lz.compile(model, plan=plan, layout_mode="strict")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in (ids(33), ids(50), ids(64), ids(8, batch=2), ids(9, batch=3)):
            assert torch.equal(run(x), model(x))
    assert ["run the model itself" in str(w.message) for w in caught] == [True, True]
    assert run.adapted == {"seq outside of the plan": 3, "sizes that do not vary in the plan": 2}
    for x in (ids(33), ids(8, batch=2)):
        with pytest.raises(PlanError, match="Give what was planned"):
            strict(x)


def test_options_must_be_the_plans(planned: tuple[Llama, offline.ModelPlan]) -> None:
    model, plan = planned
    with pytest.raises(PlanError, match="'freeze'"):
        lz.compile(model, plan=plan, freeze=False)
    with pytest.raises(OptionError, match="plan holds them"):
        lz.compile(model, plan=plan, mode="max-autotune")
    with pytest.raises(OptionError, match=r"nn\.Module"):
        lz.compile(torch.relu, plan=plan)


def test_the_environment_says_what_happens_to_other_layouts(
    small: tuple[nn.Module, Tensor, offline.ModelPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, plan = small
    monkeypatch.setenv("LAYERZERO_LAYOUT_MODE", "strict")
    with pytest.raises(PlanError, match="or compile with layout_mode='adapt'"):
        lz.compile(model, plan=plan)(x.double())
    with pytest.warns(UserWarning, match="float64"):
        lz.compile(model, plan=plan, layout_mode="adapt")(x.double())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_runs_with_its_own_weights(copied: Callable[[Any], Any]) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    run: Any = lz.compile(model, plan=lz.solve(model, (x,), freeze=True, **FAST))
    torch.testing.assert_close(run(x), model(x))
    other = copied(run)
    with torch.no_grad():
        other.model.weight.mul_(2)
    torch.testing.assert_close(other(x), x @ model.weight.t() * 2 + model.bias)
    torch.testing.assert_close(run(x), model(x))


def test_another_model_and_another_machine(planned: tuple[Llama, offline.ModelPlan], tmp_path: Path) -> None:
    _, plan = planned
    wider = Llama(LlamaConfig(hidden=64, layers=1, heads=4, kv_heads=4, intermediate=96, vocab=VOCAB, max_len=64)).eval()
    with pytest.raises(PlanError, match="not the one that was planned"):
        lz.compile(wider, plan=plan)(ids(4))
    plan.save(tmp_path / "p.json")
    data = unsigned(tmp_path / "p.json")
    for name, value in (("name", "NVIDIA H200"), ("torch", "2.0.0")):
        (tmp_path / "q.json").write_text(json.dumps({**data, "environment": {**data["environment"], name: value}}))
        with pytest.raises(PlanError, match=f"is for {name} {value!r}, here"):
            lz.compile(llama(), plan=tmp_path / "q.json")
    (tmp_path / "q.json").write_text(json.dumps({**data, "environment": {**data["environment"], "threads": "96"}}))
    with pytest.warns(UserWarning, match="threads '96'"):
        lz.compile(llama(), plan=tmp_path / "q.json")


def unsigned(file: Path) -> dict[str, Any]:
    """What stands in a plan's file, without the checksum that an edit would break."""
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "checksum"}


def replaced(data: dict[str, Any], old: Any, new: Any) -> str:
    """The file's text with one part of it exchanged, wherever it stands."""
    return json.dumps(data).replace(json.dumps(old), json.dumps(new))


def test_broken_plan_files(planned: tuple[Llama, offline.ModelPlan], tmp_path: Path) -> None:
    """One clear error each, and nothing that stands in a file is ever executed or imported."""
    _, plan = planned
    file = tmp_path / "p.json"
    plan.save(file)
    text, data = file.read_text(), unsigned(file)
    cell = data["cells"][0]
    candidate = cell["plans"][0]["choices"][0]["candidate"]
    region = candidate["region"]
    broken = {
        "cannot read": text[: len(text) // 2], "is not a plan of lz solve: it has no": "[]",
        "schema 99": json.dumps({**data, "layerzero_model_plan": 99}),
        "damaged": json.dumps({**data, "cells": [{k: v for k, v in cell.items() if k != "plans"}]}),
        "not those of its buckets": json.dumps({**data, "cells": data["cells"][:-1]}),
        "unknown winner": json.dumps({**data, "cells": [{**cell, "winner": "__import__('os')"}, *data["cells"][1:]]}),
        "contents do not fit its checksum": text.replace('"ns": ', '"ns": 1', 1),
        "unknown option 'freezes'.* Did you mean 'freeze'": json.dumps({**data, "options": {**data["options"], "freezes": True}}),
        r"is 'yes'\. Give True or False": json.dumps({**data, "options": {**data["options"], "freeze": "yes"}}),
        "some are missing": json.dumps({**data, "options": {}}),
        "dimension 1 of 'input_ids' is called 'length'": json.dumps({**data, "dynamic": {"input_ids": {"1": "length"}}}),
        "dimension 1 of 'ids' is called 'seq'": json.dumps({**data, "dynamic": {"ids": {"1": "seq"}}}),
        "do not fit each other": json.dumps({**data, "dynamic": {}}),
        "in the order": json.dumps({**data, "tensors": [{**data["tensors"][0], "order": [0, 0]}]}),
        "the upper ends": json.dumps({**data, "buckets": {"seq": [32, 8]}}),
        "needs nodes, and one format": replaced(data, candidate, {**candidate, "in_formats": []}),
        "needs nodes": replaced(data, region, {**region, "nodes": []}),
        "not enough values to unpack": replaced(data, candidate, {**candidate, "params": [["roles"]]}),
    }  # fmt: skip
    for message, content in broken.items():
        file.write_text(content)
        with pytest.raises(PlanError, match=message):
            lz.load_plan(file)
    file.write_text(json.dumps(data))
    assert lz.load_plan(file) == plan, "one from before there were checksums"
    with pytest.raises(PlanError, match="cannot read"):
        lz.load_plan(tmp_path / "none.json")


def test_a_plan_with_a_kernel_exchanged_is_refused(planned: tuple[Llama, offline.ModelPlan], tmp_path: Path) -> None:
    model, plan = planned
    plan.save(tmp_path / "p.json")
    data = unsigned(tmp_path / "p.json")
    for choice in (c for cell in data["cells"] for p in cell["plans"] for c in p["choices"]):
        choice["candidate"]["kernel"] = "os.system"
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"p\.json' names kernel 'os\.system', which is not installed .* Install its package"):
        lz.compile(model, plan=tmp_path / "p.json")


Edit = Callable[[dict[str, Any]], None]
EDITS: dict[str, tuple[Edit, str]] = {
    "act": (lambda c: c["params"].__setitem__(0, ["act", "relu"]), r"onednn\.linear_packed with act='relu' is not a candidate of linear"),
    "roles": (lambda c: c.update(params=[]), "is not a candidate of linear"),
    "kernel": (lambda c: c.update(kernel="onednn.conv"), r"onednn\.conv .*is not a candidate of linear"),
    "formats": (lambda c: [f.update(dtype="bfloat16") for f in c["out_formats"]] and None, "is not a candidate of linear"),
    "region": (lambda c: c["region"].update(inputs=c["region"]["inputs"][::-1]), "is not a candidate of linear"),
    "loop": (lambda c: c.update(kernel="inductor.loop"), r"inductor\.loop .*is not a candidate of linear"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor, offline.ModelPlan]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    return model, x, lz.solve(model, (x,), freeze=True, backends="onednn", **FAST)


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_choice_is_refused(small: tuple[nn.Module, Tensor, offline.ModelPlan], name: str, tmp_path: Path) -> None:
    """A choice that nothing here would offer is an error, not a wrong number; by the compiler and by the baker."""
    (edit, message), (model, x, plan) = EDITS[name], small
    plan.save(tmp_path / "p.json")
    data = unsigned(tmp_path / "p.json")
    chosen = [c["candidate"] for c in data["cells"][0]["plans"][0]["choices"] if c["candidate"]["kernel"] == "onednn.linear_packed"]
    first = next(c for c in chosen if c["params"][0] == ["act", "gelu"])
    edit(first)
    (tmp_path / "p.json").write_text(json.dumps(data))
    other = lz.load_plan(tmp_path / "p.json")
    for run in (lambda: lz.compile(model, plan=other)(x), lambda: lz.bake(other, tmp_path / "out", model, (x,))):
        with pytest.raises(PlanError, match=f"was edited.*{message}"):
            run()


def test_choices_left_out_or_made_twice_are_refused(small: tuple[nn.Module, Tensor, offline.ModelPlan]) -> None:
    model, x, plan = small
    (cell,), ((graph,),) = plan.cells, [c.plans for c in plan.cells]
    choices = graph.choices
    cases = {"no choice computes linear": choices[1:], "two choices compute": (*choices, choices[0])}
    for message, changed in cases.items():
        edited = dataclasses.replace(cell, plans=(dataclasses.replace(graph, choices=changed),))
        with pytest.raises(PlanError, match=message):
            lz.compile(model, plan=dataclasses.replace(plan, cells=(edited,)))(x)
    torch.testing.assert_close(lz.compile(model, plan=plan)(x), model(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic": {"tokens": {1: "seq"}}}, "unknown tensor argument 'tokens'"),
        ({"dynamic": {"input_ids": {2: "seq"}}}, "dimensions 0 to 1, given: 2"),
        ({"dynamic": {"input_ids": {1: "length"}}}, "'length' has no buckets"),
        ({"dynamic": {}}, "no dimension is called 'seq'"),
        ({"buckets": {"seq": [32, 8]}}, "positive integers that grow"),
        ({"buckets": {"seq": []}}, "positive integers that grow"),
        ({"at_least": {"seq": 9}}, r"'seq' is 9\. Give its lowest size: 1 to 8, where its first bucket ends"),
        ({"at_least": {"seq": True}}, "'seq' is True. Give its lowest size"),
        ({"at_least": {"length": 2}}, "unknown symbol 'length'"),
        ({"at_least": 2}, r"at_least is 2\. Give a dict"),
    ],
)
def test_declarations_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PlanError, OptionError), match=message):
        lz.solve(llama(), (ids(4),), **{**SEQ, **changes}, **FAST)


def test_what_is_no_model_and_no_list(planned: tuple[Llama, offline.ModelPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = planned
    with pytest.raises(OptionError, match=r"solve takes an nn\.Module; given: function\. Wrap it"):
        lz.solve(lambda x: x, (ids(4),), **FAST)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"'seq' is 4\. Give a list of upper ends: buckets=\{'seq': \[4\]\}"):
        lz.solve(model, (ids(4),), **{**SEQ, "buckets": {"seq": 4}}, **FAST)
    with pytest.raises(PlanError, match=r"do not fit Llama\.forward: missing a required argument"):
        lz.warmup(lz.compile(model, plan=plan))
    with pytest.raises(OptionError, match=r"warmup takes a folder of lz\.bake.*given: lz_compiler\.zoo\.Llama"):
        lz.warmup(model)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = dataclasses.replace(plan, environment={**plan.environment, "device": "cuda", "name": "NVIDIA H200"})
    with pytest.raises(PlanError, match="is for the GPU 'NVIDIA H200', and here torch finds no GPU"):
        lz.compile(model, plan=there)


def test_autocast_is_part_of_a_plan(tmp_path: Path) -> None:
    """A call where it is otherwise runs the model itself, first or later; strict and bake refuse."""
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = lz.solve(model, (x,), **FAST)
    cast.save(tmp_path / "p.json")
    for plan, planned in ((lz.solve(model, (x,), **FAST), False), (lz.load_plan(tmp_path / "p.json"), True)):
        run, strict = lz.compile(model, plan=plan), lz.compile(model, plan=plan, layout_mode="strict")
        for on in (not planned, planned, not planned):
            with torch.autocast("cpu", torch.bfloat16, enabled=on), warnings.catch_warnings(record=True):
                found, expected = run(x), model(x)
                assert found.dtype is expected.dtype
                torch.testing.assert_close(found, expected)
        assert list(run.adapted.values()) == [2]
        behind = lz.compile(model, plan=plan, compile_in_background=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=planned):
            behind(x)
            behind.wait()  # what was compiled in a thread, which starts without autocast
            torch.testing.assert_close(behind(x), model(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=not planned):
            for refused in (lambda: strict(x), lambda: lz.bake(plan, tmp_path / "out", model, (x,))):  # noqa: B023
                with pytest.raises(PlanError, match=r"autocast is \w+, and the plan was solved with it \w+\. "):
                    refused()


def test_what_is_of_another_kind_is_one_clear_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    rows: dict[str, Any] = {"dynamic": {"input": {0: "n"}}, "buckets": {"n": [4]}}
    for changes, message in (
        ({"buckets": [1, 2]}, r"buckets is \[1, 2\]\. Give a dict: buckets=\{symbol"), ({"dynamic": [0]}, r"dynamic is \[0\]"),
        ({"dynamic": {"input": 0}}, r"'input' is 0\. Give its dimensions by name: dynamic=\{'input': \{0: symbol\}\}"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            lz.solve(model, (x,), **{**rows, **changes}, **FAST)
    plan = lz.solve(model, (x,), **rows, **FAST)
    run: Any = lz.compile(model, plan=plan)
    for wrong, words in ((None, "None"), (torch.tensor(1.0), r"a tensor of sizes \(\)"), (3, "3")):
        with pytest.raises(PlanError, match=rf"input is {words}; the plan is for a tensor of sizes \(-1, 8\) \(-1 varies\)"):
            run(wrong)
    with pytest.raises(PlanError, match=r"unexpected keyword argument 'y'\. Call it as the model is called"):
        run(x, y=x)
    with pytest.raises(OptionError, match="given: 3"):
        lz.compile(model, plan=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="given: 3"):
        plan.save(3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="which is a folder"):
        plan.save(".")
    for thing in (None, "model"):
        with pytest.raises(OptionError, match=f"compile takes an nn.Module or a function; given: {thing!r}"):
            lz.compile(thing)  # type: ignore[type-var]
    caplog.clear()
    lz.compile(model, plan=lz.solve(model, (x,), **FAST))(x)
    assert any("cell for the given shapes in this call" in r.message for r in caplog.records)


@pytest.mark.parametrize("rows", [2, 4])
def test_written_buffers_that_share_memory_are_refused(rows: int) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.zeros(4, 8))
            self.register_buffer("part", self.whole[:rows])

        def forward(self, x: Tensor) -> Any:
            self.whole.add_(x)
            return self.part * 2

    with pytest.raises(PlanError, match="whole and part share memory, and the model writes into it"):
        lz.solve(Shared(), (torch.randn(4, 8),), **FAST)


def test_what_inductor_cannot_compile_is_a_plan_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise torch_private.lowering_errors()[0](ValueError("no lowering"), inspect.currentframe())

    monkeypatch.setattr(offline.Session, "compile", refuse)
    with pytest.raises(PlanError, match=r"TorchInductor cannot compile the graph for n 1\.\.1: \w+Error: ValueError: no lowering"):
        lz.solve(nn.Linear(8, 8).eval(), (torch.randn(4, 8),), **rows("input"), **FAST)


def test_a_model_that_does_not_allow_the_range() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, -1) if x.shape[0] == 8 else x

    with pytest.raises(PlanError, match=r"torch\.export cannot trace Fixed for rows 2\.\.8"):
        lz.solve(Fixed(), (torch.randn(8, 2),), dynamic={"x": {0: "rows"}}, buckets={"rows": [8]}, **FAST)


class Patches(nn.Module):
    """An image in patches: none smaller than one is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def test_sizes_below_a_symbols_lowest_are_outside_of_the_plan(tmp_path: Path) -> None:
    model, x = Patches().eval(), torch.randn(2, 3, 16, 24)
    declared: dict[str, Any] = {"dynamic": {"x": {2: "h", 3: "w"}}, "buckets": {"h": [16, 32], "w": [32]}}
    with pytest.raises(PlanError, match=r"h 1\.\.1, w 1\.\.1, .*Kernel size.* \(at_least={symbol: lowest}\)"):
        lz.solve(model, (x,), **declared, **FAST)
    plan = lz.solve(model, (x,), **declared, at_least={"h": 8, "w": 9}, **FAST)
    assert [c.ranges for c in plan.cells] == [{"h": ends, "w": (9, 32)} for ends in ((8, 16), (17, 32))]
    plan.save(tmp_path / "plan.json")
    assert lz.load_plan(tmp_path / "plan.json") == plan
    run: Any = lz.compile(model, plan=plan)
    with torch.no_grad():
        for h, w in ((8, 9), (31, 32)):
            y = torch.randn(2, 3, h, w)
            torch.testing.assert_close(run(y), model(y))
        with pytest.warns(UserWarning, match=r"h=7, w=9 is outside of the plan \(h 8\.\.32, w 9\.\.32\)"):
            run(torch.randn(2, 3, 7, 9))
    lz.bake(plan, tmp_path / "out", model, (x,))
    report = lz.fuzz(tmp_path / "out", model=model, examples=60)
    assert report.ok, str(report)
    baked = lz.warmup(tmp_path / "out")
    torch.testing.assert_close(baked.forward(x[:, :, :8]), model(x[:, :, :8]))
    with pytest.raises(ValueError, match=r"h is 7, w is 24; this file was made for h 8\.\.32, w 9\.\.32"):
        baked.forward(x[:, :, :7])


def test_the_bundle_that_a_plan_is_for(tmp_path: Path) -> None:
    """Another tokenizer is refused in strict, warned of in adapt; by the plan, its file and a baked folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = {"a": 0, "b": 1, "c": 2}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (folder / "config.json").write_text("{}")
    model, x = nn.Linear(16, 16).eval(), torch.randn(2, 16)
    lz.solve(model, (x,), bundle=folder, **FAST).save(tmp_path / "p.json")
    plan = lz.load_plan(tmp_path / "p.json")
    lz.bake(plan, tmp_path / "out", model, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lz.compile(model, plan=plan, bundle=folder)(x)
        lz.load_baked(tmp_path / "out", bundle=folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 1, "b": 0, "c": 2}, "merges": []}}))
    with pytest.warns(UserWarning, match="another tokenizer than the plan"):
        lz.compile(model, plan=plan, bundle=folder)
    with pytest.warns(UserWarning, match="another tokenizer than the plan"):
        lz.load_baked(tmp_path / "out", bundle=folder)
    with pytest.raises(PlanError, match="another tokenizer than the plan"):
        lz.compile(model, plan=plan, bundle=folder, layout_mode="strict")
    with pytest.raises(PlanError, match=r"without bundle=\.\.\."):
        lz.compile(model, plan=lz.solve(model, (x,), **FAST), bundle=folder)


class Averaging(nn.Module):
    """A buffer that takes part in what the parameters compute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.mul_(0.9).add_(y.mean(0))
        return y + self.mean


def test_gradients_are_no_part_of_a_plan() -> None:
    """Frozen parameters do not make another graph of the model; a call beyond the plan leaves no history in outputs and buffers."""
    model, x = Averaging().eval(), torch.randn(4, 8)
    plan = lz.solve(model, (x,), dynamic={"x": {0: "n"}}, buckets={"n": [4]}, **FAST)
    with pytest.warns(UserWarning, match="n=5 is outside of the plan"):
        assert not lz.compile(model, plan=plan)(torch.randn(5, 8)).requires_grad
    assert not model.mean.requires_grad
    model.requires_grad_(False)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(lz.compile(model, plan=plan)(x), expected)


def test_weights_that_are_converted_are_another_model() -> None:
    """Compiled loops would read 16-bit weights as 32-bit ones, beyond their memory."""
    model, x = Scaled().eval(), torch.randn(4, 8)
    run: Any = lz.compile(model, plan=lz.solve(model, (x,), **FAST))
    torch.testing.assert_close(run(x), model(x))
    run.to(torch.bfloat16)
    with pytest.raises(PlanError, match="this Scaled is not the one that was planned: another graph"):
        run(x)
    torch.testing.assert_close(run.to(torch.float32)(x), model(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).relu()


def test_a_first_call_of_one_row_has_the_order_that_was_planned() -> None:
    """As in the example: strides of a dimension of size 1 say nothing, nor do they make another graph."""
    model, x = nn.Linear(8, 8).eval(), torch.randn(8, 4).t()
    run = lz.compile(model, plan=lz.solve(model, (x,), dynamic={"input": {0: "n"}}, buckets={"n": [4]}, **FAST))
    for some in (torch.randn(8, 1).t(), torch.randn(1, 8), x):
        torch.testing.assert_close(run(some), model(some))
    assert run.adapted == {}


class Chosen(nn.Module):
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return (x * 2)[row]


class Picky(nn.Module):
    """Raises for sizes that it does not allow, and returns what no graph can."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] < 2:
            raise KeyError("one row")
        return x * 2, self.result


LINEAR, FOUR = nn.Linear(8, 8), (torch.randn(4, 8),)


def rows(of: str, symbol: Any = "n", dim: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dynamic": {of: {dim: symbol}}, "buckets": {symbol if isinstance(symbol, int | str) else "n": [end]}}


@pytest.mark.parametrize(
    ("model", "args", "changes", "message"),
    [
        (LINEAR, torch.randn(1, 8), {}, r"args is Tensor\. Give a tuple of the arguments: \(x,\)"),
        (LINEAR, {"input": torch.randn(1, 8)}, {}, r"args is dict\. Give a tuple"),
        (LINEAR, FOUR, {"kwargs": [1]}, r"kwargs is list\. Give a dict"),
        (LINEAR, FOUR, rows("input", "my-n"), "is called 'my-n', which cannot be a name"),
        (LINEAR, FOUR, rows("input", 1), "is called 1, which cannot be a name"),
        (LINEAR, FOUR, rows("input", ["n"]), r"is called \['n'\], which cannot be a name"),
        (LINEAR, FOUR, rows("input", dim=True), "dimensions 0 to 1, given: True"),
        (LINEAR, FOUR, rows("input", end=True), "positive integers that grow"),
        (nn.ReLU(), (torch.tensor(1.0),), rows("input"), "'input' has no dimension, given: 0"),
        (nn.ReLU(), (torch.eye(4).to_sparse(),), {}, r"input is torch\.sparse_coo on cpu; plans are for torch\.strided tensors on"),
        (nn.Linear(8, 8, device="meta"), FOUR, {}, "weight is torch.strided on meta"),
        (Picky(), FOUR, rows("x"), "Picky raised for n 1..1, while .* KeyError: 'one row'"),
        (Picky("a"), FOUR, {}, "Picky returns 'a'; a compiled graph returns tensors"),
        (
            Chosen(),
            (torch.randn(4, 8), torch.tensor([3])),
            rows("x", end=4),
            "does not run with the example's values at n 1..1: .*fit the smallest",
        ),
        (LINEAR, FOUR, {"one_format": "no"}, r"one_format is 'no'\. Give True or False"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(model: nn.Module, args: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PlanError, OptionError), match=message):
        lz.solve(model.eval(), args, **changes, **FAST)


def test_a_size_that_is_another_ones_by_chance_stays_free() -> None:
    """A bias of 8 values beside up to 8 rows: whether it is as large as the product must not be asked of the example's sizes."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return self.linear(x) + bias

    model, bias = Biased().eval(), torch.randn(8)
    run = lz.compile(model, plan=lz.solve(model, (torch.randn(4, 8), bias), dynamic={"x": {0: "n"}}, buckets={"n": [8]}, **FAST))
    for n in (1, 5, 8):
        x = torch.randn(n, 8)
        torch.testing.assert_close(run(x, bias), model(x, bias))
    assert run.adapted == {}
