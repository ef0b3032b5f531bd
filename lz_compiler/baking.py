"""A ModelPlan as a folder that runs without LayerZero: a generated Python file, its weights, its compiled loop nests.

What Inductor generated for each cell's planned graph (torch_private.generated_code) is read with `ast`; its body becomes a function of
straight-line calls, its C++ loop nests constants of the file with their libraries beside it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import __version__, export, ops, torch_private
from .backend import EAGER, PLANNED, setup
from .capture import fingerprint
from .errors import PlanError
from .export import Program, Ranges
from .offline import CellPlan, ModelPlan, check_environment, compile_cell, session_for
from .options import Options
from .report import milliseconds
from .timings import open_store

FILE = "_layerzero_plan.py"
# How Inductor calls ATen, and what that is.
PLAIN = {
    "extern_kernels.convolution(": "torch.ops.aten.convolution(", "extern_kernels.bias_addmm(": "torch.addmm(",
    **{f"extern_kernels.{name}(": f"torch.{name}(" for name in ("mm", "bmm", "addmm", "baddbmm")},
}  # fmt: skip
KNOWN = {"torch", "aten", "math", "inf", "nan", "empty_strided_cpu", "reinterpret_tensor"}  # names of the template
DROPPED = re.compile(r"assert_\w+\(|args\.clear|del arg|#")


@dataclass(frozen=True, slots=True)
class Body:
    """One cell's code: parameters and lines of a function, and the loop nests (name -> argument types, C++) that it calls."""

    arguments: tuple[str, ...]
    lines: tuple[str, ...]
    loops: Mapping[str, tuple[tuple[str, ...], str]]


