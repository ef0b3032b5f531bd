"""What an attention mask means, proved from the graph that computes it.

Models hand attention a materialised mask made of `arange`, comparisons and a padding vector. `infer_mask` asks the mask's node
for its element at the position (b, h, i, j) in batch, head, query and key, as `mask_values` derives it from the operators
before it, and writes what it finds as a `MaskPredicate`. Nothing is guessed: what cannot be written so gives None. Sizes are
compared as expressions, so no guard is added. Planning is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from .mask_values import HEAD, MIXED, ZERO, Atoms, Comparison, Element, Reader, Two, broadcast, elements, expr, hidden_by

Empty: TypeAlias = Literal["impossible", "zero", "uniform"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One element of `node` for each batch (and key): `index` has an entry for each of its dimensions, a fixed position, "batch" (b)
    or "key" (j + shift). `negated` asks for the opposite of a boolean."""

    node: fx.Node
    index: tuple[int | Literal["batch", "key"], ...]
    shift: int = 0
    negated: bool = False


@dataclass(frozen=True, slots=True)
class MaskPredicate:
    """Key j is visible to query i of batch b, in every head, if and only if

        (not causal or j <= i + d(b)) and (window == 0 or j > i + d(b) - window) and all(key(b, j) for key in keys)
        d(b) = offset + (position(b) if position is given) + (K - Q if bottom, for Q queries and K keys)

    `position` reads an integer tensor (a KV position), `keys` read boolean tensors. `empty` is what a row without any visible
    key gives in eager: "impossible" (proved: there is none), "zero" (torch's softmax of a row of -inf) or "uniform" (the mean of v
    over all keys: a finite additive mask so low that it absorbs every score).
    """

    causal: bool = False
    offset: int = 0
    window: int = 0
    keys: tuple[Reading, ...] = ()
    empty: Empty = "impossible"
    position: Reading | None = None
    bottom: bool = False


def infer_mask(
    mask: fx.Node, batch: Any, queries: Any, keys: Any, constant: Callable[[fx.Node], Tensor | None] | None = None
) -> MaskPredicate | None:
    """The meaning of an attention's mask, or None where it is not understood (the mask is then kept).

    `mask` is a boolean (True: visible) or additive node of a functional ATen graph, broadcastable to (B, H, Q, K); `batch`,
    `queries` and `keys` are B, Q and K (int or SymInt). `constant` gives the values of nodes that never change, if any are known.
    """
    value = mask.meta["val"]
    reader = Reader(value, (expr(batch), expr(queries), expr(keys)), constant or (lambda _: None))
    full = (reader.b, HEAD, reader.i, reader.j)[4 - value.dim() :]
    sizes = (reader.batch, None, reader.queries, reader.keys)[4 - value.dim() :]
    if any(size is not None and expr(n) not in (1, size) for n, size in zip(value.shape, sizes, strict=True)):
        return None
    found = reader.value(mask, broadcast(full, value.shape))
    if not isinstance(found, Two):
        return None
    for two in (found, found.swapped()):
        if two is not None and (hidden := hidden_by(two, value.dtype)) is not None:
            return _predicate(reader, two.atoms, hidden)
    return None


def describe(predicate: MaskPredicate) -> str:
    """A predicate in words, for reports."""
    if predicate == MaskPredicate():
        return "none: every key is visible"
    names = [predicate.position.node.name] if predicate.position else []
    terms = [*names, *["K - Q"] * predicate.bottom, *([str(predicate.offset)] if predicate.offset else [])]
    parts = ["causal"] * predicate.causal + ([f"offset {' + '.join(terms)}"] if terms else [])
    parts += [f"window {predicate.window}"] * bool(predicate.window)
    parts += [f"keys {'not ' * key.negated}{key.node.name}" for key in predicate.keys]
    return ", ".join(parts) + ("; no empty rows" if predicate.empty == "impossible" else f"; empty rows: {predicate.empty}")


# --- from atoms to a predicate --------------------------------------------------------------------------------------------

_UNIFORM = -1e30  # a number from here down absorbs every score of ordinary size


