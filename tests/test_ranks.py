"""Two ranks of one job (torchrun; gloo, or NCCL on two GPUs): one plan, the same outputs, and differences that are named.

The job (tests/ranks_job.py) runs once; what a rank saw there is what these tests look at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lz_compiler
from lz_compiler import backends, ranks
from lz_compiler.errors import RankError
from lz_compiler.ranks import Team, facts

HERE = Path(__file__).parent
PRODUCTS = ("onednn.linear", "cublas.addmm_activation", "aten.mm", "triton.gemv")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(lz_compiler.__file__).parent.parent), *filter(None, sys.path)])
    # Nothing comes from torch's caches; what torch knows of this CPU's instructions stays known.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_COMPILE_CACHE_KEY_TAG": str(folder)}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "ranks_job.py")]
    run += [str(folder), request.param]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", ["tensor_parallel", "data_parallel"])
def test_both_ranks_run_the_plan_of_the_first(seen: list[dict[str, Any]], scenario: str) -> None:
    first, second = (found[scenario] for found in seen)
    assert first["line"] == second["line"]
    assert re.fullmatch(r"ranks: plan [0-9a-f]{16} agreed by ranks 0-1 of 2, made by rank 0", first["line"][0])
    assert first["kernels"] == second["kernels"]
    assert first["plans"] > 0 == second["plans"]  # the second rank planned nothing
    assert first["applied"] == second["applied"] > 0
    assert max(first["error"], second["error"]) < 1e-5


def test_a_tensor_parallel_graph_is_planned_around_its_collectives(seen: list[dict[str, Any]]) -> None:
    found = seen[1]["tensor_parallel"]
    products, sums = ([k for k in found["kernels"][0] if k.startswith(way)] for way in (PRODUCTS, ("c10d.", "symm_mem.")))
    assert len(products) == 4
    assert [n for n in found["nodes"] if "all_reduce" in n or "wait_tensor" in n] == ["all_reduce", "all_reduce_1"]
    # 512 rows of 64 numbers: between GPUs that read each other's memory, one of torch's kernels for that is faster than NCCL.
    shared = seen[0]["symmetric_memory"]
    assert all(k.startswith("symm_mem.") for k in sums) if shared else sums == ["c10d.all_reduce"] * 2
    ours, theirs = found["collectives"][:4], found["collectives"][4:]  # the plan's code, and TorchInductor's, which it races
    assert theirs == ["all_reduce", "wait_tensor"] * 2
    assert ours == (["lz.all_reduce", "wait_tensor"] * 2 if shared else theirs)


def test_ranks_race_in_step_and_take_the_same_winner(seen: list[dict[str, Any]]) -> None:
    first, second = (found["tensor_parallel"] for found in seen)
    assert first["winner"] == second["winner"]
    assert first["times"] == second["times"]  # of the slower rank
    assert set(first["times"]) == {"layerzero", "inductor"}
    assert first["winner"] == min(first["times"], key=first["times"].__getitem__)


def test_ranks_with_other_graphs_plan_by_themselves(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["vocabulary_parallel"]["error"] < 1e-5
        assert found["vocabulary_parallel"]["plans"] == 1
        assert "has another: hardware, quarantine or graph differ" in found["vocabulary_parallel"]["line"][0]


def test_a_difference_in_versions_names_the_ranks_on_each_of_them(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert re.search(r"RankError: .*torch is \S+ on rank 0, 2\.13\.1 on rank 1\b", found["versions"])


def test_what_the_planning_rank_raises_is_told_to_the_other(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["leader"].startswith("PolicyError: the policy leaves no plan")
    assert re.search(r"rank 0 raised .*the policy leaves no plan", seen[1]["leader"])


def test_a_rank_that_does_not_come_is_named_after_the_timeout(seen: list[dict[str, Any]]) -> None:
    assert re.search(r"RankError: graph \d+: rank 1 did not come within 1 s", seen[0]["missing"])
    assert "missing" not in seen[1]


def _meeting(told: list[dict[str, Any]], timeout_s: float = 20.0) -> list[Team | str]:
    """Each rank's team after it met, or its error: ranks as threads over one store."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=timeout_s))
    found: list[Team | str] = [""] * len(told)

    def run(rank: int) -> None:
        team = Team(store, rank, len(told), 0, timeout_s, timeout_s)
        try:
            team.meet(told[rank])
            found[rank] = team
        except RankError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(told))]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    return found


