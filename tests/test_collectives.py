"""All-reduces as a choice: prices that all ranks measured together, and what a plan for two H200s does with them.

The curves are of two NVIDIA H200s under NVLink (torch 2.11, CUDA graphs), as `lz_compiler.collectives` measures them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_golden_plans as golden
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from lz_compiler import collectives
from lz_compiler.capture import GraphView
from lz_compiler.options import Options
from lz_compiler.planning import make_plan
from lz_compiler.ranks import Team, facts
from lz_compiler.target import stored_target
from lz_compiler.timings import TimingStore
from lz_compiler.types import Choice, Plan

KIB = 1 << 10
SEEN: dict[str, list[list[int]]] = {
    "c10d.all_reduce": [[8 * KIB, 13800], [256 * KIB, 13200], [4096 * KIB, 40600], [65536 * KIB, 286400]],
    "symm_mem.one_shot": [[8 * KIB, 9000], [256 * KIB, 10700], [4096 * KIB, 36200], [65536 * KIB, 539200]],
    "symm_mem.two_shot": [[8 * KIB, 9800], [256 * KIB, 10400], [4096 * KIB, 25900], [65536 * KIB, 282400]],
}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A group of two of which only this one is there: enough to trace what each of them runs."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def parallel(rows: int) -> GraphView:
    """A rank's half of an MLP of 4096 and 14336, and the sum of both halves, as traced for a GPU."""
    model = golden.unwritten(lambda: nn.Sequential(nn.Linear(4096, 14336, bias=False), nn.GELU(), nn.Linear(14336, 4096, bias=False)))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return golden.capture(model, input=torch.empty(rows, 4096, dtype=torch.bfloat16))[1]


def planned(view: GraphView, links: Mapping[str, Any], folder: Path) -> Plan:
    store = TimingStore.open(folder)
    store.merge(golden.TIMINGS)
    options = Options.resolve({"cudagraphs": True, "cost_model": "roofline"})
    target = replace(stored_target(store, "NVIDIA H200", graphs=True), links=links)
    return make_plan(view, options, target, store, fingerprint="two ranks", kind="inference")


def sums(plan: Plan) -> list[Choice]:
    return [c for c in plan.choices if c.candidate.region.op == "all_reduce"]


@golden.needs_triton
@pytest.mark.parametrize(("rows", "kernel"), [(1, "symm_mem.one_shot"), (512, "symm_mem.two_shot")])
def test_a_plan_takes_the_all_reduce_that_is_fastest_for_its_size(two_ranks: None, rows: int, kernel: str, tmp_path: Path) -> None:
    view = parallel(rows)
    plan = planned(view, SEEN, tmp_path)
    (choice,) = sums(plan)
    assert (choice.candidate.kernel, choice.cost.source) == (kernel, "measured")
    assert choice.cost.ns == collectives.price(SEEN[kernel], rows * 4096 * 2)
    golden.assert_applies(view, plan)
    (node,) = (n for n in view.graph.nodes if n.target is torch.ops.lz.all_reduce.default)
    assert node.args[1] == kernel.partition(".")[2]
    assert not view.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)


def test_what_the_ranks_did_not_measure_is_not_used(two_ranks: None, tmp_path: Path) -> None:
    only_own = {"c10d.all_reduce": SEEN["c10d.all_reduce"]}  # the others' sums were wrong, or their memory is not shared
    for links in ({}, only_own):
        (choice,) = sums(planned(parallel(1), links, tmp_path))
        assert choice.candidate.kernel == "c10d.all_reduce"
        assert [(r.kernel, r.code) for r in choice.rejections if r.kernel.startswith("symm_mem")] == [
            ("symm_mem.one_shot", "not_measured"), ("symm_mem.two_shot", "not_measured"),
        ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.integers(1, 10**9)), min_size=1, unique_by=lambda p: p[0]), st.data())
def test_a_price_lies_between_those_of_the_sizes_around_it(points: list[tuple[int, int]], data: st.DataObject) -> None:
    curve = sorted(points)
    assert [collectives.price(curve, size) for size, _ in curve] == pytest.approx([ns for _, ns in curve], abs=1, rel=1e-9)
    size = data.draw(st.integers(1, 1 << 31))
    below, above = [p for p in curve if p[0] <= size], [p for p in curve if p[0] >= size]
    found = collectives.price(curve, size)
    if below and above:
        ends = sorted((below[-1][1], above[0][1]))
        assert ends[0] - 1 <= found <= ends[1] + 1
    else:
        assert found == (above[0][1] if above else pytest.approx(below[-1][1] * size / below[-1][0], abs=1))


def test_a_stored_plan_is_not_followed_where_the_ranks_cannot(two_ranks: None, tmp_path: Path) -> None:
    plan = planned(parallel(1), SEEN, tmp_path)
    assert collectives.kernels([plan]) == ["symm_mem.one_shot"]
    assert collectives.missing([plan], SEEN) is None
    assert collectives.missing([plan], {}) == "symm_mem.one_shot is not known to work between these ranks"
    assert collectives.missing([planned(parallel(1), {}, tmp_path)], {}) is None


@pytest.mark.parametrize("wishes", [("unknown", "known"), ("known", "known"), ("unknown", ""), ("unknown", "unknown", "another graph")])
def test_ranks_measure_together_if_one_of_them_does_not_know(wishes: tuple[str, ...]) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    mine = [{"a": [[1, 10], [2, 30]], "b": [[1, 1], [2, 1]]}, {"a": [[1, 20], [2, 20]]}]  # kernel b is wrong on the second
    known, calls = {"a": [[1, 5], [2, 6]]}, []
    found: list[Any] = [None, None]

    def measured(rank: int) -> Any:
        calls.append(rank)
        return mine[rank]

    def run(rank: int) -> None:
        team = Team(store, rank, 2, 0, 20.0, 20.0)
        graph = "h" if len(wishes) > 2 and rank else "g"  # two groups, which plan by themselves
        team.meet(facts({"device": "cuda"}, {}, (), graph, wishes[rank]))
        found[rank] = team.links(known if wishes[rank] == "known" else None, lambda: measured(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    expected = {} if "" in wishes or len(wishes) > 2 else known if wishes == ("known", "known") else {"a": [[1, 20], [2, 30]]}
    assert found == [expected, expected]
    assert sorted(calls) == ([0, 1] if wishes == ("unknown", "known") else [])


def test_curves_are_kept_and_damaged_ones_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "environment", lambda device: {"name": "NVIDIA H200"})
    store = TimingStore.open(tmp_path)
    assert collectives.stored(store, 2, True) is None
    collectives.keep(store, 2, True, SEEN)
    assert collectives.stored(TimingStore.open(tmp_path), 2, True) == SEEN
    assert collectives.stored(store, 2, False) is collectives.stored(store, 4, True) is None
    for damaged in ([], [[2, 1], [1, 1]], [[1, -1]], [["1", 1]], [[1, 2, 3]], "curve"):
        collectives.keep(store, 2, True, {"c10d.all_reduce": damaged})  # type: ignore[dict-item]
        assert collectives.stored(store, 2, True) is None