def _predicate(reader: Reader, atoms: Atoms, hidden: Any) -> MaskPredicate | None:
    """A conjunction of atoms as a predicate, or None where it is none."""
    above: list[Any] = []  # j <= i + e
    below: list[Any] = []  # j > i + e
    keys: list[Reading] = []
    for atom in sorted(atoms, key=str):
        element: Element | None = None
        if isinstance(atom, Comparison):
            slopes = (atom.e.coeff(reader.i) if reader.i.is_Symbol else None, atom.e.coeff(reader.j) if reader.j.is_Symbol else None)
            rest = sympy.expand(atom.e - sum(s * v for s, v in zip(slopes, (reader.i, reader.j), strict=True) if s is not None))
            if slopes in ((1, -1), (None, -1)):
                above.append(rest)
                continue
            if slopes in ((-1, 1), (None, 1)):
                below.append(sympy.expand(-rest - 1))
                continue
            element = _compared_by(reader, atom)
        else:
            element = atom
        reading = _reading(reader, element.node, element.index, element.negative) if element is not None else None
        if reading is None or reading.node.meta["val"].dtype is not torch.bool:
            return None
        keys.append(reading)
    top, bottom = _tightest(above, min), _tightest(below, max)
    if top is False or bottom is False:
        return None
    return _band_and_keys(reader, top, bottom, tuple(keys), hidden)


def _compared_by(reader: Reader, atom: Comparison) -> Element | None:
    """The element of a boolean node that is this comparison, for one that is not of query and key."""
    opposite = reader.origin.get(atom.negated())
    found = reader.origin.get(atom) or (opposite.negated() if opposite else None)
    return found if not atom.e.free_symbols & {reader.i, HEAD} else None


def _band_and_keys(reader: Reader, top: Any, bottom: Any, keys: tuple[Reading, ...], hidden: Any) -> MaskPredicate | None:
    window = 0
    if bottom is not None:
        shift = top if top is not None else ZERO if bottom.is_Integer else bottom + 1
        width = sympy.expand(shift - bottom)
        if not width.is_Integer or width <= 0:
            return None
        window, around = int(width), shift
    else:
        around = top if top is not None else ZERO
    split = _split(reader, around)
    if split is None:
        return None
    seen = not keys and _every_row_sees(reader, top, bottom)
    if not seen and (hidden == MIXED or hidden > _UNIFORM):
        return None
    empty: Empty = "impossible" if seen else "zero" if hidden == -math.inf else "uniform"
    offset, position, from_end = split
    return MaskPredicate(top is not None, offset, window, keys, empty, position, from_end)


def _every_row_sees(reader: Reader, top: Any, bottom: Any) -> bool:
    """Whether max(0, i + bottom + 1) <= min(K - 1, i + top) for every i (a window is known not to be empty)."""
    starts = top is None or reader.nonnegative(reader.i + top)
    return starts and (bottom is None or reader.nonnegative(reader.keys - 2 - reader.i - bottom))


def _split(reader: Reader, e: Any) -> tuple[int, Reading | None, bool] | None:
    """An offset as (integer, position, whether K - Q is added)."""
    leaves = elements(e)
    if len(leaves) > 1:
        return None
    position = None
    for leaf in leaves:
        position = _reading(reader, reader.nodes[leaf.func.__name__], leaf.args)
        if position is None or "key" in position.index:
            return None
        e = sympy.expand(e - leaf)
    if e.is_Integer:
        return int(e), position, False
    e = sympy.expand(e - reader.keys + reader.queries)
    return (int(e), position, True) if e.is_Integer else None


def _reading(reader: Reader, node: fx.Node, index: tuple[Any, ...], negated: bool = False) -> Reading | None:
    entries: list[Any] = []
    shift = 0
    for k, size in zip(index, node.meta["val"].shape, strict=True):
        if k.is_Integer and k >= 0:
            entries.append(int(k))
        elif k == reader.b and "batch" not in entries and expr(size) == reader.batch:
            entries.append("batch")
        elif reader.j.is_Symbol and (k - reader.j).is_Integer and k - reader.j >= 0 and "key" not in entries:
            entries.append("key")
            shift = int(k - reader.j)
        else:
            return None
    return Reading(node, tuple(entries), shift, negated)


def _tightest(bounds: list[Any], best: Callable[..., Any]) -> Any:
    """The bound that implies the others; None without any, False where that depends on a value."""
    if not bounds:
        return None
    if not all(sympy.expand(e - bounds[0]).is_Integer for e in bounds):
        return False
    return best(bounds, key=lambda e: sympy.expand(e - bounds[0]))
