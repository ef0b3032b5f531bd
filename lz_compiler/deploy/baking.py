"""A ModelPlan as a folder that runs without LayerZero: a generated Python file, its weights, its compiled loop nests.

What Inductor generated for each cell's planned graph (torch_private.generated_code) is read with `ast`; its body becomes a function of
straight-line calls, its kernels (C++ loop nests, Triton) constants of the file, the C++ ones with their libraries beside it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
import logging
import os
import re
import runpy
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__, ops, torch_private
from ..backend import setup
from ..backends import all_backends, owners
from ..backends.library import LibraryBackend
from ..capture import fingerprint
from ..errors import OptionError, PlanError
from ..plan_io import digest, plan_to_dict
from ..problem import LOOP
from ..reports.report import milliseconds
from ..timings import open_store
from ..trust import circuit
from ..types import EAGER, PLANNED
from . import export, general, writing
from .export import Program, Ranges
from .forward import Forward
from .offline import CellPlan, ModelPlan, check_environment, compile_cell, followed_options, load_plan, other_autocast, session_for
from .warming import FILE, MANIFEST, sha256

log = logging.getLogger(__name__)

# How Inductor calls ATen, and what that is.
PLAIN = {
    "extern_kernels.convolution(": "torch.ops.aten.convolution(", "extern_kernels.bias_addmm(": "torch.addmm(",
    **{f"extern_kernels.{name}(": f"torch.{name}(" for name in ("mm", "bmm", "addmm", "baddbmm")},
}  # fmt: skip
# Names of the template, and of its part for GPUs.
KNOWN = {"torch", "aten", "math", "inf", "nan", "empty_strided_cpu", "reinterpret_tensor", "empty_strided_cuda", "get_raw_stream", "launch"}
# What `forward` itself calls: its arguments and sizes cannot be called so.
RESERVED = re.compile(r"(cell|general)_\d+|_(adapt|ordered|constant|sizes|size_\w+|outside|nowhere|beyond|raised|rescued|error)")
FOLLOWING = re.compile(r"torch\.ops\.aten\.(cudnn_)?convolution\b")  # what follows autocast on a GPU; calls with `out=` do not
DROPPED = re.compile(r"assert_\w+\(|args\.clear|del arg|#")
STREAM = "stream0 = get_raw_stream(0)"
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True, slots=True)
class Loop:
    """A kernel that Inductor generated, or inlined: C++ with its argument types, or Triton with its function's name."""

    language: str
    detail: tuple[str, ...]
    source: str

    def library(self, name: str) -> str:
        """The stem of its compiled file. With a hash: a process that has loaded a library gets the same one again for the same path."""
        return f"{name}_{digest([self.detail, self.source])[:8]}"

    def text(self, name: str, compiled: torch_private.CompiledTriton | None) -> str:
        """The kernel as a global of the file."""
        if self.language == "cpp":
            head = writing.wrapped(f"{name} = _loop({self.library(name)!r}, {list(self.detail)!r}, r'''")
            return "\n".join(head) + f"{self.source}''')"
        if compiled is None:
            return f"{name} = _compiled({self.detail[0]!r}, r'''{self.source}''')"
        call = [f"_kernel, {', '.join(compiled.grid)}, {compiled.warps}, {compiled.shared}, {compiled.types!r}"]
        call += [f"({', '.join(compiled.passed)},), stream"]
        lines = [
            f"@_cubin({self.detail[0]!r}, {compiled.shared}, r'''{self.source}''')",
            f"def {name}(_kernel, {', '.join(compiled.parameters)}, stream):",
            *(f"    {line}" for line in compiled.lines),
            f"    launch({', '.join(call)})",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Body:
    """One cell's code: parameters and lines of a function, and the kernels by the names under which it calls them."""

    arguments: tuple[str, ...]
    lines: tuple[str, ...]
    loops: Mapping[str, Loop]


@dataclass(frozen=True, slots=True)
class CompiledCell:
    """One cell, compiled: its graph and what was generated for it, which of the graph's placeholders it writes into; of a general cell,
    what else `forward` must ask of sizes; of a planned one, by which names each kernel is called."""

    program: Program
    body: Body
    code: torch_private.Generated
    written: frozenset[int]
    asked: tuple[str, ...] = ()
    calls: Mapping[str, Collection[str]] = field(default_factory=dict)


def bake(
    plan: ModelPlan | str | os.PathLike[str], out_dir: str | os.PathLike[str], model: nn.Module, args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write `plan`, or the one in a file, with `model`'s weights to a folder that must not exist yet, or be empty; returns its Python file.

    `args` and `kwargs` are examples, as for `lz.solve`. Inference; the arguments are tensors and constants. Buffers that the model
    writes into (a key-value cache) are the file's own state.

    PlanError for a folder that is taken or cannot be written, a plan of another machine, model or arguments, or what has no form in a file.
    OptionError for what is no plan or no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"bake takes an nn.Module after the plan and the folder; given: {type(model).__name__}.")
    if isinstance(plan, (str, os.PathLike)):
        plan = load_plan(plan)
    if not isinstance(plan, ModelPlan):
        raise OptionError(f"bake takes a plan of lz.solve, or the path of its file; given: {type(plan).__name__}.")
    out = _free_folder(out_dir)
    check_environment(plan)
    other = other_autocast(plan)
    if other:
        raise PlanError(f"{other}. Bake as it was solved.")
    named = export.bind(model, args, kwargs, plan.arguments)
    export.check_dynamic(named, plan.dynamic, plan.buckets, plan.lowest)
    export.check_mode(model)
    for what, names in (("argument", named), ("symbol", plan.buckets)):
        for name in names:
            _check_name(name, what)
    setup()
    with _folder_beside(out) as folder:  # whole or not at all
        _Writer(plan, model, named, Path(folder) / "plan").write()
        try:
            (Path(folder) / "plan").rename(out)
        except OSError as error:
            why = f"the finished folder cannot be moved there ({error.strerror or error}): something was written there meanwhile"
            raise PlanError(f"cannot bake to {os.fspath(out_dir)!r}: {why}. Give a new folder.") from error
    return Path(out_dir) / FILE


def _free_folder(out_dir: str | os.PathLike[str]) -> Path:
    """Where the folder will be, links followed. PlanError where it is taken, or cannot be replaced."""
    try:
        out, here = Path(out_dir).resolve(), Path.cwd()
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise PlanError(
            f"cannot bake to {os.fspath(out_dir)!r}: {getattr(error, 'strerror', '') or error}. Give another folder."
        ) from error
    if taken:
        raise PlanError(f"{os.fspath(out_dir)!r} exists and is not an empty folder. Give a new one.")
    if out == here:
        raise PlanError(f"cannot bake to {os.fspath(out_dir)!r}: that is the current folder, which cannot be replaced. Give a new one.")
    return out


def _folder_beside(out: Path) -> tempfile.TemporaryDirectory[str]:
    """An empty folder that can become `out`. PlanError where there cannot be one."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        why = f"{os.fspath(out.parent)!r} cannot be written to: {error.strerror or error}"
        raise PlanError(f"cannot bake to {os.fspath(out)!r}: {why}. Give a folder that can be.") from error


class _Writer:
    def __init__(self, plan: ModelPlan, model: nn.Module, named: Mapping[str, Any], out: Path) -> None:
        self.plan, self.model, self.named, self.out = plan, model, named, out
        self.inputs = [name for name, value in named.items() if isinstance(value, Tensor)]
        for name, value in named.items():
            if name not in self.inputs and type(value) not in (int, float, bool, str, type(None)):  # an enum's member has no literal
                raise PlanError(f"argument {name!r} is {type(value).__name__}; baked files take tensors and constants. Wrap the model.")
        # In `forward` each symbol is a variable of its own name, unless an argument has it.
        self.symbols = {s: f"_size_{s}" if s in named else s for s in plan.buckets}
        self.weights: dict[str, Tensor] = {}  # as stored
        self.stored: dict[tuple[str, tuple[int, ...]], str] = {}  # contents and strides -> the name in `weights`
        self.globals: dict[str, str] = {}  # a weight's name in the file -> the expression that loads it
        self.late: set[str] = set()  # stored weights that only general cells read as they are
        self.loops: dict[Loop, str] = {}  # a kernel -> its name in the file
        self.cubins: dict[str, torch_private.CompiledTriton] = {}  # by a kernel's name in the file
        self.state: set[str] = set()  # buffers that some cell writes into
        self.cuda = plan.environment["device"] == "cuda"
        self.graphs = self.cuda and (plan.options["cudagraphs"] or plan.options["mode"] in WITHOUT_GRAPHS)
        self.written: set[str] = set()  # arguments that some cell writes into
        self.brgemm = False
        self.operators: set[str] = set()  # that the cells call, beside ATen's
        self.functions: dict[str, str] = {}  # written out, by their names in the file
        self.returns = ""
        self.planned: dict[str, dict[str, Any]] = {}  # of each cell: what to blame for an error in it
        self.references: dict[str, str] = {}  # of each cell that may run twice: the function that repeats it
        self.beyond: list[tuple[Ranges, tuple[str, ...]]] = []  # of each general cell: its sizes, and what else is asked of them

    def write(self) -> None:
        (self.out / "kernels").mkdir(parents=True)
        generated = [self._generated(cell) for cell in self.plan.cells]
        self.state = {g.program.names[i] for g in generated for i in g.written if g.program.weights[i] is not None}
        cells = [self._function(f"cell_{i}", _comment(p), g) for i, (p, g) in enumerate(zip(self.plan.cells, generated, strict=True))]
        generals = self._generals({g.program.names[i] for g in generated for i in g.written})
        self.beyond = [(g.program.ranges, g.asked) for g in generals]
        cells += [self._function(f"general_{i}", _general_comment(g), g, late=True) for i, g in enumerate(generals)]
        self.planned = {f"cell_{i}": _blame(p, g) for i, (p, g) in enumerate(zip(self.plan.cells, generated, strict=True))}
        cells += self._references(generated, generals)
        for loop, name in self.loops.items():
            if loop.language == "cpp":
                shutil.copy(torch_private.compiled_cpp(loop.detail, loop.source), self.out / "kernels" / f"{loop.library(name)}.so")
        if self.brgemm:
            shutil.copy(ops.attention_library(), self.out / "kernels" / "attention_brgemm.so")
        save_file(self._apart(), self.out / "weights.safetensors")
        (self.out / "weights.safetensors").chmod(0o644)
        (self.out / FILE).write_text(self._text(cells))
        if any(loop.language == "triton" for loop in self.loops):
            self._cubins()
            (self.out / FILE).write_text(self._text(cells))
        files = {str(p.relative_to(self.out)): sha256(p) for p in sorted(self.out.rglob("*")) if p.is_file()}
        shapes = {
            name: [self.plan.dynamic.get(name, {}).get(dim, size) for dim, size in enumerate(planned.shape)]
            for name, planned in zip(self.inputs, self.plan.tensors, strict=True)
        }
        manifest = {
            "layerzero_bake": 1, "layerzero": __version__, "environment": dict(self.plan.environment), "bundle": dict(self.plan.bundle),
            "inputs": shapes, "buckets": dict(self.plan.buckets), "at_least": self.plan.lowest,
            "error_budget": self.plan.options["error_budget"],
            "cells": [self._holds(*pair) for pair in zip(self.plan.cells, generated, strict=True)], "plan": _plan_hash(self.plan),
            "general": [_general_holds(g) for g in generals], "files": files,
        }  # fmt: skip
        (self.out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _apart(self) -> dict[str, Tensor]:
        """The weights as safetensors takes them: dense, and none in another one's memory."""
        dense = {name: weight.contiguous() for name, weight in self.weights.items()}
        used = Counter(weight.untyped_storage().data_ptr() for weight in dense.values())
        return {name: weight.clone() if used[weight.untyped_storage().data_ptr()] > 1 else weight for name, weight in dense.items()}

    def _cubins(self) -> None:
        """Store the Triton kernels compiled. The file is run once with their sources, since which of its configurations Inductor takes
        for a kernel is known when it has run."""
        for _ in runpy.run_path(str(self.out / FILE))["warmup"](calls=1):
            pass
        for loop, name in self.loops.items():
            compiled = torch_private.compiled_triton(loop.detail[0], loop.source)
            if compiled is not None:
                (self.out / "kernels" / f"{name}.cubin").write_bytes(compiled.cubin)
                self.cubins[name] = compiled

    def _generated(self, cell: CellPlan) -> CompiledCell:
        program = export.export_program(self.model, self.named, self.plan.dynamic, cell.ranges)
        if fingerprint(program.gm) != cell.fingerprint:
            raise PlanError(f"this {type(self.model).__name__} is not the one that was planned: another graph. Solve again.")
        options = followed_options(self.plan, {})
        options = replace(options, cudagraphs=False, mode=WITHOUT_GRAPHS.get(options.mode, options.mode))  # the file captures its own
        session = session_for(program, options, open_store(options.cache_dir))
        winner = PLANNED if cell.winner == EAGER else cell.winner
        with torch_private.generated_code() as code:
            _, written, aliased = compile_cell(session, program, cell, winner)
        if written is None:
            raise PlanError("AOTAutograd merged inputs of this graph, so that it is not known which ones the model writes into.")
        if len(code.sources) != 1 or aliased:
            raise PlanError("a model that returns views of its arguments, buffers or other outputs cannot be baked. Return copies.")
        self._check_returns(program)
        return CompiledCell(program, read_generated(code.sources[0]), code, frozenset(written), calls=session.breaker.calls)

    def _check_returns(self, program: Program) -> None:
        """PlanError for outputs of another structure than the other cells'."""
        returns = writing.render(program.out_spec, [f"out[{i}]" for i in range(program.out_spec.num_leaves)])
        self.returns = self.returns or returns
        if returns != self.returns:
            sizes = general.describe(program.ranges)
            raise PlanError(f"for {sizes} the model returns {returns}, else {self.returns}. Return the same structure for all sizes.")

    def _holds(self, cell: CellPlan, made: CompiledCell) -> dict[str, Any]:
        """What `lz.fuzz` proves the file against: a cell's kernels, and the sizes for which they were compiled."""
        ranges, first, assumed = torch_private.compiled_sizes(made.program.arguments)
        names = {s: made.program.symbols[place] for s, place in first.items()}
        holds = {symbol: ranges[position][dim] for (position, dim), symbol in made.program.symbols.items()}
        texts = [writing.renamed(text, names) for text in assumed]
        kernels = sorted({c.candidate.kernel for p in cell.plans for c in p.choices})
        limits = [{"kernel": k, "symbol": names[s], "low": low, "high": high} for k, s, low, high in sorted(made.code.limits)]
        return {"ranges": holds, "assumed": texts, "kernels": kernels, "limits": limits}

    def _generals(self, written: set[str]) -> list[CompiledCell]:
        """The general cells that can be made; none in strict, where sizes beyond the buckets are errors."""
        made = []
        for box in general.boxes(self.plan.lowest) if self.plan.options["layout_mode"] == "adapt" else ():
            try:
                program, asked = general.program(self.model, self.named, self.plan.dynamic, self.plan.buckets, box)
                self._check_returns(program)
                body = Body(*general.aten_code(program.gm.graph), {})
            except PlanError as error:
                log.warning("no general cell for %s beyond the buckets: %s", general.describe(box), error)
                continue
            places = frozenset(i for i, name in enumerate(program.names) if name in written)
            made.append(CompiledCell(program, body, torch_private.Generated(), places, asked))
        return made

    def _references(self, generated: Sequence[CompiledCell], generals: Sequence[CompiledCell]) -> list[str]:
        """Finds or writes what repeats a call in which a kernel of a cell raised: the general cell for its sizes, or else the cell's own
        graph as plain ATen calls. None in strict, nor for a cell that writes into its inputs."""
        functions = []
        for i, made in enumerate(generated if self.plan.options["layout_mode"] == "adapt" else ()):
            if made.written:
                continue
            found = next((j for j, g in enumerate(generals) if general.covers(g.program.ranges, g.asked, made.program.ranges)), None)
            if found is not None:
                self.references[f"cell_{i}"] = f"general_{found}"
            if found is not None or not self.planned[f"cell_{i}"]:
                continue
            try:
                body = Body(*general.aten_code(made.program.gm.graph), {})
            except PlanError as error:
                log.warning("nothing can take the place of cell_%d, should a kernel raise: %s", i, error)
                continue
            plain = CompiledCell(made.program, body, torch_private.Generated(), frozenset())
            functions.append(self._function(f"reference_{i}", [f'    """What cell_{i} does, as plain ATen calls."""'], plain, late=True))
            self.references[f"cell_{i}"] = f"reference_{i}"
        return functions

    def _function(self, name: str, comment: Sequence[str], made: CompiledCell, late: bool = False) -> str:
        """A cell's source. `late`: weights that no cell before it reads are loaded when it first runs."""
        text, program = "\n".join(made.body.lines), made.program
        for call, plain in PLAIN.items():
            text = text.replace(call, plain)
        operators = writing.CALLED.findall(text)
        for operator in operators:
            for function, source in writing.functions(operator).items():
                assert self.functions.setdefault(function, source) == source, f"two functions are called {function}"
        text = writing.CALLED.sub(r"_\1", text)
        other = re.search(r"extern_kernels\.\w+", text)
        if other:
            raise writing.no_form(other[0])
        self.brgemm |= "torch.ops.lz.attention_brgemm" in text
        self.operators |= set(re.findall(r"torch\.ops\.((?!aten\.)\w+\.\w+)", text))
        read = writing.variables(text)
        names, given, leaves, arguments = {}, {}, iter(self.named), set()
        loads: dict[str, str] = {}
        for i, (argument, value, target) in enumerate(zip(made.body.arguments, program.weights, program.names, strict=True)):
            if value is None:
                given[argument] = next(leaves)
                arguments |= {given[argument]} if i in made.written else set()
            elif argument in read:
                stored = self._store(target, value)
                if late and f"_weight({stored!r})" not in self.globals.values() and stored not in self.state:
                    names[argument] = writing.identifier("w", stored, {*loads, *self.globals})
                    loads[names[argument]] = f"    {names[argument]} = _late({stored!r})"
                    self.late.add(stored)
                else:
                    names[argument] = self._load("w", stored, f"_weight({stored!r})")
        names |= {name: self._constant(name, tensor, made.code) for name, tensor in made.code.constants.items() if name in read}
        names |= {name: self._loop(name, loop) for name, loop in made.body.loops.items() if name in read}
        taken = read - set(made.body.arguments) | set(names.values()) | KNOWN | {"_late"}
        inner = {name: writing.free(name, taken) for name in self.inputs}  # none of the function's other names
        text = writing.renamed(text, names | {argument: inner.get(name, name) for argument, name in given.items()})
        for loop_name in self.loops.values():
            text = text.replace(f"{loop_name}.run(", f"{loop_name}(")
        fixed = all(low == high for low, high in program.ranges.values())
        around = ["@_graphed"] if self.graphs and fixed and not arguments and not late else []
        if late or operators or (self.cuda and FOLLOWING.search(text)):  # such calls follow autocast: that of the plan, and no other
            cast = f"torch.{self.plan.autocast}" if late and self.plan.autocast else "enabled=False"
            around.append(f"@torch.autocast({self.plan.environment['device']!r}, {cast})")
        self.written |= arguments
        lines = [*comment, *loads.values(), *(part for line in text.splitlines() for part in writing.wrapped(f"    {line}"))]
        function = "\n".join([*around, f"def {name}({', '.join(inner.values())}):", *lines])
        missing = _unbound(function) - KNOWN - set(names.values()) - {"_graphed", "_late", *self.functions}
        assert not missing, f"the generated code reads {missing}"
        return function

    def _loop(self, name: str, loop: Loop) -> str:
        """The kernel's name in the file: C++ ones are numbered, Triton's keep theirs where it is free."""
        if loop not in self.loops:
            name = f"loop_{len(self.loops)}" if loop.language == "cpp" else name
            self.loops[loop] = f"{name}_{len(self.loops)}" if name in self.loops.values() else name
        return self.loops[loop]

    def _store(self, name: str, value: Tensor) -> str:
        """The name under which a tensor is stored: equal ones (tied, or of several cells) are stored once."""
        if name not in self.state:
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
        identifier = writing.identifier(kind, name, {known for known, loads in self.globals.items() if loads != expression})
        self.globals[identifier] = expression
        return identifier

    def _text(self, cells: list[str]) -> str:
        forward = Forward(self.plan, self.model, self.named, self.symbols, self.beyond, self.returns)
        loops = [loop.text(name, self.cubins.get(name)) for loop, name in self.loops.items()]
        library = (
            'if not hasattr(torch.ops.lz, "attention_brgemm"):  # another file may have brought it\n'
            '    torch.ops.load_library(HERE / "kernels" / "attention_brgemm.so")'
        )
        solved = writing.prose(", ".join(f"{k} {v}" for k, v in self.plan.environment.items()))
        replaced = {
            "MODEL": writing.prose(self.plan.model), "VERSION": __version__,
            "ENVIRONMENT_TEXT": writing.filled(f"From a plan for {solved}."),
            "ENVIRONMENT": writing.pretty(self.plan.environment), "LAYOUT_MODE": repr(self.plan.options["layout_mode"]),
            "STRIDES": repr({n: w.stride() for n, w in self.weights.items() if not w.is_contiguous()}),
            "MEMORY": writing.filled(self._memory()), "DEVICE": repr(self.plan.environment["device"]),
            "WRITTEN": repr(tuple(sorted(self.written))),
            "STATE": repr(tuple(sorted(n for n, e in self.globals.items() if e in {f"_weight({s!r})" for s in self.state}))),
            "CUDA": Path(__file__).with_name("baked_cuda.txt").read_text().strip() if self.cuda else "",
            "LIBRARIES": "\n\n\n".join([*([library] if self.brgemm else []), *self.functions.values()]),
            "PACKAGES": repr(self._packages()), "OPERATORS": repr(tuple(sorted(self.operators))),
            "WEIGHTS": "\n".join(f"{n} = {e}" for n, e in self.globals.items()),
            "LOOPS": "\n\n".join(loops), "CELLS": "\n\n\n".join(cells), "EXAMPLES": self._examples(),
            "SIGNATURE": forward.signature(),
            "PLANNED_FOR": repr({s: (self.plan.lowest[s], ends[-1]) for s, ends in self.plan.buckets.items()}),
            "BEYOND": repr("; ".join(general.describe(*sizes) for sizes in self.beyond)),
            "CHECKS": forward.checks().strip(), "DISPATCH": forward.dispatch().strip(),
            "PLAN": repr(_plan_hash(self.plan)), "PLANNED": writing.pretty(self.planned),
            "REFERENCES": writing.pretty(self.references),
        }  # fmt: skip
        template = Path(__file__).with_name("baked_template.txt").read_text()
        return re.sub(r"# <(\w+)>|__([A-Z_]+)__", lambda m: replaced[m[1] or m[2]], template)

    def _packages(self) -> dict[str, str]:
        """The optional packages whose kernels the cells run, and their versions."""
        backends = {owners()[kernel]: all_backends()[owners()[kernel]] for cell in self.planned.values() for kernel in cell}
        return {b.library.distribution: b.version() for b in backends.values() if isinstance(b, LibraryBackend)}

    def _memory(self) -> str:
        """How much the weights take, here and loaded: cells that read a weight in several layouts hold it in each."""
        strings = [[n.value for n in ast.walk(ast.parse(e)) if isinstance(n, ast.Constant)] for e in self.globals.values()]
        layouts = Counter(str(first) for first, *_ in strings)  # each expression's first constant is the name of what is stored
        loaded = sum(count * self.weights[name].nbytes for name, count in layouts.items())
        later = sum(self.weights[name].nbytes for name in self.late)
        several = sum(count > 1 for count in layouts.values())
        more = f", {several} of them in more than one layout" if several else ""
        more += f"; {later / 1e6:.1f} MB more once a general cell runs" if later else ""
        planned = "" if self.plan.joint is None else f"\nPlanned with {writing.prose(str(self.plan.joint))}."
        stored = sum(weight.nbytes for weight in self.weights.values())
        return f"Weights: {stored / 1e6:.1f} MB in the file, {loaded / 1e6:.1f} MB in memory{more}.{planned}"

    def _examples(self) -> str:
        """Made-up inputs of each cell, for the self-test: {cell: {input: (shape, dtype, highest integer)}}."""
        found = {}
        for i, cell in enumerate(self.plan.cells):
            sized = export.resized(self.named, self.plan.dynamic, cell.ranges)
            found[i] = {n: (tuple(sized[n].shape), str(sized[n].dtype)[6:], _highest(sized[n])) for n in self.inputs}
        return writing.pretty(found)


def _highest(value: Tensor) -> int:
    return int(value.max()) if not value.is_floating_point() and not value.is_complex() and value.numel() else 1


def read_generated(source: str) -> Body:
    """What Inductor's module for one graph does, without its module-level machinery. PlanError for one that is of another kind."""
    tree = ast.parse(source)
    loops: dict[str, Loop] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "async_compile" in ast.unparse(node.value.func):
            assert isinstance(node.targets[0], ast.Name)
            loops[node.targets[0].id] = _read_loop(node.value)
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "call")
    first = call.body[0]
    names = next((t.elts for t in getattr(first, "targets", ()) if isinstance(t, ast.Tuple)), ())  # none: a graph without inputs
    body = [line[call.col_offset + 4 :] for line in source.splitlines()[first.lineno - (not names) : call.end_lineno]]
    kept = [line for line in body if line.strip() and not DROPPED.match(line.strip())]
    first_stream = next((i for i, line in enumerate(kept) if line.strip() == STREAM), 0)
    kept = [line for i, line in enumerate(kept) if i <= first_stream or line.strip() != STREAM]
    return Body(tuple(ast.unparse(n) for n in names), tuple(kept), loops)