def bake(
    plan: ModelPlan, out_dir: str | os.PathLike[str], model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Path:
    """Write `plan` with `model`'s weights to a folder that must not exist yet, or be empty; returns the folder's Python file.

    `args` and `kwargs` are examples, as for `lz.solve`. CPU inference; the arguments are tensors and constants.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError(f"{os.fspath(out)!r} exists and is not an empty folder. Give a new one.")
    check_environment(plan)
    if plan.environment["device"] != "cpu":
        raise PlanError(f"a plan for {plan.environment['device']!r} cannot be baked; only CPU plans can, so far. Use lz.compile(plan=...).")
    named = export.bind(model, args, kwargs)
    if tuple(named) != plan.arguments:
        raise PlanError(f"arguments given: {', '.join(named)}; the plan is for: {', '.join(plan.arguments)}.")
    export.check_dynamic(named, plan.dynamic, plan.buckets)
    for symbol in plan.buckets:
        _check_name(symbol, "symbol")
    setup()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:  # whole or not at all
        _Writer(plan, model, named, Path(folder) / "plan").write()
        (Path(folder) / "plan").rename(out)
    return out / FILE


class _Writer:
    def __init__(self, plan: ModelPlan, model: nn.Module, named: Mapping[str, Any], out: Path) -> None:
        self.plan, self.model, self.named, self.out = plan, model, named, out
        self.inputs = [name for name, value in named.items() if isinstance(value, Tensor)]
        for name, value in named.items():
            if name not in self.inputs and not isinstance(value, (int, float, bool, str, type(None))):
                raise PlanError(f"argument {name!r} is {type(value).__name__}; baked files take tensors and constants. Wrap the model.")
        self.weights: dict[str, Tensor] = {}  # as stored
        self.stored: dict[tuple[str, tuple[int, ...]], str] = {}  # contents and strides -> the name in `weights`
        self.globals: dict[str, str] = {}  # a weight's name in the file -> the expression that loads it
        self.loops: dict[tuple[tuple[str, ...], str], str] = {}  # a loop nest -> its name in the file
        self.brgemm = False
        self.returns = ""

    def write(self) -> None:
        (self.out / "kernels").mkdir(parents=True)
        cells = [self._cell(i, cell) for i, cell in enumerate(self.plan.cells)]
        for (types, source), name in self.loops.items():
            shutil.copy(torch_private.compiled_cpp(types, source), self.out / "kernels" / f"{name}.so")
        if self.brgemm:
            shutil.copy(ops.attention_library(), self.out / "kernels" / "attention_brgemm.so")
        save_file({name: w.contiguous() for name, w in self.weights.items()}, self.out / "weights.safetensors")
        (self.out / "weights.safetensors").chmod(0o644)
        (self.out / FILE).write_text(self._text(cells))
        files = {str(p.relative_to(self.out)): _hash(p) for p in sorted(self.out.rglob("*")) if p.is_file()}
        manifest = {"layerzero_bake": 1, "layerzero": __version__, "environment": dict(self.plan.environment), "files": files}
        (self.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    def _cell(self, index: int, cell: CellPlan) -> str:
        program = export.export_program(self.model, self.named, self.plan.dynamic, cell.ranges)
        if fingerprint(program.gm) != cell.fingerprint:
            raise PlanError(f"this {type(self.model).__name__} is not the one that was planned: another graph. Solve again.")
        planned = dict(self.plan.options)
        session = session_for(
            program, Options.resolve({k: v for k, v in planned.items() if k != "mode"}, planned["mode"]), open_store(None)
        )
        winner = PLANNED if cell.winner == EAGER else cell.winner
        with torch_private.generated_code() as generated:
            _, written, aliased = compile_cell(session, program, cell, winner)
        if written or len(generated.sources) != 1 or aliased:
            raise PlanError("a model that writes into its arguments or buffers, or returns views of them, cannot be baked.")
        body = read_generated(generated.sources[0])
        self._check_returns(program)
        return self._function(index, cell, program, body, generated)

    def _check_returns(self, program: Program) -> None:
        returns = _render(program.out_spec, [f"out[{i}]" for i in range(program.out_spec.num_leaves)])
        assert self.returns in ("", returns)
        self.returns = returns

    def _function(self, index: int, cell: CellPlan, program: Program, body: Body, generated: torch_private.Generated) -> str:
        text = "\n".join(body.lines)
        for call, plain in PLAIN.items():
            text = text.replace(call, plain)
        self.brgemm |= "torch.ops.lz.attention_brgemm" in text
        other = re.search(r"torch\.ops\.lz\.(?!attention_brgemm)\w+|extern_kernels\.\w+", text)
        if other:
            raise PlanError(f"{other[0]} has no form without LayerZero yet. Solve with backends=... that leave it out.")
        read = set(re.findall(r"\b[A-Za-z_]\w*\b", text))
        names, leaves = {}, iter(self.named)
        for argument, value, target in zip(body.arguments, program.weights, program.names, strict=True):
            if value is None:
                names[argument] = next(leaves)
            elif argument in read:
                names[argument] = self._weight(target, value)
        names |= {name: self._constant(name, tensor, generated) for name, tensor in generated.constants.items() if name in read}
        names |= {name: self.loops.setdefault(loop, f"loop_{len(self.loops)}") for name, loop in body.loops.items() if name in read}
        text = re.sub(r"\b[A-Za-z_]\w*\b", lambda m: names.get(m[0], m[0]), text)
        function = "\n".join(
            [f"def cell_{index}({', '.join(self.inputs)}):", *_comment(cell), *(f"    {line}" for line in text.splitlines())]
        )
        missing = _unbound(function) - KNOWN - set(names.values())
        assert not missing, f"the generated code reads {missing}"
        return function

    def _store(self, name: str, value: Tensor) -> str:
        """The name under which a tensor is stored: equal ones (tied, or of several cells) are stored once."""
        name = self.stored.setdefault((_digest(value), tuple(value.stride())), name)
        self.weights.setdefault(name, value.detach())
        return name

    def _weight(self, name: str, value: Tensor) -> str:
        stored = self._store(name, value)
        return self._load("w", stored, f"_weight({stored!r})")

    def _constant(self, name: str, tensor: Tensor, generated: torch_private.Generated) -> str:
        if name not in generated.packed:
            return self._weight(f"constant.{_digest(tensor)}", tensor)
        operator, plain, rest = generated.packed[name]
        stored = self._store(f"plain.{_digest(plain)}", plain)
        call = ", ".join([f"torch.ops.{operator.replace('::', '.')}", *map(repr, (stored, *rest))])
        return self._load("packed", stored, f"_packed({call})")

    def _load(self, kind: str, name: str, expression: str) -> str:
        identifier = f"{kind}_{re.sub(r'[^A-Za-z0-9]+', '_', name.removeprefix('plain.').removeprefix('constant.'))}"
        while self.globals.get(identifier, expression) != expression:
            identifier += "_"
        self.globals[identifier] = expression
        return identifier

    def _text(self, cells: list[str]) -> str:
        constants = {n: v for n, v in self.named.items() if n not in self.inputs}
        loops = [f"{name} = _loop({name!r}, {list(types)!r}, r'''{source}''')" for (types, source), name in self.loops.items()]
        library = 'torch.ops.load_library(HERE / "kernels" / "attention_brgemm.so")'
        replaced = {
            "MODEL": _text(self.plan.model), "VERSION": __version__,
            "ENVIRONMENT_TEXT": _text(", ".join(f"{k} {v}" for k, v in self.plan.environment.items())),
            "ENVIRONMENT": repr(dict(self.plan.environment)), "LAYOUT_MODE": repr(self.plan.options["layout_mode"]),
            "STRIDES": repr({n: w.stride() for n, w in self.weights.items() if not w.is_contiguous()}),
            "LIBRARIES": library if self.brgemm else "", "WEIGHTS": "\n".join(f"{n} = {e}" for n, e in self.globals.items()),
            "LOOPS": "\n\n".join(loops), "CELLS": "\n\n\n".join(cells), "EXAMPLES": self._examples(),
            "SIGNATURE": ", ".join(_parameter(name, value) for name, value in self.named.items()),
            "CHECKS": self._checks(constants).strip(), "DISPATCH": self._dispatch().strip(),
        }  # fmt: skip
        template = Path(__file__).with_name("baked_template.txt").read_text()
        return re.sub(r"# <(\w+)>|__([A-Z_]+)__", lambda m: replaced[m[1] or m[2]], template)

    def _checks(self, constants: Mapping[str, Any]) -> str:
        lines = [
            f'    if {name} != {value!r}:\n        raise ValueError(f"{name} is {{{name}!r}}; this file was made for {value!r}")'
            for name, value in constants.items()
        ]
        for name, planned in zip(self.inputs, self.plan.tensors, strict=True):
            dims = len(planned.order)
            ordered = f"{name}.is_contiguous()" if planned.order == tuple(range(dims)) else f"_ordered({name}, {planned.order})"
            fits = f"{name}.dtype is torch.{planned.dtype} and {name}.device.type == {planned.device!r} and {name}.dim() == {dims}"
            lines.append(f"    if not ({fits} and {ordered}):")
            lines.append(f"        {name} = _adapt({name!r}, {name}, torch.{planned.dtype}, {planned.order})")
            fixed = " or ".join(f"{name}.shape[{i}] != {n}" for i, n in enumerate(planned.shape) if n >= 0)
            if fixed:
                lines.append(f"    if {fixed}:\n        raise ValueError(_sizes({name!r}, {name}, {planned.shape}))")
        return "\n".join(lines)

    def _dispatch(self) -> str:
        """Nested comparisons of the sizes with the buckets' upper ends."""
        lines: list[str] = []
        seen: set[str] = set()
        for name, dims in self.plan.dynamic.items():
            for dim, symbol in dims.items():
                size = f"{name}.shape[{dim}]"
                if symbol in seen:
                    lines.append(f"    if {size} != {symbol}:")
                    lines.append(f"        raise ValueError(_outside({symbol!r}, {size}, {symbol}, {symbol}))")
                else:
                    lines.append(f"    {symbol} = {size}")
                seen.add(symbol)
        inputs = ", ".join(self.inputs)

        def level(symbols: Sequence[str], fixed: Ranges, indent: str) -> None:
            if not symbols:
                index = [c.ranges for c in self.plan.cells].index(fixed)
                lines.append(f"{indent}out = cell_{index}({inputs})")
                return
            ranges = dict.fromkeys(c.ranges[symbols[0]] for c in self.plan.cells)
            for i, (low, high) in enumerate(ranges):
                test = f"{symbols[0]} == {low}" if low == high else f"{low} <= {symbols[0]} <= {high}"
                lines.append(f"{indent}{'elif' if i else 'if'} {test}:")
                level(symbols[1:], {**fixed, symbols[0]: (low, high)}, indent + "    ")
            last = max(high for _, high in ranges)
            lines.append(f"{indent}else:\n{indent}    raise ValueError(_outside({symbols[0]!r}, {symbols[0]}, 1, {last}))")

        level(list(self.plan.buckets), {}, "    ")
        lines.append(f"    return {self.returns}")
        return "\n".join(lines)

    def _examples(self) -> str:
        """Made-up inputs of each cell, for the self-test: {cell: {input: (shape, dtype, highest integer)}}."""
        found = {}
        for i, cell in enumerate(self.plan.cells):
            sized = export.resized(self.named, self.plan.dynamic, {s: high for s, (_, high) in cell.ranges.items()})
            found[i] = {n: (tuple(sized[n].shape), str(sized[n].dtype)[6:], _highest(sized[n])) for n in self.inputs}
        return _pretty(found)


def _highest(value: Tensor) -> int:
    return int(value.max()) if not value.is_floating_point() and not value.is_complex() and value.numel() else 1


def read_generated(source: str) -> Body:
    """What Inductor's module for a CPU graph does, without its module-level machinery. PlanError for one that is of another kind."""
    tree = ast.parse(source)
    loops: dict[str, tuple[tuple[str, ...], str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "async_compile" in ast.unparse(node.value.func):
            if ast.unparse(node.value.func) != "async_compile.cpp_pybinding":
                raise PlanError(f"{ast.unparse(node.value.func)} in the generated code: only C++ loop nests can be baked so far.")
            types, text = (ast.literal_eval(a) for a in node.value.args)
            assert isinstance(node.targets[0], ast.Name)
            loops[node.targets[0].id] = tuple(types), text
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "call")
    lines = source.splitlines()[call.body[0].lineno - 1 : call.end_lineno]
    first = call.body[0]
    assert isinstance(first, ast.Assign)
    (names,) = (t for t in first.targets if isinstance(t, ast.Tuple))
    body = [line[call.col_offset + 4 :] for line in lines[1:]]
    kept = [line for line in body if line.strip() and not DROPPED.match(line.strip())]
    return Body(tuple(ast.unparse(n) for n in names.elts), tuple(kept), loops)


def _unbound(function: str) -> set[str]:
    tree = ast.parse(function)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
    return {n.id for n in names} - bound - set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)


def _comment(cell: CellPlan) -> list[str]:
    """What the cell runs, at which price, and what the clock said."""
    ranges = ", ".join(f"{s} {low}..{high}" for s, (low, high) in cell.ranges.items()) or "the planned shapes"
    raced = ", ".join(f"{name} {milliseconds(1e9 * t)}" for name, t in cell.times.items())
    lines = [f"    {ranges}: {cell.winner}" + (f" won the race ({raced})." if raced else ", not raced.")]
    for plan in cell.plans:
        lines.append("")
        lines.append(f"    predicted {milliseconds(plan.predicted)} ({plan.status}, bound {milliseconds(plan.bound)}):")
        for choice in (c for c in plan.choices if c.candidate.kernel != "inductor.loop"):
            other = min(choice.alternatives, key=lambda a: a[1].ns, default=None)
            next_best = f"; next {other[0].kernel} {milliseconds(other[1].ns)}" if other else ""
            node = choice.candidate.region.nodes[-1]
            lines.append(f"    {node}: {choice.candidate.kernel} {milliseconds(choice.cost.ns)} {choice.cost.source}{next_best}")
    text = [_text(line) for line in lines]
    return [f'    """{text[0].strip()}', *text[1:], '    """']


def _text(words: str) -> str:
    """What stands in a plan as it may stand in a docstring: nothing that could end it."""
    return re.sub(r"[^\w .,:;()\[\]<>=+/*%-]", "?", words)


def _parameter(name: str, value: Any) -> str:
    _check_name(name, "argument")
    return name if isinstance(value, Tensor) else f"{name}={value!r}"


def _check_name(name: str, what: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name in KNOWN:
        raise PlanError(f"{what} {name!r} cannot be a name in the generated function. Rename it.")


def _render(spec: pytree.TreeSpec, leaves: list[str]) -> str:
    """The model's output structure as an expression of its leaves."""
    if spec.is_leaf():
        return leaves.pop(0)
    parts = [_render(child, leaves) for child in spec.children()]
    if spec.type is dict:
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(spec.context, parts, strict=True)) + "}"
    if spec.type in (tuple, list):
        inner = ", ".join(parts)
        return f"[{inner}]" if spec.type is list else f"({inner},)" if parts else "()"
    raise PlanError(f"the model returns {spec.type.__name__}; baked files return tensors, tuples, lists and dicts. Wrap the model.")


def _digest(value: Tensor) -> str:
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(repr((tuple(value.shape), value.dtype)).encode() + data.tobytes()).hexdigest()[:16]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pretty(value: Mapping[Any, Any]) -> str:
    return "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in value.items()) + "}"
