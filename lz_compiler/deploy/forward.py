"""`forward` of a baked file: its signature, what it checks, and how it finds the cell for a call's sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import general, writing
from .export import Ranges
from .offline import ModelPlan


@dataclass(frozen=True, slots=True)
class Forward:
    """What it is written from. `named`: the example's arguments. `symbols`: the plan's -> their variables. `beyond`: of each general cell
    its sizes, and what else is asked of them. `returns`: the model's output as an expression of `out`."""

    plan: ModelPlan
    model: nn.Module
    named: Mapping[str, Any]
    symbols: Mapping[str, str]
    beyond: Sequence[tuple[Ranges, tuple[str, ...]]]
    returns: str

    @property
    def inputs(self) -> list[str]:
        """The arguments that are tensors; the others are constants."""
        return [name for name, value in self.named.items() if isinstance(value, Tensor)]

    def signature(self) -> str:
        """The parameters of `forward`, as the model has them: what it takes by name alone comes last."""
        known = inspect.signature(self.model.forward).parameters
        by_name = [n for n in self.named if n not in known or known[n].kind is inspect.Parameter.KEYWORD_ONLY]
        texts = {name: _parameter(name, value) + ("=None" if name in self._defaulted() else "") for name, value in self.named.items()}
        star = ["*"] if by_name else []
        return ", ".join([*(texts[n] for n in self.named if n not in by_name), *star, *(texts[n] for n in by_name)])

    def _defaulted(self) -> set[str]:
        """Tensors that come after a constant: Python wants a default for them, too."""
        first = next((i for i, name in enumerate(self.named) if name not in self.inputs), len(self.named))
        return {name for name in list(self.named)[first:] if name in self.inputs}

    def checks(self) -> str:
        """Dtype, device and strides of each input, and its sizes by name: attributes that cost tens of nanoseconds each."""
        lines = [
            f"    if {_other(name, value)}:\n        raise ValueError(_constant({name!r}, {name}, {value!r}))"
            for name, value in self.named.items()
            if name not in self.inputs
        ]
        sizes: dict[str, str] = {}  # symbol -> its variable
        for name, planned in zip(self.inputs, self.plan.tensors, strict=True):
            dims, symbols = len(planned.order), self.plan.dynamic.get(name, {})
            ordered = f"{name}.is_contiguous()" if planned.order == tuple(range(dims)) else f"_ordered({name}, {planned.order})"
            fits = [f"{name}.dtype is torch.{planned.dtype}", f"{name}.is_{planned.device}", f"{name}.dim() == {dims}", ordered]
            fits += [f"not {name}.requires_grad"] if getattr(torch, planned.dtype).is_floating_point else []
            fits += [f"{name}.data_ptr() % 16 == 0"] if planned.device == "cuda" else []
            lines.append(f"    try:\n        if not ({' and '.join(fits)}):")
            lines.append(f"            {name} = _adapt({name!r}, {name}, torch.{planned.dtype}, {planned.order})")
            lines.append("    except AttributeError as _error:")  # a `try` costs nothing where nothing is raised
            lines.append(f"        raise ValueError(_constant({name!r}, {name}, 'a tensor')) from _error")
            first = {}  # dimension -> the variable of a symbol that was not met before
            for i, symbol in symbols.items():
                if symbol not in sizes:
                    sizes[symbol] = first[i] = self.symbols[symbol]
            taken = {*self.named, *self.symbols.values()}
            found = [first[i] if i in first else writing.free(f"{name}_size_{i}", taken) for i in range(dims)]
            if found:
                lines.append(f"    {', '.join(found)}{',' if dims == 1 else ''} = {name}.shape")
            fixed = " or ".join(f"{size} != {n}" for size, n in zip(found, planned.shape, strict=True) if n >= 0)
            if fixed:
                lines.append(f"    if {fixed}:\n        raise ValueError(_sizes({name!r}, {name}, {planned.shape}))")
            for i, symbol in symbols.items():
                size = sizes[symbol]
                if i not in first:
                    lines.append(f"    if {found[i]} != {size}:")
                    lines.append(f"        raise ValueError(_outside({symbol!r}, {found[i]}, {size}, {size}))")
                elif not self.beyond:  # else all sizes are compared at once, below
                    low, high = self.plan.lowest[symbol], self.plan.buckets[symbol][-1]
                    lines.append(f"    if not {low} <= {size} <= {high}:")
                    lines.append(f"        raise ValueError(_outside({symbol!r}, {size}, {low}, {high}))")
        return "\n".join(lines + (self._general_dispatch() if self.beyond else []))

    def _general_dispatch(self) -> list[str]:
        """What `forward` does with sizes beyond the buckets."""
        within = [f"{self.plan.lowest[s]} <= {self.symbols[s]} <= {ends[-1]}" for s, ends in self.plan.buckets.items()]
        together = ", ".join(f"{s}={size}" for s, size in self.symbols.items())
        lines = [f"    if not ({' and '.join(within)}):" if len(within) > 1 else f"    if not {within[0]}:"]
        for i, sizes in enumerate(self.beyond):
            lines.append(f"        {'elif' if i else 'if'} {writing.renamed(general.condition(*sizes), self.symbols)}:")
            lines.append(f"            _beyond({together})")
            lines.append(f"            out = general_{i}({', '.join(self.inputs)})")
        return [*lines, "        else:", f"            raise ValueError(_nowhere({together}))", f"        return {self.returns}"]

    def dispatch(self) -> str:
        """A binary search for the cell, symbol by symbol, by the buckets' upper ends; sizes outside of them were refused before.

        A `try` costs a call nothing unless something is raised.
        """
        lines: list[str] = ["    try:"]

        def level(cells: Sequence[tuple[int, Ranges]], symbols: Sequence[str], indent: str) -> None:
            if not symbols:
                ((index, _),) = cells
                lines.append(f"{indent}out = cell_{index}({', '.join(self.inputs)})")
                return
            ends = sorted({ranges[symbols[0]][1] for _, ranges in cells})
            if len(ends) == 1:
                level(cells, symbols[1:], indent)
                return
            middle = ends[(len(ends) - 1) // 2]
            lines.append(f"{indent}if {self.symbols[symbols[0]]} <= {middle}:")
            level([c for c in cells if c[1][symbols[0]][1] <= middle], symbols, indent + "    ")
            lines.append(f"{indent}else:")
            level([c for c in cells if c[1][symbols[0]][1] > middle], symbols, indent + "    ")

        level([(i, cell.ranges) for i, cell in enumerate(self.plan.cells)], list(self.plan.buckets), "        ")
        lines += ["    except _raised() as _error:", f"        out = _rescued({', '.join(['_error', *self.inputs])})"]
        lines.append(f"    return {self.returns}")
        return "\n".join(lines)


def _other(name: str, value: Any) -> str:
    """A test whether a constant is another one than was planned: 1.0 is not 1, whose product with integers is another dtype."""
    if value is None or isinstance(value, bool):
        return f"{name} is not {value!r}"
    other = f"{name} == {name}" if value != value else f"{name} != {value!r}"  # nan alone is not itself
    return other if isinstance(value, str) else f"type({name}) is not {type(value).__name__} or {other}"


def _parameter(name: str, value: Any) -> str:
    return name if isinstance(value, Tensor) else f"{name}={value!r}"
