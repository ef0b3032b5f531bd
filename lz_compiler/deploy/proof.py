"""What can be said of a baked file without running it: for which sizes `forward` calls which cell, and whether that cell holds there.

`forward` is read with `ast`. A box is a range of each dimension of each input; every comparison of a size with a number splits the
boxes that reach it exactly (interval arithmetic over all paths), any other test lets them pass both ways. Then each cell's box is
held against what the manifest says it was compiled for, and against what its own code shows: sizes that it never reads, weights
packed for a number of rows, views within their memory.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from ..problem import CALL, LOOP, VIEW
from .export import ENDLESS
from .writing import renamed

POINTS = 50_000  # sizes that are tried one by one where a polynomial's coefficients do not decide

Box = dict[str, tuple[int, int]]  # axis (a symbol, or a dimension of fixed size) -> lowest and highest size
Finding = tuple[str, str]  # code: gap, overlap, edge, outside, constraint, form; detail

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
MIRROR: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.Gt(), ast.Gt: ast.Lt(), ast.LtE: ast.GtE(), ast.GtE: ast.LtE(), ast.Eq: ast.Eq(), ast.NotEq: ast.NotEq(),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """One way through `forward`: the sizes that take it, the cells that it calls, whether it ends in an error, and whether a test
    that is not of sizes led there."""

    box: Box
    names: Mapping[str, str]  # variable -> axis
    cells: tuple[str, ...] = ()
    error: bool = False
    unsure: bool = False


def axes(inputs: Mapping[str, Sequence[int | str]]) -> dict[tuple[str, int], str]:
    """The axis of each dimension: its symbol, or a name of its own."""
    return {(n, d): s if isinstance(s, str) else f"{n}.shape[{d}]" for n, shape in inputs.items() for d, s in enumerate(shape)}


def prove(source: str, manifest: Mapping[str, Any]) -> tuple[list[Finding], list[Way]]:
    """Findings on a baked file's text, none if it is right, and the paths through its `forward`."""
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    walk = _Walk(axes(manifest["inputs"]))
    ends = walk.run(functions["forward"].body, [Way(dict.fromkeys(walk.axes.values(), (0, ENDLESS)), {})])
    paths = walk.ended + [replace(p, error=True) for p in ends]  # falling off the end returns nothing: an error too
    fixed: Box = {f"{n}.shape[{d}]": (s, s) for n, shape in manifest["inputs"].items() for d, s in enumerate(shape) if isinstance(s, int)}
    declared: Box = {s: (manifest.get("at_least", {}).get(s, 1), e[-1]) for s, e in manifest["buckets"].items()} | fixed
    general = {f"general_{i}": ranges_of(cell) | fixed for i, cell in enumerate(manifest.get("general", ()))}
    found = walk.findings
    for path in paths:
        found += _ending(path, declared, general)
    for one, other in itertools.combinations([p for p in paths if p.cells], 2):
        common = intersection(one.box, other.box)
        if common and one.cells != other.cells:
            found.append(("overlap", f"{_text(common)}: {one.cells[0]} and {other.cells[0]}"))
    packed, references = _packed_rows(source), _references(source)
    for index, cell in enumerate(manifest["cells"]):
        name = f"cell_{index}"
        boxes = [b for p in paths if name in p.cells and (b := intersection(p.box, declared))]
        if not boxes:
            found.append(("gap", f"{name} is never called: it was made for {cell['ranges']}"))
            continue
        hull: Box = {axis: (min(b[axis][0] for b in boxes), max(b[axis][1] for b in boxes)) for axis in declared}
        found += _against(name, hull, cell)
        found += _repeated(name, hull, references.get(name, ""), manifest)
        if name in functions:
            inner = dict(zip(manifest["inputs"], (a.arg for a in functions[name].args.args), strict=True))
            own = {(inner[n], dim): axis for (n, dim), axis in walk.axes.items()}
            found += [("constraint", f"{name}: {why}") for why in _Body(own, hull, packed).check(functions[name])]
    for index, cell in enumerate(manifest.get("general", ())):
        for path in (p for p in paths if f"general_{index}" in p.cells):
            found += _against(f"general_{index}", path.box, cell)
        found += _unasked(f"general_{index}", cell.get("asked", ()), functions["forward"], manifest["buckets"])
    return list(dict.fromkeys(found)), paths