def _read_loop(call: ast.Call) -> Loop:
    kind = ast.unparse(call.func)
    if kind == "async_compile.cpp_pybinding":
        types, text = (ast.literal_eval(a) for a in call.args)
        return Loop("cpp", tuple(types), text)
    if kind == "async_compile.triton":
        name, text = (ast.literal_eval(a) for a in call.args)
        return Loop("triton", (name,), text)
    raise PlanError(f"{kind} in the generated code: only C++ loop nests and Triton kernels can be baked.")


def _unbound(function: str) -> set[str]:
    tree = ast.parse(function)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
    return {n.id for n in names} - bound - set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)


def _comment(cell: CellPlan) -> list[str]:
    """What the cell runs, at which price, and what the clock said."""
    ranges = export.ranges_text(cell.ranges) if cell.ranges else "the planned shapes"
    raced = ", ".join(f"{name} {milliseconds(1e9 * t)}" for name, t in cell.times.items())
    lines = [f"    {ranges}: {cell.winner}" + (f" won the race ({raced})." if raced else ", not raced.")]
    for plan in cell.plans:
        lines.append("")
        lines.append(f"    predicted {milliseconds(plan.predicted)} ({plan.status}, bound {milliseconds(plan.bound)}):")
        for choice in (c for c in plan.choices if c.candidate.kernel != LOOP):
            same = [a for a in choice.alternatives if set(a[0].region.nodes) == set(choice.candidate.region.nodes)]
            other = min(same, key=lambda a: a[1].ns, default=None)
            next_best = f"; next {other[0].kernel} {milliseconds(other[1].ns)}" if other else ""
            node = choice.candidate.region.nodes[-1]
            lines.append(f"    {node}: {choice.candidate.kernel} {milliseconds(choice.cost.ns)} {choice.cost.source}{next_best}")
    text = [writing.prose(line) for line in lines]
    return [f'    """{text[0].strip()}', *text[1:], '    """']


