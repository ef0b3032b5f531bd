"""What tests/test_ranks.py starts on each of two ranks, `ranks_job.py FOLDER DEVICE`; writes what it saw to FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lz_compiler as lz
from lz_compiler import target, torch_private
from lz_compiler.backend import RECORDS
from lz_compiler.race import ROUNDS, WARMUP

OPTIONS = {"cost_model": "roofline"}
DEVICE = sys.argv[2]  # cpu, with gloo, or cuda, with NCCL and a GPU a rank


def mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width), nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, width))
    return nn.Sequential(*layers).to(DEVICE)


def seen(compiled: Callable[..., Any], error: float) -> dict[str, Any]:
    record, counters = RECORDS[-1], torch_private.counters()
    lines = str(lz.explain(compiled)).splitlines()
    return {
        "error": error, "winner": record.winner, "times": record.times, "notes": record.notes,
        "line": [x.strip() for x in lines if "ranks:" in x],
        "kernels": [[c.candidate.kernel for c in p.choices] for p in record.plans], "applied": counters["kernels"],
        "nodes": [n for p in record.plans for c in p.choices for n in c.candidate.region.nodes], "plans": counters["plans"],
    }  # fmt: skip


def tensor_parallel() -> dict[str, Any]:
    """With `freeze`, which has no effect on DTensors, and with the race, in which all ranks run the same finalist in the same call."""
    model, x = mlp().eval(), torch.randn(512, 64, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        styles = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel(), "5": RowwiseParallel()}
        parallelize_module(model, init_device_mesh(DEVICE, (dist.get_world_size(),)), styles)
        compiled = torch.compile(model, backend="layerzero", options={**OPTIONS, "freeze": True})
        first, code = run_and_get_code(compiled, x)
        outs = [first, *(compiled(x) for _ in range(2 * (WARMUP + ROUNDS)))]
    calls = re.findall(r"torch\.ops\.(?:_c10d_functional\.)?(lz\.all_reduce|all_reduce|wait_tensor)_?\.default\(", "".join(code))
    return seen(compiled, max(float((o - expected).abs().max()) for o in outs)) | {"collectives": calls}


def vocabulary_parallel() -> dict[str, Any]:
    """Each rank's graph has its own offset into the vocabulary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 128)).eval().to(DEVICE)
    ids = torch.arange(32, device=DEVICE)
    with torch.no_grad():
        expected = model(ids)
        parallelize_module(model, init_device_mesh(DEVICE, (dist.get_world_size(),)), {"0": RowwiseParallel(input_layouts=Replicate())})
        compiled = torch.compile(model, backend="layerzero", options=OPTIONS)
        out = compiled(ids)
    return seen(compiled, float((out - expected).abs().max()))


def data_parallel() -> dict[str, Any]:
    """The mean of both ranks' gradients is that of both batches."""
    plain, batches = mlp()[:3], torch.randn(2, 8, 64, device=DEVICE)
    mine = batches[dist.get_rank()].clone()  # as a view, its offset would be a symbol of one rank's graph
    plain(batches).square().mean().backward()
    model = mlp()[:3]
    compiled = torch.compile(model, backend="layerzero", options=OPTIONS)
    parallel = DistributedDataParallel(compiled)
    parallel(mine).square().mean().backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    return seen(compiled, max(_distance(a.grad, b.grad) for a, b in pairs))


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float((a - b).abs().max())


def fails(width: int, **options: Any) -> str:
    try:
        with torch.no_grad():
            torch.compile(mlp(width), backend="layerzero", options={**OPTIONS, **options})(torch.randn(8, width, device=DEVICE))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return f"{type(error.inner_exception).__name__}: {error.inner_exception}"
    return "nothing was raised"


def main(folder: Path) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, found = dist.get_rank(), {}
    os.environ["LAYERZERO_CACHE_DIR"] = str(folder / f"cache{rank}")  # as on machines of their own
    for scenario in (tensor_parallel, vocabulary_parallel, data_parallel):
        torch_private.counters().clear()
        torch._dynamo.reset()
        found[scenario.__name__] = scenario()
    found["symmetric_memory"] = torch_private.symmetric_memory()
    known = target.library_versions(DEVICE)
    if rank == 1:
        target.library_versions = lambda device: {**known, "torch": "2.13.1"}  # type: ignore[assignment]
    found["versions"] = fails(32)
    target.library_versions = lambda device: known  # type: ignore[assignment]
    found["leader"] = fails(48, policy={"deny": [{"op": "linear"}]})
    if rank == 0:  # the last one: the ranks no longer compile the same number of graphs
        found["missing"] = fails(16, rank_timeout_s=1.0)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