def _references(source: str) -> dict[str, str]:
    """What takes a cell's place once a kernel raised in it."""
    found = [n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "REFERENCES"]
    return dict(ast.literal_eval(found[0])) if found else {}


def _repeated(name: str, hull: Box, reference: str, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a cell's reference is its own, or a general cell that holds for all its sizes."""
    if reference.startswith("general_"):
        cell = manifest["general"][int(reference.removeprefix("general_"))]
        holds, asked = ranges_of(cell), cell.get("asked", ())
        yield from _excess(hull, holds, f"{reference} takes the place of {name} for {{}}, but holds for {{}}", "constraint")
        for text in asked:
            if not always(text, {s: hull[s] for s in holds}):
                yield "constraint", f"{reference} takes the place of {name}, and is for {text}"
    elif reference not in ("", name.replace("cell", "reference")):
        yield "constraint", f"{reference} takes the place of {name}"


def _unasked(name: str, texts: Sequence[str], forward: ast.FunctionDef, symbols: Collection[str]) -> Iterator[Finding]:
    """What `forward` has to ask of sizes before it calls a general cell, and does not."""
    variables = {f"_size_{s}": s for s in symbols}  # where an argument has the symbol's name
    branches = [n for n in ast.walk(forward) if isinstance(n, ast.If) and ast.unparse(n.body[-1]).startswith(f"out = {name}(")]
    tests = [renamed(ast.unparse(n.test), variables) for n in branches]
    for text in texts:
        if not any(ast.unparse(ast.parse(text, mode="eval")) in test for test in tests):
            yield "constraint", f"{name} is for {text}, which is not asked before it is called"


def ranges_of(cell: Mapping[str, Any]) -> Box:
    """The sizes for which the manifest says that a cell was made; null is no end."""
    return {s: (low, ENDLESS if high is None else high) for s, (low, high) in cell["ranges"].items()}


def _ending(path: Way, declared: Box, general: Mapping[str, Box]) -> Iterator[Finding]:
    inside = intersection(path.box, declared)
    if path.error:
        for box in (inside, *(intersection(path.box, g) for g in general.values())):
            if box and not path.unsure:
                yield "gap", f"{_text(box)}: no cell, an error"
    elif not path.cells:
        yield "gap", f"{_text(path.box)}: no cell is called"
    elif len(path.cells) > 1:
        yield "overlap", f"{_text(path.box)}: {' and '.join(path.cells)}"
    elif path.cells[0] in general:
        if inside:
            yield "overlap", f"{_text(inside)}: {path.cells[0]}, but a cell was made for it"
    else:
        yield from _excess(path.box, declared, f"{path.cells[0]} is called for {{}}, outside of the declared {{}}", "outside")


def _against(name: str, hull: Box, cell: Mapping[str, Any]) -> Iterator[Finding]:
    """A cell's box against the sizes for which the manifest says that it was compiled."""
    kernels = ", ".join(k for k in cell["kernels"] if k not in (CALL, VIEW, LOOP))
    holds = ranges_of(cell)
    yield from _excess(hull, holds, f"{name} ({kernels}) is called for {{}}, compiled for {{}}", "constraint")
    for limit in cell["limits"]:
        box = {limit["symbol"]: (limit["low"], limit["high"])}
        yield from _excess(hull, box, f"{name}: {limit['kernel']} is called for {{}}, but holds for {{}}", "constraint")
    for text in cell["assumed"]:
        if not always(text, {s: hull[s] for s in holds}):
            yield "constraint", f"{name}: {text} does not hold, or is not proved, for all of {_text({s: hull[s] for s in holds})}"


def _excess(box: Box, limit: Box, detail: str, code: str) -> Iterator[Finding]:
    for axis, (low, high) in limit.items():
        beyond = max(low - box[axis][0], 0) + max(box[axis][1] - high, 0)
        if beyond:
            yield "edge" if beyond == 1 else code, detail.format(_text({axis: box[axis]}), _text({axis: (low, high)}))


def intersection(a: Box, b: Box) -> Box | None:
    made = {axis: (max(a[axis][0], b[axis][0]), min(a[axis][1], b[axis][1])) for axis in a}
    return made if all(low <= high for low, high in made.values()) else None


def _text(box: Box) -> str:
    varied = {a: r for a, r in box.items() if "." not in a} or box
    return ", ".join(f"{axis} {low}..{'' if high == ENDLESS else high}" for axis, (low, high) in varied.items()) or "the given sizes"


class _Walk:
    """All paths through a function whose tests compare sizes."""

    def __init__(self, axes: Mapping[tuple[str, int], str]) -> None:
        self.axes = axes
        self.ended: list[Way] = []
        self.findings: list[Finding] = []

    def run(self, block: Sequence[ast.stmt], paths: list[Way]) -> list[Way]:
        for statement in block:
            paths = [after for path in paths for after in self._step(statement, path)]
        return paths

    def _step(self, statement: ast.stmt, path: Way) -> list[Way]:
        match statement:
            case ast.If(test, body, orelse):
                return self._branch(test, body, orelse, path)
            case ast.Assign(targets, ast.IfExp(test, body, orelse)):
                return self._branch(test, [ast.Assign(targets, body)], [ast.Assign(targets, orelse)], path)
            case ast.Return(ast.IfExp(test, body, orelse)):
                return self._branch(test, [ast.Return(body)], [ast.Return(orelse)], path)
            case ast.With(_, body) | ast.Try(
                body, [ast.ExceptHandler(body=[ast.Assign(value=ast.Call(ast.Name("_rescued"))) | ast.Raise()])], [], []
            ):
                return self.run(body, [path])
            case ast.Raise():
                self.ended.append(replace(path, error=True))
                return []
            case ast.Return() | ast.Assign() | ast.Expr() | ast.Pass():
                after = self._assigned(statement, path)
                if isinstance(statement, ast.Return):
                    self.ended.append(after)
                    return []
                return [after]
        self.findings.append(("form", f"{type(statement).__name__} in line {statement.lineno} of forward cannot be followed"))
        return [path]

    def _branch(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], path: Way) -> list[Way]:
        yes, no, known = self._split(test, [path.box], path.names)
        unsure = path.unsure or not known
        after = self.run(body, [replace(path, box=b, unsure=unsure) for b in yes])
        after += self.run(orelse, [replace(path, box=b, unsure=unsure) for b in no])
        if not known and after and all(p == after[0] for p in after[1:]):
            after = after[:1]  # a test that decides nothing here (an input's conversion)
        return [replace(p, unsure=path.unsure) for p in after]

    def _assigned(self, statement: ast.stmt, path: Way) -> Way:
        called = [n.func.id for n in ast.walk(statement) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        names = dict(path.names)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                for name in (n.id for n in ast.walk(target) if isinstance(n, ast.Name)):
                    names.pop(name, None)
                names |= self._sizes(target, statement.value, path.names)
        return replace(path, names=names, cells=path.cells + tuple(n for n in called if n.startswith(("cell_", "general_"))))

    def _sizes(self, target: ast.expr, value: ast.expr, names: Mapping[str, str]) -> dict[str, str]:
        if isinstance(target, ast.Name):
            axis = self._axis(value, names)
            return {target.id: axis} if axis else {}
        match target, value:
            case ast.Tuple(parts), ast.Attribute(ast.Name(owner), "shape") | ast.Call(ast.Attribute(ast.Name(owner), "size"), []):
                return {p.id: self.axes[owner, d] for d, p in enumerate(parts) if isinstance(p, ast.Name) and (owner, d) in self.axes}
            case ast.Tuple(parts), ast.Tuple(values) if len(parts) == len(values):
                pairs = [self._sizes(p, v, names) for p, v in zip(parts, values, strict=True)]
                return {k: v for pair in pairs for k, v in pair.items()}
        return {}

    def _axis(self, node: ast.expr, names: Mapping[str, str]) -> str | None:
        match node:
            case ast.Name(name):
                return names.get(name)
            case ast.Subscript(ast.Attribute(ast.Name(name), "shape"), ast.Constant(int(dim))) | ast.Call(
                ast.Attribute(ast.Name(name), "size"), [ast.Constant(int(dim))]
            ):
                return self.axes.get((name, dim))
        return None

    def _split(self, test: ast.expr, boxes: list[Box], names: Mapping[str, str]) -> tuple[list[Box], list[Box], bool]:
        """The parts of boxes on which a test is true and false, and whether it is one of sizes and numbers only."""
        match test:
            case ast.UnaryOp(ast.Not(), operand):
                yes, no, known = self._split(operand, boxes, names)
                return no, yes, known
            case ast.BoolOp(ast.Or(), values):  # not all of them false
                negated = ast.BoolOp(ast.And(), [ast.UnaryOp(ast.Not(), v) for v in values])
                no, yes, known = self._split(negated, boxes, names)
                return yes, no, known
            case ast.BoolOp(ast.And(), values):
                failed: list[Box] = []
                sure = True
                for value in values:
                    boxes, no, known = self._split(value, boxes, names)
                    failed, sure = failed + no, sure and known
                return boxes, failed, sure
            case ast.Compare(left, ops, comparators) if len(ops) > 1:
                lefts = [left, *comparators]
                pairs: list[ast.expr] = [ast.Compare(a, [op], [b]) for a, op, b in zip(lefts, ops, comparators, strict=False)]
                return self._split(ast.BoolOp(ast.And(), pairs), boxes, names)
            case ast.Compare(left, [ast.In() | ast.NotIn() as op], [ast.Tuple(items) | ast.List(items) | ast.Set(items)]):
                some = ast.BoolOp(ast.Or(), [ast.Compare(left, [ast.Eq()], [item]) for item in items])
                yes, no, known = self._split(some, boxes, names)
                return (yes, no, known) if isinstance(op, ast.In) else (no, yes, known)
            case ast.Compare(left, [ast.In()], [ast.Call(ast.Name("range"), [start, stop])]):
                return self._split(ast.Compare(start, [ast.LtE(), ast.Lt()], [left, stop]), boxes, names)
            case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
                return self._compare(self._axis(left, names), left, op, self._axis(right, names), right, boxes)
        return boxes, boxes, False

    def _compare(
        self, a: str | None, left: ast.expr, op: ast.cmpop, b: str | None, right: ast.expr, boxes: list[Box]
    ) -> tuple[list[Box], list[Box], bool]:
        if a is not None and a == b:  # two dimensions of one symbol: they must be equal, and unequal ones are outside
            return (boxes, [], True) if COMPARE[type(op)](1, 1) else ([], boxes, True)
        if a is None and b is not None:
            a, op, right = b, MIRROR[type(op)], left
        if a is None or not isinstance(right, ast.Constant) or not isinstance(right.value, int):
            return boxes, boxes, False
        n = right.value
        yes: list[Box] = []
        no: list[Box] = []
        for box in boxes:
            first, last = box[a]
            for low, high in ((first, min(last, n - 1)), (max(first, n), min(last, n)), (max(first, n + 1), last)):
                if low <= high:  # below n, n itself, above: the test is the same in each part
                    (yes if COMPARE[type(op)](low, n) else no).append({**box, a: (low, high)})
        return _joined(yes, a), _joined(no, a), True


def _joined(boxes: list[Box], axis: str) -> list[Box]:
    """Neighbours along an axis as one box."""
    made: list[Box] = []
    for box in boxes:
        if made and made[-1][axis][1] + 1 == box[axis][0] and {**made[-1], axis: box[axis]} == box:
            made[-1] = {**box, axis: (made[-1][axis][0], box[axis][1])}
        else:
            made.append(box)
    return made


# --- what a cell's code shows ---------------------------------------------------------------------------------------------------


def _packed_rows(source: str) -> dict[str, int]:
    """Weights that are packed for one number of rows: the name in the file -> that number."""
    found = {}
    for node in ast.parse(source).body:
        match node:
            case ast.Assign([ast.Name(name)], ast.Call(ast.Name("_packed"), [_, _, ast.Constant(int(rows))])):
                found[name] = rows
    return found


def _shifted(box: Box) -> tuple[dict[str, Any], dict[Any, int]]:
    """Each size as its least value plus a variable that is at least 0, and how far that variable goes."""
    above = {axis: sympy.Dummy(nonnegative=True, integer=True) for axis in box}
    fixed = {axis: low == high for axis, (low, high) in box.items()}
    return (
        {axis: sympy.Integer(low) + (0 if fixed[axis] else above[axis]) for axis, (low, _) in box.items()},
        {above[axis]: high - low for axis, (low, high) in box.items() if not fixed[axis]},
    )


def _value(node: ast.expr, env: Mapping[str, Any]) -> Any:
    """An expression of sizes; KeyError where it is of anything else."""
    match node:
        case ast.Constant(int(value)):
            return sympy.Integer(value)
        case ast.Name(name):
            return env[name]
        case ast.BinOp(left, op, right):
            return ARITHMETIC[type(op)](_value(left, env), _value(right, env))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, env)
        case ast.Call(ast.Name("max" | "min" as name), arguments):
            return (sympy.Max if name == "max" else sympy.Min)(*(_value(a, env) for a in arguments))
    raise KeyError(ast.unparse(node))


