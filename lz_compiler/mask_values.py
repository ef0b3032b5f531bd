"""Values of a mask's nodes at symbolic positions: the abstract interpretation behind `masks.infer_mask`.

An element of a node is either an integer expression, affine in the position (b, h, i, j), the sizes and opaque elements of
integer tensors, or `Two(atoms, yes, no)`: the number `yes` where all atoms hold (comparisons `e >= 0` and elements of boolean tensors),
`no` elsewhere. Booleans, additive masks and constants are of that kind; pointwise operators on them are evaluated by
running the operator itself on every combination of their few values.

Whatever is not understood is an opaque element of its node's output, which is always true. Where shapes are static and
nothing depends on an input, a node may be evaluated instead and compared with a diagonal band, element by element.
Integer positions are taken not to overflow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import torch_private

aten, prims = torch.ops.aten, torch.ops.prims

HEAD, ZERO = sympy.Symbol("h", integer=True), sympy.Integer(0)
LOWEST = -6e4  # a number from here down hides a key beside any visible one (float16's lowest is among them)
_EXACT = (torch.int64, torch.int32)  # integers in which positions are computed; narrower ones wrap around
MIXED = "hidden by different numbers"
_CELLS = 2**24  # the largest constant worth evaluating


@dataclass(frozen=True, slots=True)
class Comparison:
    """e >= 0"""

    e: Any

    def negated(self) -> Comparison:
        return Comparison(sympy.expand(-self.e - 1))


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a boolean tensor."""

    node: fx.Node
    index: tuple[Any, ...]
    negative: bool = False

    def negated(self) -> Element:
        return Element(self.node, self.index, not self.negative)


Atoms: TypeAlias = frozenset[Comparison | Element]
_TRUE: Atoms = frozenset()


@dataclass(frozen=True, slots=True)
class Two:
    """`yes` where all atoms hold, `no` elsewhere (both a number, a bool or MIXED); a constant where they are equal."""

    atoms: Atoms
    yes: Any
    no: Any

    def swapped(self) -> Two | None:
        """The same value with `no` first, where one atom can be negated."""
        if len(self.atoms) != 1:
            return None
        (atom,) = self.atoms
        return Two(frozenset({atom.negated()}), self.no, self.yes)


def _constant(value: Any) -> Two:
    return Two(_TRUE, value, value)