def _told(name: str = "A", graph: str = "g", refused: tuple[str, ...] = (), **versions: str) -> dict[str, Any]:
    return facts({"device": "cuda", "name": name, "torch": "2.13.0"} | versions, {"option freeze": "True"}, refused, graph)


def test_capability_groups_are_hardware_quarantine_and_graph() -> None:
    told = [_told(), _told("B", torch="2.13.1"), _told(), _told("B", torch="2.13.1"), _told(refused=("x",)), _told(graph="h")]
    teams = _meeting(told)
    assert [t.members for t in teams if isinstance(t, Team)] == [[0, 2], [1, 3], [0, 2], [1, 3], [4], [5]]
    assert [t.rank for t in teams if isinstance(t, Team) and t.leads] == [0, 1, 4, 5]


def test_each_version_that_differs_is_named_with_its_ranks() -> None:
    errors = _meeting([_told(cudnn="9"), _told(cudnn="9"), _told(torch="2.13.1", cudnn="8"), _told(cudnn="9"), _told("B")])
    assert len(set(map(str, errors))) == 1
    assert "cudnn is 9 on ranks 0-1, 3, 8 on rank 2; torch is 2.13.0 on ranks 0-1, 3, 2.13.1 on rank 2." in str(errors[0])


def test_the_same_graph_with_another_plan_is_an_error_and_a_lossy_plan_is_dropped_by_all() -> None:
    teams = [t for t in _meeting([_told(), _told()]) if isinstance(t, Team)]
    found: dict[int, Any] = {}

    def run(team: Team) -> None:
        names = team.union(["layerzero"] if team.rank else [])
        try:
            team.confirm("layerzero", [_plan("aten.mm", ("onednn.linear", "aten.mm")[team.rank], "aten.addmm")])
        except RankError as error:
            found[team.rank] = names, str(error)

    threads = [threading.Thread(target=run, args=(team,)) for team in teams]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert [found[rank][0] for rank in (0, 1)] == [["layerzero"], ["layerzero"]]
    named = r"several plans: layerzero \w+ on rank 0, layerzero \w+ on rank 1; at n1: onednn.linear on rank 0, aten.mm on rank 1\."
    assert all(re.search(named, error) for _, error in found.values()), found


def _plan(*kernels: str) -> dict[str, Any]:
    choices = [{"candidate": {"region": {"nodes": [f"n{i}"]}, "kernel": kernel}} for i, kernel in enumerate(kernels)]
    return {"fingerprint": "f", "choices": choices}


def test_drivers_nccl_and_descriptors_are_among_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [backends.all_backends()["aten"]]
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    told = []
    for number in ("580.65", "580.82"):
        monkeypatch.setattr(ranks, "driver", lambda number=number: number)
        told.append(facts({"device": "cuda", "name": "A"}, ranks.libraries(known, "cuda"), (), "g"))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 0))
    monkeypatch.setattr(ranks, "descriptor", lambda backend: None)
    told.append(facts({"device": "cuda", "name": "A"}, ranks.libraries(known, "cuda"), (), "g"))
    error = str(_meeting(told)[0])
    assert "driver is 580.65 on rank 0, 580.82 on ranks 1-2" in error
    assert "nccl is 2.27.3 on ranks 0-1, 2.28.0 on rank 2" in error
    assert re.search(r"descriptor aten is [0-9a-f]{12} on ranks 0-1, none on rank 2", error)


def test_other_all_reduces_are_an_error_whatever_else_differs() -> None:
    """Ranks that use different ones would wait for each other for ever."""
    teams = [t for t in _meeting([_told(), _told()]) if isinstance(t, Team)]
    found: dict[int, str] = {}

    def run(team: Team) -> None:
        try:
            team.confirm(
                "layerzero",
                [{**_plan("aten.mm"), "fingerprint": f"graph {team.rank}"}],
                ["c10d.all_reduce", "symm_mem.one_shot"][: 1 + team.rank],
            )
        except RankError as error:
            found[team.rank] = str(error)

    threads = [threading.Thread(target=run, args=(team,)) for team in teams]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert sorted(found) == [0, 1]