def always(text: str, box: Box) -> bool:
    """Whether a comparison of sizes, as Python, is proved for all of a box."""
    return _always(ast.parse(text, mode="eval").body, *_shifted(box))


def _always(test: ast.expr, env: Mapping[str, Any], ranges: Mapping[Any, int]) -> bool:
    """Whether a test is proved for all sizes."""
    match test:
        case ast.BoolOp(ast.And(), values):
            return all(_always(v, env, ranges) for v in values)
        case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
            try:
                difference = _value(right, env) - _value(left, env)
            except KeyError:
                return False
            match op:
                case ast.LtE() | ast.Lt():
                    return nonnegative(difference - int(isinstance(op, ast.Lt)), ranges)
                case ast.GtE() | ast.Gt():
                    return nonnegative(-difference - int(isinstance(op, ast.Gt)), ranges)
                case ast.Eq():
                    return nonnegative(difference, ranges) and nonnegative(-difference, ranges)
                case _:
                    return nonnegative(difference**2 - 1, ranges)
    return False


def nonnegative(value: Any, ranges: Mapping[Any, int]) -> bool:
    """Whether an expression of variables from 0 to their ends is proved to be at least 0: all coefficients are, or all values."""
    value = sympy.expand(value)
    free = sorted(value.free_symbols, key=str)
    if value.is_polynomial(*free) and all(c >= 0 for c in (sympy.Poly(value, *free).coeffs() if free else [value])):
        return True
    if math.prod(ranges[s] + 1 for s in free) > POINTS:
        return False
    function = sympy.lambdify(free, value, "math")
    return all(function(*point) >= 0 for point in itertools.product(*(range(ranges[s] + 1) for s in free)))


