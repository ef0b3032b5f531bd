"""What each way to do an all-reduce takes between the GPUs of one machine, by bytes, as LayerZero measures it for its plans.

Run: torchrun --nproc-per-node 2 benchmarks/all_reduce.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from lz_compiler import collectives, torch_private


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    name = f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = {graphs: collectives.measure(torch_private.world(), graphs) for graphs in (True, False)}
    if dist.get_rank() == 0:
        print(f"{name}, NCCL {torch.cuda.nccl.version()}, bfloat16, microseconds a call\n")
        print("| bytes | kernel | in a CUDA graph | with the host |\n|---|---|---|---|")
        for i, size in enumerate(collectives.SIZES):
            for kernel in found[True]:
                print(f"| {size} | {kernel} | {found[True][kernel][i][1] / 1e3:.1f} | {found[False][kernel][i][1] / 1e3:.1f} |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