def expr(size: Any) -> Any:
    """A size, or a node that holds one, as an expression."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return sympy.Integer(size) if isinstance(size, int) else torch_private.size_expr(size)


def _args(node: fx.Node) -> Any:
    return node.args


def broadcast(index: Sequence[Any], shape: Sequence[Any]) -> tuple[Any, ...]:
    """The index of an operand of this shape, in a result at `index`."""
    tail = index[len(index) - len(shape) :]
    return tuple(ZERO if isinstance(n, int) and n == 1 else k for k, n in zip(tail, shape, strict=True))


def _as_two(value: Any) -> Two | None:
    if isinstance(value, sympy.Integer):
        return _constant(int(value))
    return value if isinstance(value, Two) else None


def _as_expr(value: Any) -> Any:
    if isinstance(value, Two):
        constant = value.yes == value.no and isinstance(value.yes, int)
        return sympy.Integer(int(value.yes)) if constant else None
    return value


def elements(e: Any) -> set[Any]:
    return set(e.atoms(AppliedUndef))


def hidden_by(two: Two, dtype: torch.dtype) -> float | str | None:
    """The number that hides a key, if `two` is a mask which shows a key where its atoms hold."""
    if dtype is torch.bool:
        return -math.inf if two.yes is True and (two.no is False or not two.atoms) else None
    if two.yes != 0:
        return None
    return two.no if two.no == MIXED or two.no <= LOWEST or not two.atoms else None


# --- interpretation -------------------------------------------------------------------------------------------------------

_MOVES = (
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
)  # fmt: skip
_COMPARE: dict[Any, Callable[..., tuple[Any, ...]]] = {
    **{op: lambda a, b: (b - a,) for op in (aten.le.Tensor, aten.le.Scalar)},
    **{op: lambda a, b: (b - a - 1,) for op in (aten.lt.Tensor, aten.lt.Scalar)},
    **{op: lambda a, b: (a - b,) for op in (aten.ge.Tensor, aten.ge.Scalar)},
    **{op: lambda a, b: (a - b - 1,) for op in (aten.gt.Tensor, aten.gt.Scalar)},
    **{op: lambda a, b: (a - b, b - a) for op in (aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar)},
}
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: lambda a, b: a + b,
    aten.sub.Tensor: lambda a, b: a - b,
    aten.mul.Tensor: lambda a, b: a * b,
    aten.neg.default: lambda a: -a,
    aten.abs.default: sympy.Abs,
    aten.rsub.Scalar: lambda a, b: b - a,
}


class Reader:
    """Values of one mask's nodes at symbolic positions."""

    def __init__(self, fake: Tensor, sizes: tuple[Any, Any, Any], constant: Callable[[fx.Node], Tensor | None]) -> None:
        self.fake, self.known = fake, constant
        self.batch, self.queries, self.keys = sizes
        self.extent: dict[Any, Any] = {}  # index variable -> its size
        self.b, self.i, self.j = (self._variable(name, size) for name, size in zip("bij", sizes, strict=True))
        self.nodes: dict[str, fx.Node] = {}
        self.origin: dict[Comparison, Element] = {}
        self._values: dict[Any, Any] = {}
        self._tensors: dict[fx.Node, Tensor | None] = {}
        self._depth = 0

    def _variable(self, name: str, size: Any) -> Any:
        if size == 1:
            return ZERO
        variable = sympy.Symbol(name, integer=True)
        self.extent[variable] = size
        return variable

    def value(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        """The element of `node` at `index`: an expression, a Two, or None for a float that is not understood."""
        key = (node, index)
        if key not in self._values:
            self._depth += 1  # a mask is shallow: what is deeper is a network's activation
            found = self._understood(node, index) if node.op == "call_function" and self._depth < 60 else None
            self._depth -= 1
            self._values[key] = self._opaque(node, index) if found is None else found
        return self._values[key]

    def _understood(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        target: Any = node.target
        args: Any = node.args
        if (moved := self._moved(node, index)) is not None:
            return self.value(*moved)
        if target is prims.iota.default and node.meta["val"].dtype in _EXACT:
            return sympy.expand(expr(node.kwargs["start"]) + expr(node.kwargs["step"]) * index[0])
        if target in (aten.full.default, aten.scalar_tensor.default):
            fill = args[-1]
            return _constant(torch.tensor(fill, dtype=node.meta["val"].dtype).item()) if isinstance(fill, (bool, int, float)) else None
        rule = {aten.cumsum.default: self._cumsum, aten.cat.default: self._cat, aten.index.Tensor: self._indexed,
                aten.constant_pad_nd.default: self._inside}.get(target)  # fmt: skip
        if rule is not None:
            return rule(node, index)
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
            return None
        if target is not prims.convert_element_type.default and torch.Tag.pointwise not in target.tags:
            return None
        operands = [self._operand(arg, index) for arg in args]
        for number in (self._arithmetic, self._compared, self._run):
            found = number(node, index, operands)
            if found is not None:
                return found
        return None

    def _operand(self, arg: Any, index: tuple[Any, ...]) -> Any:
        if not isinstance(arg, fx.Node):
            return _constant(arg) if isinstance(arg, (bool, int, float)) else arg
        val = arg.meta.get("val")
        if isinstance(val, Tensor):
            return self.value(arg, broadcast(index, val.shape))
        return expr(val) if isinstance(val, torch.SymInt) else None

    # index changes

    def _moved(self, node: fx.Node, index: tuple[Any, ...]) -> tuple[fx.Node, tuple[Any, ...]] | None:
        """Where a view's element lies in its input."""
        target: Any = node.target
        args: Any = node.args
        if not args or not isinstance(args[0], fx.Node) or not isinstance(args[0].meta.get("val"), Tensor):
            return None
        source, shape, new = args[0], args[0].meta["val"].shape, list(index)
        if target in _MOVES:
            kept = [k for k, n in zip(index, node.meta["val"].shape, strict=True) if expr(n) != 1]
            wanted = [str(n) for n in shape if expr(n) != 1]
            if wanted != [str(n) for n in node.meta["val"].shape if expr(n) != 1]:
                return None
            positions = iter(kept)
            return source, tuple(ZERO if expr(n) == 1 else next(positions) for n in shape)
        if target is aten.expand.default:
            return source, broadcast(index, shape)
        if target is aten.permute.default:
            order = [d % len(index) for d in args[1]]
            return source, tuple(index[order.index(d)] for d in range(len(index)))
        if target is aten.select.int:
            dim, at = args[1] % len(shape), expr(args[2])
            new.insert(dim, at + expr(shape[dim]) if at.is_negative else at)
            return (source, tuple(new)) if at.is_Integer else None
        if target is aten.slice.Tensor:
            dim, start, step = ((*args[1:], *(0, None, None, 1)[len(args) - 1 :])[k] for k in (0, 1, 3))
            dim, begin = dim % len(shape), self._begin(start, shape[dim])
            new[dim] = begin + expr(step) * index[dim] if begin is not None else None
            return (source, tuple(new)) if begin is not None else None
        return None

    def _begin(self, start: Any, size: Any) -> Any:
        """Where a slice begins, clamped as torch clamps it, or None where that depends on a size."""
        begin, size = expr(0 if start is None else start), expr(size)
        if begin.is_Integer and size.is_Integer:
            return max(begin + size if begin < 0 else min(begin, size), 0)
        return begin if self.nonnegative(begin) else None  # beyond the end, the slice has no element to ask for

    def _indexed(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        source, tensors = _args(node)
        value = source.meta["val"]
        used = [d for d, t in enumerate(tensors) if t is not None]
        if used != list(range(used[0], used[-1] + 1)):
            return None  # separated index tensors move to the front
        width = max(tensors[d].meta["val"].dim() for d in used)
        inner = index[used[0] : used[0] + width]
        new = [*index[: used[0]], *(_as_expr(self._operand(tensors[d], inner)) for d in used), *index[used[0] + width :]]
        for d in used:
            if tensors[d].meta["val"].dtype not in _EXACT or new[d] is None or not self.nonnegative(new[d]):
                return None  # a negative position counts from the end
        return self.value(source, tuple(new)) if len(new) == value.dim() else None

    def _inside(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        """A padded tensor where the element is known to lie in the tensor itself."""
        source, pads = _args(node)[:2]
        shape, new = source.meta["val"].shape, list(index)
        for k in range(len(pads) // 2):
            dim = len(shape) - 1 - k
            new[dim] = sympy.expand(new[dim] - expr(pads[2 * k]))
            if not self.nonnegative(new[dim]) or not self.nonnegative(expr(shape[dim]) - 1 - new[dim]):
                return None
        return self.value(source, tuple(new))

    def _cat(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        """Joined tensors whose last and longest continues the others' numbers: single elements that fit its formula."""
        args = _args(node)
        *heads, last = args[0]
        dim = (args[1] if len(args) > 1 else 0) % len(index)
        if not all(expr(head.meta["val"].shape[dim]) == 1 for head in heads):
            return None
        t = self._variable(f"t{len(self.extent)}", expr(last.meta["val"].shape[dim]))
        body, *first = (_as_expr(self.value(n, (*index[:dim], k, *index[dim + 1 :]))) for n, k in ((last, t), *((h, ZERO) for h in heads)))
        if body is None or None in first:
            return None
        if any(sympy.expand(body.subs(t, k - len(heads)) - e) != 0 for k, e in enumerate(first)):
            return None
        return sympy.expand(body.subs(t, index[dim] - len(heads)))

    def _cumsum(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        """The running sum of a constant."""
        source, dim = _args(node)[0], _args(node)[1] % len(index)
        t = self._variable(f"t{len(self.extent)}", expr(node.meta["val"].shape[dim]))
        term = _as_expr(self.value(source, (*index[:dim], t, *index[dim + 1 :])))
        exact = node.meta["val"].dtype in _EXACT and term is not None and term.is_Integer
        return sympy.expand(term * (index[dim] + 1)) if exact else None

    # numbers

    def _arithmetic(self, node: fx.Node, index: tuple[Any, ...], operands: list[Any]) -> Any:
        exact, dtype = node.meta["val"].dtype in _EXACT, node.meta["val"].dtype
        if node.target is prims.convert_element_type.default and exact:
            source = _args(node)[0].meta["val"].dtype
            e = operands[0] if isinstance(operands[0], sympy.Expr) else None
            wide = dtype is torch.int64 or source is dtype or (e is not None and not elements(e))
            return e if wide and source in _EXACT else None
        rule = _ARITHMETIC.get(node.target)
        terms = [_as_expr(v) for v in operands]
        if rule is None or not exact or node.kwargs or any(not isinstance(e, sympy.Expr) for e in terms):
            return None
        if node.target is aten.mul.Tensor and not any(e.is_Integer for e in terms):
            return None
        return sympy.expand(rule(*terms))

    def _compared(self, node: fx.Node, index: tuple[Any, ...], operands: list[Any]) -> Any:
        rule = _COMPARE.get(node.target)
        terms = [_as_expr(v) for v in operands]
        if rule is None or any(not isinstance(e, sympy.Expr) for e in terms) or all(e.is_Integer for e in terms):
            return None
        dtypes = [a.meta["val"].dtype for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)]
        if any(dtype not in _EXACT for dtype in dtypes):
            return None
        sides, flip = [sympy.expand(e) for e in rule(*terms)], node.target in (aten.ne.Tensor, aten.ne.Scalar)
        if len(sides) == 1 and any(sides[0].coeff(far) > 0 for far in sides[0].atoms(sympy.Abs)):
            sides, flip = [-sides[0] - 1], True  # |x| >= r is the opposite of |x| <= r - 1
        parts = [e for side in sides for e in self._without_abs(side)]
        if any(e is None for e in parts):
            return None
        atoms = frozenset(Comparison(e) for e in parts if not self.nonnegative(e))
        if any(self.nonnegative(-e - 1) for e in parts):
            return _constant(flip)
        for atom in atoms:
            free = atom.e.free_symbols
            if any(leaf.free_symbols - {self.b} for leaf in elements(atom.e)) or not free & {self.i, self.j}:
                return None  # compares data: an element of this node
            if self.i not in free and len(atoms) > 1:
                return None
            if len(atoms) == 1:
                self.origin[atom] = Element(node, tuple(k.subs({self.i: 0, HEAD: 0}) for k in index), flip)
        return Two(atoms, not flip, flip) if atoms else _constant(not flip)

    def _without_abs(self, e: Any) -> tuple[Any, ...]:
        """e >= 0 as comparisons without absolute values: r - |x| >= 0 is r - x >= 0 and r + x >= 0."""
        found = list(e.atoms(sympy.Abs))
        if not found:
            return (e,)
        if len(found) > 1 or e.coeff(found[0]) != -1:
            return (None,)
        rest = sympy.expand(e + found[0])
        return (sympy.expand(rest - found[0].args[0]), sympy.expand(rest + found[0].args[0]))

    def _run(self, node: fx.Node, index: tuple[Any, ...], operands: Sequence[Any]) -> Any:
        """A pointwise operator on operands of two values each: run on every combination of them."""
        twos = [_as_two(v) if isinstance(v, sympy.Expr) else v for v in operands]
        if any(t is None or (isinstance(t, Two) and MIXED in (t.yes, t.no)) for t in twos):
            return self._sum_of_masks(node, twos)
        conditions = list(dict.fromkeys(t.atoms for t in twos if isinstance(t, Two) and t.atoms))
        if len(conditions) > 3:
            return None
        table = {}
        for held in itertools.product((True, False), repeat=len(conditions)):
            truth = dict(zip(conditions, held, strict=True))
            chosen = [(t.yes if truth.get(t.atoms, True) else t.no) if isinstance(t, Two) else t for t in twos]
            table[held] = _evaluated(node, chosen)
        values = set(table.values())
        if len(values) == 1:
            return _constant(values.pop())
        for value in values if len(values) == 2 else ():
            atoms = _conjunction([held for held, v in table.items() if v == value], conditions)
            if atoms is not None:
                return Two(atoms, value, (values - {value}).pop())
        return self._sum_of_masks(node, twos)

    def _sum_of_masks(self, node: fx.Node, twos: list[Any]) -> Two | None:
        """Two additive masks: a key is visible where both show it, hidden by one number or by their sum."""
        if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(t, Two) for t in twos):
            return None
        shown = [t if hidden_by(t, torch.float32) is not None else t.swapped() for t in twos]
        if any(t is None or hidden_by(t, torch.float32) is None for t in shown):
            return None
        return Two(frozenset().union(*(t.atoms for t in shown)), 0.0, MIXED)

    def nonnegative(self, e: Any) -> bool:
        """Whether e >= 0 at every position, for every size: e is affine in the index variables, its extremes at their ends."""
        e = sympy.expand(e)
        if elements(e) or e.has(sympy.Abs):
            return False
        for variable, size in reversed(self.extent.items()):  # a later variable's extent may hold earlier ones
            slope = e.coeff(variable)
            if not slope.is_Integer:
                return False
            e = sympy.expand(e.subs(variable, 0 if slope >= 0 else size - 1))
        bounds = {s: torch_private.lower_bound(self.fake, s) for s in e.free_symbols}
        if None in bounds.values():
            return False
        e = sympy.expand(e.subs({s: s + low for s, low in bounds.items()}, simultaneous=True))
        return all(c.is_number and c >= 0 for c in e.as_coefficients_dict().values())

    # what is not understood

    def _opaque(self, node: fx.Node, index: tuple[Any, ...]) -> Any:
        """An element as itself; or, where it depends on no input, on the query and on static sizes, as its value shows."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        free = set().union(*(k.free_symbols for k in index)) if index else set()
        if (self.i in free or not free) and (found := self._fitted(node, index)) is not None:
            return found
        if value.dtype is torch.bool:
            return Two(frozenset({Element(node, index)}), True, False)
        if value.dtype not in _EXACT:
            return None
        self.nodes[node.name] = node
        return sympy.Function(node.name)(*index)

    def _fitted(self, node: fx.Node, index: tuple[Any, ...]) -> Two | None:
        """A constant of two values as a diagonal band, if it is equal to that band at every position."""
        axes, sizes = (self.b, self.i, self.j), (self.batch, self.queries, self.keys)
        if any(elements(k) or k.free_symbols - set(axes) for k in index) or not all(n.is_Integer for n in sizes):
            return None
        tensor = self._tensor(node)
        if tensor is None or int(self.queries) * int(self.keys) > _CELLS:
            return None
        with torch_private.real_tensors():
            where = [self._along(k, axes) for k in index]
            cells = tensor.cpu()[tuple(where)]
            cells = cells.expand(torch.broadcast_shapes(cells.shape, (1, int(self.queries), int(self.keys))))
            low, high = cells.amin(), cells.amax()
            if not bool(((cells == low) | (cells == high)).all()) or not torch.equal(cells, cells[:1].expand_as(cells)):
                return None
            if bool(low == high):
                return _constant(low.item())
            for yes, no in itertools.permutations((low.item(), high.item())):
                if (atoms := self._band(cells[0] == yes)) is not None:
                    return Two(atoms, yes, no)
        return None

    def _along(self, e: Any, axes: Sequence[Any]) -> Tensor:
        """An affine expression at every (b, i, j), of size 1 along what it does not depend on."""
        value = torch.tensor(int(e.subs(dict.fromkeys(axes, 0))))
        for axis, variable in enumerate(axes):
            if variable in e.free_symbols:
                ticks = torch.arange(int(self.extent[variable])).view([-1 if d == axis else 1 for d in range(3)])
                value = value + int(e.coeff(variable)) * ticks
        return value

    def _band(self, seen: Tensor) -> Atoms | None:
        """The diagonals between which a boolean (Q, K) is true, if it is true exactly there."""
        i, j = (torch.arange(n).view(shape) for n, shape in zip(seen.shape, ((-1, 1), (1, -1)), strict=True))
        column, atoms, want = torch.where(seen, j, -1).amax(1), set(), torch.ones_like(seen)
        first = torch.where(seen, j, seen.shape[1]).amin(1)
        ends = (column >= 0) & (column < seen.shape[1] - 1)
        starts = (first > 0) & (first < seen.shape[1])
        if bool(ends.any()):
            offset = int((column - i[:, 0])[ends][0])
            atoms.add(Comparison(self.i - self.j + offset))
            want = want & (j <= i + offset)
        if bool(starts.any()):
            offset = int((first - i[:, 0])[starts][0])
            atoms.add(Comparison(self.j - self.i - offset))
            want = want & (j >= i + offset)
        return frozenset(atoms) if torch.equal(want, seen) else None

    def _tensor(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on no input and has a static shape."""
        if node not in self._tensors:
            cone = _cone(node, self.known)
            values: dict[fx.Node, Any] = {}
            with torch_private.real_tensors():
                for n in cone or ():
                    values[n] = _given(n, self.known)
                    if values[n] is None:
                        args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (n.args, n.kwargs))
                        values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
            self._tensors[node] = values.get(node)
        return self._tensors[node]


# --- small steps ----------------------------------------------------------------------------------------------------------


def _conjunction(held: list[tuple[bool, ...]], conditions: list[Atoms]) -> Atoms | None:
    """The atoms that hold in exactly these of all combinations of conditions."""
    atoms: set[Comparison | Element] = set()
    free = 0
    for column, condition in zip(zip(*held, strict=True), conditions, strict=True):
        if len(set(column)) == 2:
            free += 1
        elif column[0]:
            atoms |= condition
        elif len(condition) == 1:
            atoms |= {atom.negated() for atom in condition}
        else:
            return None
    return frozenset(atoms) if 2**free == len(held) else None


def _evaluated(node: fx.Node, values: list[Any]) -> Any:
    """A pointwise operator on one value of each operand, computed as the graph would: same dtypes, same promotion."""
    args: list[Any] = []
    with torch_private.real_tensors():
        for value, arg in zip(values, node.args, strict=True):
            like = arg.meta["val"] if isinstance(arg, fx.Node) else None
            if isinstance(like, Tensor):
                value = torch.full([1] * min(like.dim(), 1), value, dtype=like.dtype)
            args.append(value)
        result = node.target(*args, **node.kwargs)  # type: ignore[operator]
        return result.to(node.meta["val"].dtype).item()


def _given(node: fx.Node, known: Callable[[fx.Node], Tensor | None]) -> Tensor | None:
    """The value of a frozen input or of an attribute."""
    value = known(node)
    if value is None and node.op == "get_attr" and node.graph.owning_module is not None:
        value = getattr(node.graph.owning_module, str(node.target), None)
    return value if isinstance(value, Tensor) and not torch_private.is_fake(value) else None


def _cone(node: fx.Node, known: Callable[[fx.Node], Tensor | None]) -> list[fx.Node] | None:
    """The nodes from which `node` can be computed at compile time, in order; None if it depends on an input."""
    order: list[fx.Node] = []
    met: set[fx.Node] = set()
    waiting = [(node, False)]
    while waiting:
        n, ready = waiting.pop()
        if ready or (n not in met and _given(n, known) is not None):
            order.append(n)
            met.add(n)
            continue
        if n in met:
            continue
        met.add(n)
        value, target = n.meta.get("val"), n.target
        made = n.all_input_nodes or target in (prims.iota.default, aten.full.default, aten.scalar_tensor.default)
        if not isinstance(target, torch._ops.OpOverload) or not made or not isinstance(value, Tensor) or target._schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or not all(isinstance(s, int) for s in value.shape) or value.numel() > _CELLS:
            return None
        waiting += [(n, True), *((source, False) for source in n.all_input_nodes)]
    return order