class _Body:
    """A cell's code on a box of sizes: `shapes` are those of its tensors as far as they are known, `memory` how many elements lie
    behind them."""

    def __init__(self, axes: Mapping[tuple[str, int], str], box: Box, packed: Mapping[str, int]) -> None:
        self.axes, self.box, self.packed = axes, box, packed
        self.of_axis, self.ranges = _shifted(box)
        self.env: dict[str, Any] = {}
        self.sized: dict[str, str] = {}  # variable -> the input whose size it holds
        self.read: set[str] = set()
        self.shapes: dict[str, tuple[Any, ...]] = {}
        for name in dict.fromkeys(n for n, _ in axes):
            self.shapes[name] = tuple(self.of_axis[axis] for (n, _), axis in axes.items() if n == name)
        self.memory: dict[str, Any] = {name: sympy.prod(shape) for name, shape in self.shapes.items()}

    def check(self, cell: ast.FunctionDef) -> Iterator[str]:
        for statement in cell.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    yield from self._call(node)
            match statement:
                case ast.Assign([ast.Name(name)], value):
                    self._assign(name, value)
                case ast.If(ast.UnaryOp(ast.Not(), test), [ast.Raise()], []) if not _always(test, self.env, self.ranges):
                    yield f"its assertion {ast.unparse(test)} is not proved for {_text(self.box)}"
        for axis, (low, high) in self.box.items():
            if low < high and axis not in self.read:
                yield f"it never reads the size of {axis}, so it is for one size, but it is called for {_text({axis: (low, high)})}"

    def _assign(self, name: str, value: ast.expr) -> None:
        match value:
            case ast.Call(ast.Attribute(ast.Name(owner), "size"), []):
                self.sized[name] = owner
            case ast.Subscript(ast.Name(owner), ast.Constant(int(dim))) if owner in self.sized:
                axis = self.axes[self.sized[owner], dim]
                self.read.add(axis)
                self.env[name] = self.of_axis[axis]
            case _:
                for known, found in ((self.shapes, self._shape(value)), (self.memory, self._memory(value))):
                    known.pop(name, None)
                    if found is not None:
                        known[name] = found  # type: ignore[index,assignment]

    def _sizes(self, node: ast.expr) -> tuple[Any, ...]:
        if not isinstance(node, ast.Tuple):
            raise KeyError(ast.unparse(node))
        return tuple(_value(part, self.env) for part in node.elts)

    def _shape(self, node: ast.expr) -> tuple[Any, ...] | None:
        match node:
            case ast.Name(name):
                return self.shapes.get(name)
            case ast.Call(ast.Name("reinterpret_tensor"), [_, sizes, *_]) | ast.Call(
                ast.Name("empty_strided_cpu" | "empty_strided_cuda"), [sizes, *_]
            ):
                try:
                    return self._sizes(sizes)
                except KeyError:
                    return None
            case ast.Call(_, [x, ast.Name(weight), *_]) if "packed" in weight and "linear" in ast.unparse(node.func):
                shape = self._shape(x)
                return (*shape[:-1], sympy.Dummy()) if shape else None  # rows as in its input, a width that is not looked at
        return None

    def _memory(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(name) | ast.Call(ast.Name("reinterpret_tensor"), [ast.Name(name), *_]):
                return self.memory.get(name)
            case ast.Call(ast.Name("empty_strided_cpu" | "empty_strided_cuda"), [sizes, strides, *_]):
                return self._extent(sizes, strides)
        return None

    def _extent(self, sizes: ast.expr, strides: ast.expr) -> Any:
        try:
            return 1 + sum((n - 1) * step for n, step in zip(self._sizes(sizes), self._sizes(strides), strict=True))
        except KeyError:
            return None

    def _call(self, call: ast.Call) -> Iterator[str]:
        match call:
            case ast.Call(ast.Name("reinterpret_tensor"), [base, sizes, strides, offset]):
                memory, extent = self._memory(base), self._extent(sizes, strides)
                if memory is not None and extent is not None and not nonnegative(memory - extent - _value(offset, self.env), self.ranges):
                    yield f"{ast.unparse(call)} is not proved to stay within its memory for {_text(self.box)}"
            case ast.Call(_, [x, ast.Name(weight), *_]) if weight in self.packed:
                shape, rows = self._shape(x), self.packed[weight]
                if shape is not None:
                    difference = sympy.prod(shape[:-1]) - rows
                    if not (nonnegative(difference, self.ranges) and nonnegative(-difference, self.ranges)):
                        yield f"{weight} is packed for {rows} rows, but is called with others for {_text(self.box)}"
