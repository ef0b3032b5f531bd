"""Ranks of a job: collectives in graphs, groups, memory that their GPUs share, and the job's key-value store."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_COLLECTIVE = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "symm_mem")


def is_collective(target: Any) -> bool:
    """Whether an operator takes part in a communication between ranks (torch has no tag for them)."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in _COLLECTIVE


def is_all_reduce(target: Any) -> bool:
    return is_collective(target) and target is all_reduce()


def all_reduce() -> Any:
    """all_reduce(x, "sum", group's name): starts it; its result may be read after wait_tensor."""
    return torch.ops._c10d_functional.all_reduce.default


def all_reduced(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x, by the group's own collective."""
    return torch.ops._c10d_functional.wait_tensor(all_reduce()(x, "sum", group))


def world() -> str:
    """The name of the group of all ranks."""
    return str(torch.distributed.group.WORLD.group_name)  # type: ignore[union-attr]


def group_size(name: Any) -> int | None:
    """How many ranks a group has; None where its name is known here no longer."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    try:
        return int(_resolve_process_group(name).size())
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None


def symmetric_memory() -> bool:
    """Whether there may be memory that the job's GPUs read of each other: NCCL ranks, each with a GPU, all on this machine."""
    many = torch.distributed.is_initialized() and torch.cuda.is_available()
    return many and "nccl" in str(torch.distributed.get_backend()) and torch.distributed.get_world_size() <= torch.cuda.device_count()


def symmetric_buffer(group: str, nbytes: int, device: torch.device) -> Tensor:
    """At least so many bytes that every rank of the group can read, this rank's own: one for each power of two, never freed, since
    CUDA graphs remember where it is. A collective where it is new. RuntimeError where the GPUs cannot."""
    return _symmetric_buffer(group, max(1 << 20, 1 << (nbytes - 1).bit_length()), device)


@functools.cache
def _symmetric_buffer(group: str, nbytes: int, device: torch.device) -> Tensor:
    from torch.distributed import _symmetric_memory

    buffer = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    _symmetric_memory.rendezvous(buffer, group)  # type: ignore[arg-type]
    return buffer


@functools.lru_cache(maxsize=1)
def _connection(store: Any) -> Any:
    return store.clone()


def job_store(prefix: str) -> Any:
    """The key-value store that the default process group met in, under a prefix: a second connection to it, since a wait
    blocks the first one for the group's own watchdogs."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore(prefix, _connection(_get_default_store()))
