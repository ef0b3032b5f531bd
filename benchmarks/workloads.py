"""What a benchmark of whole models is made of: workloads, and columns to run them under."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with the keyword arguments of one call; with `trains`, a call is a whole training step.

    `floors` are milliseconds that the card cannot go below, by what they count.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    floors: Mapping[str, float] = field(default_factory=dict)
    trains: bool = False

    def rewind(self) -> None:
        """Before each call: a static cache counts its own tokens, in the graph. All but its last two positions are filled."""
        cache = self.inputs.get("past_key_values")
        for layer in () if cache is None else cache.layers:
            layer.cumulative_length.fill_(layer.max_cache_len - 2)

    def call(self, model: nn.Module, run: Callable[..., Any]) -> Callable[[], Any]:
        """One call of `run`, which is `model` or what it was compiled to. Training: forward, backward, AdamW step."""
        if not self.trains:
            return lambda: run(**self.inputs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            run(**self.inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def converted(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with all their floating-point numbers in another dtype, a cache's too."""
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            out[name] = value.to(dtype) if value.is_floating_point() else value
        else:
            out[name] = copy.deepcopy(value)
            for layer in getattr(value, "layers", ()) and out[name].layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return out


@dataclass(frozen=True)
class Column:
    """How torch.compile is called; `models` are those that the column makes sense for, None is all.

    `cold` asks for the time of its first call with Inductor's caches empty; the other columns of a process share them.
    """

    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    # options={"freezing": True} alone does not freeze: whether parameters become constants is decided by Dynamo while
    # it traces, and Dynamo reads the global config (and wants no_grad). It is needed all the same, since without it
    # this column equals plain `inductor` to Dynamo, and a graph compiled for that one would be reused.
    freezing: bool = False
    models: tuple[str, ...] | None = None
    cold: bool = False


@dataclass(frozen=True)
class Suite:
    """The models and columns of one device.

    `exact` is the dtype of the reference. `warmup` calls must cover LayerZero's race over its first real calls: before it is
    over, a call may still be any of its finalists. The first column of `cold` that is asked for is LayerZero's first, with
    nothing stored but the card's peaks, and is compiled again at the end, with its timings and verdict; both with Inductor's
    caches empty.
    """

    models: Mapping[str, Callable[[str], Workload]]
    columns: Mapping[str, Column]
    baselines: tuple[str, ...]
    dtype: torch.dtype
    exact: torch.dtype
    warmup: int
    cold: tuple[str, ...] = ()