def _blame(cell: CellPlan, made: CompiledCell) -> dict[str, Any]:
    """For each kernel that a cell's plan placed: how the cell calls it, as a regular expression, and what a report says of it."""
    found = {}
    for kernel, names in made.calls.items():
        chosen = [c.candidate for p in cell.plans for c in p.choices if c.candidate.kernel == kernel]
        subjects = dict.fromkeys(circuit.subject(c) for c in chosen if not c.as_is)
        called = "|".join(circuit.pattern(_name_inside(name)) for name in sorted(names))
        if subjects:
            found[kernel] = {"called": called, "failed": [asdict(s) for s in subjects]}
    return found


def _name_inside(called: str) -> str:
    """What a cell calls that Inductor's code calls by this name."""
    written_out = writing.CALLED.fullmatch(f"{called}.default")
    return f"_{written_out[1]}" if written_out else PLAIN.get(f"{called}(", f"{called}(")[:-1]


def _plan_hash(plan: ModelPlan) -> str:
    return digest([(cell.fingerprint, [plan_to_dict(p) for p in cell.plans]) for cell in plan.cells])


def _general_comment(made: CompiledCell) -> list[str]:
    sizes = general.describe(made.program.ranges, made.asked)
    return [f'    """{sizes}: plain ATen calls for sizes beyond the buckets; nothing was planned or priced."""']


def _general_holds(made: CompiledCell) -> dict[str, Any]:
    ranges = {s: [low, None if high == export.ENDLESS else high] for s, (low, high) in made.program.ranges.items()}
    return {"ranges": ranges, "asked": made.asked, "assumed": [], "kernels": ["aten"], "limits": []}


def _check_name(name: str, what: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name in KNOWN or RESERVED.fullmatch(name):
        raise PlanError(f"{what} {name!r} cannot be a name in the generated function. Rename it.")


def _digest(value: Tensor) -> str:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(repr((tuple(value.shape), value.dtype)).encode() + data.tobytes()).hexdigest()[:16]
