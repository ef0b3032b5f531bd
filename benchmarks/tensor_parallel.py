"""A Llama of Llama-3-8B's width, four layers in bfloat16, divided over the GPUs of one machine: every product's rows or columns, with
two all-reduces a layer.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py [--tokens 1,512] [--rounds 30]

Columns are interleaved, the ranks in step; medians of rank 0, whole calls between CUDA events, host time included. Errors are relative
L2 distances to eager in float32 on one GPU.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timing import interleave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lz_compiler import zoo
from lz_compiler.backend import RECORDS

CONFIG = zoo.LlamaConfig(hidden=4096, layers=4, heads=32, kv_heads=8, intermediate=14336, vocab=32000)
COLUMNS: dict[str, dict[str, Any]] = {
    "Inductor": {"backend": "inductor"},
    "Inductor, `reduce-overhead`": {"backend": "inductor", "mode": "reduce-overhead"},
    "LayerZero": {"backend": "layerzero"},
    "LayerZero, CUDA graphs": {"backend": "layerzero", "options": {"cudagraphs": True}},
}


def divided(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    columns, rows = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"), ("attention.o", "mlp.down")
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {**{n: ColwiseParallel() for n in columns}, **{n: RowwiseParallel() for n in rows}})
    return model


def sums() -> str:
    """The all-reduces of the last plan, by kernel."""
    names = Counter(c.candidate.kernel for p in RECORDS[-1].plans for c in p.choices if c.candidate.region.op == "all_reduce")
    return ", ".join(f"{count} {name}" for name, count in names.items())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,512")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    with torch.device("cuda"):
        model, _, _ = zoo.llama(CONFIG)
    prompts = [torch.randint(CONFIG.vocab, (1, int(n)), device="cuda") for n in args.tokens.split(",")]
    for prompt in prompts:
        dist.broadcast(prompt, 0)
    exact = [model(prompt) for prompt in prompts]
    divided(model.to(torch.bfloat16))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {args.rounds} rounds\n")
        print("| tokens | column | ms | p20 to p80 | all-reduces | error |\n|---|---|---|---|---|---|")
    for prompt, truth in zip(prompts, exact, strict=True):
        calls, chosen, errors = {}, {}, {}
        torch._dynamo.reset()
        for name, how in COLUMNS.items():
            run = torch.compile(model, **how)
            for _ in range(3):  # with CUDA graphs: run, captured, replayed
                out = run(prompt)
            errors[name] = float((out.float() - truth).norm() / truth.norm())
            chosen[name] = sums() if how["backend"] == "layerzero" else ""
            calls[name] = partial(run, prompt)
        stats = interleave(calls, args.rounds, device="cuda")
        for name, s in stats.items():
            if dist.get_rank() == 0:
                spread = f"{s.p20:.3f} to {s.p80:.3f}"
                print(f"| {prompt.shape[1]} | {name} | {s.median:.3f} | {spread} | {chosen[name]} | {errors[name]:.1e} |", flush=True)
    dist.barrier()
    calls.clear()
    torch._dynamo.reset()  # NCCL's communicator waits for the CUDA graphs that hold its collectives
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
