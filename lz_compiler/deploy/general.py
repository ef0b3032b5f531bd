"""The general cells of a baked file: plain ATen calls for sizes beyond the last bucket, with nothing planned and nothing compiled.

torch.export keeps 1 apart from all other sizes, so there is one for each choice of the symbols that are 1. What export finds that the
model itself allows (the length of a rotary table, say) is a general cell's limit.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .. import torch_private
from ..errors import PlanError
from .export import ENDLESS, Dynamic, Program, Ranges, export_program
from .proof import always
from .writing import renamed

WORDS = {"and", "or", "not", "max", "min"}


def boxes(lowest: Mapping[str, int]) -> list[Ranges]:
    """All sizes from each symbol's lowest on, each being 1 or more than that; without the box in which all are 1, which a bucket holds."""
    axes = [[(s, (max(2, low), ENDLESS)), *([(s, (1, 1))] if low == 1 else [])] for s, low in lowest.items()]
    found = [dict(box) for box in itertools.product(*axes)]
    return [box for box in found if any(high > 1 for _, high in box.values())]


def program(
    model: nn.Module, named: Mapping[str, Any], dynamic: Dynamic, buckets: Mapping[str, Sequence[int]], box: Ranges
) -> tuple[Program, tuple[str, ...]]:
    """The model on one of `boxes`, with the ranges that the model allows, and what else has to be asked of sizes in them, as Python.

    PlanError where the graph is for one size only, or where its ranges do not go beyond the buckets.
    """
    made = export_program(model, named, dynamic, box, {s: min(high, max(2, buckets[s][-1])) for s, (_, high) in box.items()})
    values = made.arguments
    symbols: dict[str, str] = {}
    for (position, dim), name in made.symbols.items():
        size = values[position].shape[dim]
        fixed = isinstance(size, int)
        if fixed != (box[name] == (1, 1)) or (not fixed and not torch_private.size_expr(size).is_symbol):
            raise PlanError(f"{type(model).__name__} is for {name}={size} only, or ties it to another size")
        if not fixed and symbols.setdefault(str(size), name) != name:
            raise PlanError(f"{type(model).__name__} needs {symbols[str(size)]} and {name} to be equal")
    found, first, assumed = torch_private.compiled_sizes(values)
    symbols |= {text: made.symbols[place] for text, place in first.items()}  # also of a size that torch replaced by an equal one
    ranges = dict(box)
    for (position, dim), name in made.symbols.items():
        low, high = found[position][dim]
        ranges[name] = (max(ranges[name][0], low), min(ranges[name][1], high))
    if not any(high > buckets[s][-1] for s, (_, high) in ranges.items()):
        raise PlanError(f"{type(model).__name__} allows {describe(ranges)} only")
    asked = tuple(text for text in (renamed(text, symbols) for text in assumed) if not always(text, ranges))
    if not set(re.findall(r"[A-Za-z_]\w*", " ".join(asked))) <= {*symbols.values(), *WORDS}:
        raise PlanError(f"{type(model).__name__} assumes {' and '.join(asked)}")
    return replace(made, ranges=ranges), asked


def covers(ranges: Ranges, asked: Sequence[str], cell: Ranges) -> bool:
    """Whether a general cell holds for all sizes of a planned one."""
    inside = all(low <= cell[s][0] and cell[s][1] <= high for s, (low, high) in ranges.items())
    return inside and all(always(text, cell) for text in asked)


def aten_code(graph: fx.Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parameters and lines of a function that calls what a graph calls. PlanError where a call has no name in torch."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op not in ("placeholder", "call_function", "output"):
            raise PlanError(f"{node.name} of the exported graph is {node.op}: a part that was traced for itself")
    source = graph.python_code("self").src
    (function,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    arguments = tuple(a.arg for a in function.args.args[1:])
    lines = []
    for line in source.splitlines()[function.body[0].lineno - 1 : function.end_lineno]:
        call, _, freed = line.rpartition(";  ")
        if call and freed.endswith(" = None"):  # weights are the file's, and stay
            names = [name for name in freed.split(" = ")[:-1] if name not in arguments]
            line = ";  ".join([call, *([" = ".join([*names, "None"])] if names else [])])
        lines.append(re.sub(r"(?<![\w.])device\(", "torch.device(", line.removeprefix("    ")))
    return arguments, tuple(lines)


def condition(ranges: Ranges, asked: Sequence[str]) -> str:
    """The sizes of a general cell as a test in Python."""
    texts = [
        f"{s} == 1" if high == 1 else f"{s} >= {low}" if high == ENDLESS else f"{low} <= {s} <= {high}"
        for s, (low, high) in ranges.items()
    ]  # fmt: skip
    return " and ".join([*texts, *(f"({text})" for text in asked)])


def describe(ranges: Ranges, asked: Sequence[str] = ()) -> str:
    text = ", ".join(f"{s} {low}..{'' if high == ENDLESS else high}" for s, (low, high) in ranges.items())
    return text + (f" where {' and '.join(asked)}" if asked else "")
