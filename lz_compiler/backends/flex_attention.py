"""FlexAttention (Dong et al., FlexAttention: a programming model for generating optimized attention kernels, 2024): TorchInductor
generates a kernel around the predicate that was read off the mask. On a CPU it is C++, on a GPU Triton.

Blocks of the scores that the predicate hides altogether are skipped, where it is known ahead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import semantics, torch_private
from ..types import Candidate, Rejection
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name

Predicate = Callable[..., Any]


@functools.cache
def _predicate(causal: bool, shift: int, window: int, position: int, keys: int) -> Predicate:
    """Whether query i sees key j, as semantics.visible says it. `position` and `keys`: 0 where the mask reads none, 1 for one that
    all batch entries share, 2 for one each; these tensors are further arguments."""

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor, *read: Tensor) -> Tensor:
        last = i + shift
        if position:
            last = last + torch.ops.aten.index.Tensor(read[0], [batch if position == 2 else batch * 0])
        seen = j <= last if causal else j >= 0
        if window:
            seen = seen & (j > last - window)
        return seen & torch.ops.aten.index.Tensor(read[-1], [batch if keys == 2 else batch * 0, j]) if keys else seen

    return sees


def _own(p: Values) -> Predicate:
    return _predicate(p["causal"], p["shift"], p["window"], *p["read"])


@functools.cache
def _blocks(sees: Predicate, queries: int, keys: int, device: str, ahead: bool) -> tuple[Any, ...]:
    """FlexAttention's block mask; where the predicate is not known ahead, one block that holds everything."""
    with torch_private.real_tensors():
        return torch_private.flex_blocks(sees, queries, keys, device, ahead)


def _prepare(emit: Emitter, t: Values, p: Values) -> Values:
    blocks = [part for part in _block_mask(p) if isinstance(part, Tensor)]
    return {**t, **{f"block{i}": emit.constant(lambda part=part: part.clone()) for i, part in enumerate(blocks)}}


def _block_mask(p: Values) -> tuple[Any, ...]:
    return _blocks(_own(p), p["queries"], p["keys"], p["device"], not any(p["read"]))


def _attention(emit: Emitter, t: Values, p: Values) -> Any:
    read = tuple(x for x in semantics.mask_inputs(emit.call, t, p) if x is not None)
    with torch_private.real_tensors():
        place = list(torch.zeros(4, dtype=torch.int32).unbind())  # batch, head, query, key
        mask = emit.subgraph(_own(p), *place, *(_example(x) for x in read))
        score = emit.subgraph(_nan_kept if p["device"] == "cpu" else _identity, torch.zeros(()), *place)
    given = iter([t[role] for role in [f"block{i}" for i in range(sum(r.startswith("block") for r in t))]])
    blocks = tuple(next(given) if isinstance(part, Tensor) else mask if callable(part) else part for part in _block_mask(p))
    scale = p["scale"] if p["scale"] is not None else 1.0 / math.sqrt(p["head"])
    options = torch_private.flex_options()
    both = emit.call(torch_private.flex_attention(), t["q"], t["k"], t["v"], score, blocks, scale, options, (), read)
    return emit.item(both, 0)


def _example(x: Any) -> Tensor:
    """A tensor like what a value of the graph holds, to trace with."""
    value = x if isinstance(x, Tensor) else x.meta["val"]
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


def _identity(score: Tensor, *_: Tensor) -> Tensor:
    return score


def _nan_kept(score: Tensor, *_: Tensor) -> Tensor:
    """The C++ kernel takes the largest score without NaN, and a row of NaN alone for one that sees nothing. Infinity minus
    infinity is NaN again."""
    return torch.where(score != score, math.inf, score)


class FlexAttention(Described):
    name = "flex_attention"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels = by_name(Kernel("flex.attention", _attention, _prepare, compiled=True))

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        q, of_batch = ctx.spec("q"), {read[0]: "batch" in read[1] for read in ctx.params.get("reads", ())}
        position = [1 + own for role, own in of_batch.items() if role == "position"]
        keys = [1 + own for role, own in of_batch.items() if role != "position"]
        read = (max(position, default=0), max(keys, default=0))
        yield ctx.candidate(self.kernels[name], read=read, device=q.device, head=q.shape[-1])
