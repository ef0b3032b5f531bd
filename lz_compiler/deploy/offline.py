"""Plan a model once for its range of shapes, and run it by that plan: `lz.solve`, and `lz.compile(model, plan=...)`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import reprlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import __version__, backends, torch_private
from ..backend import TIGHTEN, Session, setup
from ..capture import fingerprint
from ..errors import OptionError, PlanError, told, unknown
from ..options import Options
from ..plan_io import DAMAGE, plan_from_dict, plan_to_dict, read_limited, write_whole
from ..planning import DILUTION
from ..problem import CALL, LOOP, VIEW
from ..target import environment
from ..timings import TimingStore, open_store
from ..trust.capabilities import descriptor
from ..types import EAGER, INDUCTOR, LOSSLESS, PLANNED, Plan, Status, Verdict
from . import export
from .export import Argument, Dynamic, Program, Ranges
from .joint import Joint, plan_cells
from .model_fingerprint import check_bundle
from .model_fingerprint import fingerprint as fingerprint_folder

log = logging.getLogger(__name__)

VERSION = 2
CALLS = 60  # at most, until a race is decided
UNCOMPILED = "such calls run the model itself, uncompiled"
WINNERS = (PLANNED, LOSSLESS, INDUCTOR, EAGER)
BACKGROUND = ThreadPoolExecutor(1, "layerzero")  # its thread starts with the first cell that is compiled there


def _forked() -> None:
    """In a child process there is no thread but the one that forked."""
    global BACKGROUND
    BACKGROUND = ThreadPoolExecutor(1, "layerzero")
    torch_private.free_after_fork(export.TRACING)


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True, slots=True)
class CellPlan:
    """What was decided for one box of sizes: the finalist that won on the example (at the upper ends), seconds a call of each,
    and the plan of each graph. `fingerprint` is the exported graph's."""

    ranges: Ranges
    fingerprint: str
    winner: str
    times: Mapping[str, float]
    error: float | None
    plans: tuple[Plan, ...]


@dataclass(frozen=True, slots=True, repr=False)
class ModelPlan:
    """A model's plans over all shape buckets, and the environment for which they hold."""

    model: str
    environment: Mapping[str, str]
    options: Mapping[str, Any]
    dynamic: Mapping[str, Mapping[int, str]]
    buckets: Mapping[str, tuple[int, ...]]
    arguments: tuple[str, ...]
    tensors: tuple[Argument, ...]
    constants: Mapping[str, str]  # what is no tensor among the arguments' leaves, as text: compiled in
    cells: tuple[CellPlan, ...]
    leaves: tuple[str, ...] = ()  # where each leaf of the arguments is (export.paths), in the order of the graphs' placeholders
    written: tuple[str, ...] = ()  # the leaves that some cell writes into: never converted
    bundle: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the model's folder: group -> hash (model_fingerprint)
    joint: Joint | None = None  # where the cells were planned together
    autocast: str = ""  # its dtype, if it was on where the model was traced

    def __repr__(self) -> str:
        return f"<ModelPlan of {self.model}, {len(self.cells)} cells, {self.environment.get('name')}; print(lz.explain(plan)) shows it>"

    @property
    def lowest(self) -> dict[str, int]:
        """Of each symbol: the lowest size that the cells cover."""
        return {symbol: low for symbol, (low, _) in self.cells[0].ranges.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON: whole or not at all."""
        if not isinstance(path, (str, os.PathLike)):
            raise OptionError(f"save takes a file's path; given: {path!r:.200}.")
        data = {"layerzero_model_plan": VERSION, "layerzero": __version__, **dataclasses.asdict(self)}
        data["cells"] = [
            {**dataclasses.asdict(cell), "plans": [plan_to_dict(p) for p in cell.plans]} for cell in self.cells
        ]  # fmt: skip
        data["checksum"] = _checksum(json.loads(json.dumps(data)))  # as it will be read: keys are texts
        target = Path(path)
        if not target.parent.is_dir():
            raise PlanError(f"cannot write the plan to {os.fspath(path)!r}: there is no folder {os.fspath(target.parent)!r}. Make it.")
        if target.is_dir():
            raise PlanError(f"cannot write the plan to {os.fspath(path)!r}, which is a folder. Give a file in it.")
        try:
            write_whole(target, json.dumps(data, indent=1).encode())
        except OSError as error:
            why = error.strerror or error
            raise PlanError(f"cannot write the plan to {os.fspath(path)!r}: {why}. Give a file in a folder that is writable.") from error


def _checksum(data: Mapping[str, Any]) -> str:
    """Of what stands in a plan's file, however it is laid out there."""
    content = {name: value for name, value in data.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_plan(path: str | os.PathLike[str]) -> ModelPlan:
    """Read what `ModelPlan.save` wrote. PlanError for a file that is not one, is damaged, or is of another schema."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"a plan is what lz.solve returned, or the path of a file that its save wrote; given: {path!r:.200}.")
    try:
        data = json.loads(read_limited(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the plan {os.fspath(path)!r}: {error}. Make one: lz.solve(...).save(path), or `lz solve`.") from error
    if not isinstance(data, dict) or "layerzero_model_plan" not in data:
        what = "is not a plan of lz solve: it has no layerzero_model_plan"
        raise PlanError(f"{os.fspath(path)!r} {what}. Make one: lz.solve(...).save(path), or `lz solve`.")
    version = data["layerzero_model_plan"]
    if version != VERSION:
        raise PlanError(f"{os.fspath(path)!r} is a plan of schema {version!r:.80}; this LayerZero reads {VERSION}. Solve again.")
    try:
        same = data.get("checksum", computed := _checksum(data)) == computed  # a plan from before there were checksums has none
        plan = _model_plan(data) if same else None
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"[:1000]
        raise PlanError(f"the plan {os.fspath(path)!r} is damaged ({what}). Solve again.") from error
    if plan is None:
        raise PlanError(f"{os.fspath(path)!r} was changed after it was saved: its contents do not fit its checksum. Solve again.")
    known = {CALL, LOOP, VIEW, *(name for library in backends.all_backends().values() for name in library.kernels)}
    for kernel in sorted({c.candidate.kernel for cell in plan.cells for p in cell.plans for c in p.choices} - known):
        what = f"names kernel {kernel!r:.200}, which is not installed here (lz doctor lists kernels)"
        raise PlanError(f"{os.fspath(path)!r} {what}. Install its package, or solve again.")
    return plan


def _model_plan(data: Mapping[str, Any]) -> ModelPlan:
    cells = tuple(
        CellPlan(
            {str(s): (int(low), int(high)) for s, (low, high) in cell["ranges"].items()}, str(cell["fingerprint"]),
            _winner(cell["winner"]), {str(k): float(v) for k, v in cell["times"].items()},
            None if cell["error"] is None else float(cell["error"]), tuple(plan_from_dict(p) for p in cell["plans"]),
        )
        for cell in data["cells"]
    )  # fmt: skip
    plan = ModelPlan(
        str(data["model"]), {str(k): str(v) for k, v in data["environment"].items()}, dict(data["options"]),
        {str(n): {int(d): str(s) for d, s in dims.items()} for n, dims in data["dynamic"].items()},
        {str(s): tuple(int(e) for e in ends) for s, ends in data["buckets"].items()},
        tuple(map(str, data["arguments"])),
        tuple(map(_argument, data["tensors"])), {str(p): str(c) for p, c in data["constants"].items()}, cells,
        tuple(map(str, data["leaves"])), tuple(map(str, data["written"])), {str(k): str(v) for k, v in data.get("bundle", {}).items()},
        _joint(data.get("joint")), str(data["autocast"]),
    )  # fmt: skip
    _check_fields(plan)
    # Counted first: a few lines of buckets can stand for billions of cells.
    most = math.prod(1 + len(ends) for ends in plan.buckets.values())
    least = math.prod(len(ends) for ends in plan.buckets.values())
    sound = least <= len(plan.cells) <= most and all(1 <= low <= high for c in plan.cells for low, high in c.ranges.values())
    if not sound or [c.ranges for c in plan.cells] != export.cells(plan.buckets, plan.lowest):
        raise PlanError(f"the plan's cells are not those of its buckets {reprlib.repr(dict(plan.buckets))}")
    return plan


def _check_fields(plan: ModelPlan) -> None:
    """ValueError where fields of a stored plan do not fit each other: what runs by it looks one up in another."""
    fields = {f.name for f in dataclasses.fields(Options) if f.metadata["plans"]}
    for name in plan.options.keys() - fields:
        raise PlanError(unknown("option", name, fields))
    if {"mode", "layout_mode", "error_budget", "cudagraphs"} - plan.options.keys():
        raise ValueError(f"options are {reprlib.repr(sorted(plan.options))}, and some are missing")
    Options(**{name: value for name, value in plan.options.items() if name != "cost_model"})  # whose package need not be here to read it
    dims = [(name, dim, symbol) for name, named in plan.dynamic.items() for dim, symbol in named.items()]
    for name, dim, symbol in dims:
        if name not in plan.arguments or dim < 0 or symbol not in plan.buckets:
            raise ValueError(f"dynamic: dimension {dim} of {name!r:.200} is called {symbol!r:.200}")
    tensors = [path for path in plan.leaves if path not in plan.constants]
    known = {*plan.leaves}
    if len(tensors) != len(plan.tensors) or not {*plan.constants, *plan.written} <= known or len(known) < len(plan.leaves):
        raise ValueError("leaves, tensors, constants and written do not fit each other")
    sizes = [size for tensor in plan.tensors for size in tensor.shape]
    if sizes.count(-1) != len(dims) or {symbol for _, _, symbol in dims} != plan.buckets.keys() or min(sizes, default=0) < -1:
        raise ValueError("dynamic, buckets and the tensors' sizes do not fit each other")
    for tensor in plan.tensors:
        if sorted(tensor.order) != list(range(len(tensor.shape))):
            raise ValueError(f"a tensor with {len(tensor.shape)} dimensions in the order {reprlib.repr(tensor.order)}")
    for ends in plan.buckets.values():
        if not ends or ends[0] < 1 or sorted(set(ends)) != list(ends):
            raise ValueError(f"the upper ends {reprlib.repr(ends)}")


def _joint(data: Mapping[str, Any] | None) -> Joint | None:
    if data is None:
        return None
    weights, objective, bound, separate = (int(data[name]) for name in ("weights", "objective", "bound", "separate"))
    return Joint(weights, objective, bound, separate, Status(data["status"]), str(data["solver"]))


def _argument(data: Mapping[str, Any]) -> Argument:
    dtype, device = data["dtype"], data["device"]
    if not isinstance(vars(torch).get(dtype), torch.dtype) or device not in ("cpu", "cuda"):
        raise PlanError(f"no tensor is {dtype!r} on {device!r}")
    return Argument(dtype, device, tuple(map(int, data["shape"])), tuple(map(int, data["order"])))


def _winner(name: str) -> str:
    if name not in WINNERS:
        raise PlanError(unknown("winner", name, WINNERS))
    return name


def solve(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
    buckets: Mapping[str, Sequence[int]] | None = None, dynamic: Dynamic | None = None, at_least: Mapping[str, int] | None = None,
    bundle: str | os.PathLike[str] | None = None, one_format: bool = True, **options: Any,
) -> ModelPlan:  # fmt: skip
    """Plan a model's inference for ranges of shapes, and race the plans on the given arguments.

    `dynamic` names the dimensions that vary, as in torch.export: {argument: {dimension: symbol}}; `buckets` gives each symbol's
    upper ends, the first bucket starting at `at_least` of the symbol, 1 if not given. A cell (one bucket of each symbol) is planned and
    raced at its upper ends.
    `bundle` is the model's folder, whose tokenizer and config the plan is then for (`lz.fingerprint`). With `freeze`, the cells are one
    integer program in which each weight has one format (`deploy.joint`); `one_format=False`: each cell packs as suits it.

    Returns the plan of all cells, for `save`, `lz.compile(model, plan=...)` and `lz.bake`.

    OptionError for a wrong option, or what is no module. PlanError for arguments that do not fit the model or the ranges, and for a model
    that cannot be traced, compiled or held in memory for all of them; FingerprintError for a bundle that has no fingerprint.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"solve takes an nn.Module; given: {type(model).__name__}. Wrap it in a module whose forward calls it.")
    forms = {"buckets": "{symbol: [upper ends]}", "dynamic": "{argument: {dimension: symbol}}", "at_least": "{symbol: lowest size}"}
    for given, (name, form) in zip((buckets, dynamic, at_least), forms.items(), strict=True):
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"{name} is {given!r:.200}. Give a dict: {name}={form}.")
    folder = {} if bundle is None else fingerprint_folder(bundle).digests()
    chosen = Options.resolve(options)
    backends.check_names(chosen)
    named, buckets, dynamic = export.bind(model, args, kwargs), dict(buckets or {}), dict(dynamic or {})
    if not isinstance(one_format, bool):
        raise OptionError(f"one_format is {one_format!r}. Give True or False.")
    export.check_dynamic(named, dynamic, buckets, at_least or {})
    export.check_mode(model)
    leaves = dict(zip(export.paths(pytree.tree_structure(named)), pytree.tree_leaves(named), strict=True))
    export.check_tensors(model, leaves)
    tensors = {path: Argument.of(leaf, dynamic.get(path, ())) for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    setup()
    store, boxes, dilution = open_store(chosen.cache_dir), export.cells(buckets, at_least or {}), DILUTION
    for ranges in boxes:
        export.check_memory(named, dynamic, ranges)
    for left in reversed(range(1 + TIGHTEN)):
        joint = chosen.freeze and one_format and len(boxes) > 1
        solved, sessions, state, written, result = _solved(model, named, dynamic, boxes, chosen, store, dilution, joint)
        over = [s.dilution for s in sessions if (s.record.error or 0.0) > chosen.error_budget and s.dilution > dilution]
        if not over or not left:
            break
        dilution = max(over)
        log.info("planning anew: measured errors were %.1f times the estimate", dilution / DILUTION)
    changing = {name for _, some in state for name in some}
    for read, some in state:
        if chosen.freeze and changing & read - some:
            names = ", ".join(sorted(changing & read - some))
            raise PlanError(f"freeze=True, but {names} is written for some sizes and taken as constant for others. Solve without freeze.")
    return ModelPlan(
        type(model).__qualname__, _environment(sessions[0].device), chosen.as_data(), {n: dict(d) for n, d in dynamic.items()},
        {s: tuple(ends) for s, ends in buckets.items()}, tuple(named), tuple(tensors.values()),
        {path: repr(leaf) for path, leaf in leaves.items() if path not in tensors}, tuple(solved), tuple(leaves),
        tuple(path for i, path in enumerate(leaves) if path in tensors and any(w is None or i in w for w in written)),
        folder, result, _autocast(sessions[0].device),
    )  # fmt: skip


def _solved(
    model: nn.Module, named: Mapping[str, Any], dynamic: Dynamic, boxes: Sequence[Ranges], options: Options,
    store: TimingStore, dilution: float, joint: bool,
) -> tuple[list[CellPlan], list[Session], list[tuple[set[str], set[str]]], list[set[int] | None], Joint | None]:  # fmt: skip
    """Each cell planned and raced; its session; the buffers that it reads, and those of them that it writes into; which of the arguments'
    leaves it writes into (None: unknown)."""
    plans: list[list[Plan]] = [[] for _ in boxes]
    result = None
    if joint:
        plans, result = _jointly((export.export_program(model, named, dynamic, ranges) for ranges in boxes), options, store, dilution)
    solved, sessions, state = [], [], []
    changed: list[set[int] | None] = []
    for ranges, decided in zip(boxes, plans, strict=True):
        program = export.export_program(model, named, dynamic, ranges)  # anew: names in a second trace of the same can differ
        traced = fingerprint(program.gm)
        session = session_for(program, options, store, decided, dilution)
        run, written, _ = compile_cell(session, program)
        kept = [name if weight is not None else "" for name, weight in zip(program.names, program.weights, strict=True)]
        export.check_memory_of_its_own(program, written)
        places = [i for i, weight in enumerate(program.weights) if weight is None]
        changed.append(None if written is None else {leaf for leaf, i in enumerate(places) if i in written})
        if written is not None:
            state.append(({*kept} - {""}, {kept[i] for i in written} - {""}))
        with export.example_runs(ranges):
            _race(session, run, written, _flat(program, pytree.tree_leaves(export.resized(named, dynamic, ranges))))
        record = session.record
        solved.append(CellPlan(ranges, traced, record.winner, record.times, record.error, tuple(record.plans)))
        sessions.append(session)
        log.info("solved %s: %s", ranges, record.winner)
    return solved, sessions, state, changed, result


def _jointly(programs: Iterable[Program], options: Options, store: TimingStore, dilution: float) -> tuple[list[list[Plan]], Joint | None]:
    """The plans of each program, with an error budget the lossless one too; and what all of them together are."""
    options = dataclasses.replace(options, any_rows=True)
    posed = []
    for program in programs:
        with torch_private.compile_lock(), torch.no_grad(), torch_private.tracing_like(program.gm.graph):
            posed.append(session_for(program, options, store, dilution=dilution).pose())
    if not all(posed):  # a graph without an operator has nothing to plan
        return [[] for _ in posed], None
    made = [plan_cells(cells, options) for cells in zip(*posed, strict=True)]  # for each budget
    return [list(plans) for plans in zip(*(plans for plans, _ in made), strict=True)], made[0][1]


def followed_options(plan: ModelPlan, given: Mapping[str, Any]) -> Options:
    """The plan's options and the given ones. PlanError where one that decides plans is another, but for a cost model that was an object:
    it is not in the file, and a plan that is followed prices nothing."""
    planned = {name: value for name, value in plan.options.items() if name != "cost_model" or ":" not in str(value)}
    mode = planned.pop("mode")
    if os.environ.get("LAYERZERO_LAYOUT_MODE", "").strip():  # what a call does with other layouts is where it runs to say
        del planned["layout_mode"]
    options = Options.resolve({**planned, **given}, mode)
    free = {"layout_mode"} | ({"cost_model"} - planned.keys() - given.keys())
    for name, value in options.as_data().items():
        if value != plan.options.get(name) and name not in free:
            raise PlanError(f"option {name!r} is {value!r}, but the plan was solved with {plan.options.get(name)!r}. Solve again.")
    return options


def session_for(program: Program, options: Options, store: TimingStore, plans: Sequence[Plan] = (), dilution: float = DILUTION) -> Session:
    real = [(w, w is not None) for w in program.weights]
    device = "cuda" if any(isinstance(v, Tensor) and v.is_cuda for v in program.inputs) else "cpu"
    with torch.no_grad():
        return Session(program.gm, program.inputs, options, store, device, real, plans=plans, dilution=dilution)


def compile_cell(
    session: Session, program: Program, cell: CellPlan | None = None, winner: str | None = None
) -> tuple[Callable[..., Any], tuple[int, ...] | None, bool]:
    """The compiled graph, which of its inputs it writes into (None: unknown), and whether an output is a view.

    With a `cell`, its plan is followed, and its winner unless another is given. PlanError where the code holds for a part of the
    program's sizes only.
    """
    verdict = None if cell is None else Verdict(winner or cell.winner, tuple(cell.plans), cell.times, cell.error)
    with torch_private.compile_lock(), torch.no_grad(), torch_private.tracing_like(program.gm.graph):
        try:
            run = session.compile(verdict)
        except torch_private.lowering_errors() as error:
            raise PlanError(f"TorchInductor cannot compile the graph for {export.ranges_text(program.ranges)}: {told(error)}") from error
        found = torch_private.written_inputs(len(program.inputs))
        written = session.written if found is None else found  # an earlier verdict's, where nothing was compiled
        aliased = torch_private.aliased_outputs()
    export.check_sizes(program)
    return run, written, aliased


def _flat(program: Program, leaves: Iterable[Any]) -> list[Any]:
    """A call's values in the order of the graph's placeholders."""
    given = iter(leaves)
    return [next(given) if w is None else w for w in program.weights]


def _race(session: Session, run: Callable[..., Any], written: Sequence[int] | None, inputs: list[Any]) -> None:
    """Call until the race is decided, each time on copies of what the model writes into."""
    racing = session.options.race and not session.options.deterministic
    with torch.no_grad():
        for _ in range(CALLS if racing else 1):
            run(*[v.clone() if (written is None or i in written) and isinstance(v, Tensor) else v for i, v in enumerate(inputs)])
            if session.record.decided:
                return


class PlannedModel(nn.Module):
    """A model that runs by a stored plan: one compiled graph for each cell, compiled when its first call comes; never planned.

    That call waits, which the log says; with the option `compile_in_background` it waits for the trace only.
    Inference only: no gradient flows, and weights are those of a cell's first call. `adapted` counts inputs that were
    converted, and calls outside of the plan, by case.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, options: Mapping[str, Any], bundle: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        check_environment(plan)
        self.model, self.plan = model, plan
        self.options = followed_options(plan, options)
        check_bundle(plan.bundle, bundle, strict=self.options.layout_mode == "strict")
        self.adapted: dict[str, int] = {}
        self._cells: dict[int, tuple[Program, Callable[..., Any]]] = {}
        self._building: dict[int, tuple[int, Future[Callable[..., Any]]]] = {}  # cell -> process that compiles it, and its result
        if self.options.compile_in_background and self.options.graphs:
            raise OptionError("compile_in_background: CUDA graphs belong to the thread that makes them. Use lz.warmup, or leave them out.")
        setup()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = export.flattened(export.bind(self.model, args, kwargs, self.plan.arguments), self.plan.leaves)
        self._check(leaves)
        other = other_autocast(self.plan)
        if other:
            self._adapt(other, UNCOMPILED)
        index = None if other else self._cell(leaves)
        if index is None or not self._fit(leaves):
            return self._uncompiled(*args, **kwargs)
        if self._building:
            self._collect()
        if index not in self._cells and not self._prepare(index, pytree.tree_unflatten(leaves, spec)):
            return self._uncompiled(*args, **kwargs)
        program, run = self._cells[index]
        with torch.no_grad():
            outputs = run(*_flat(program, leaves))
        return pytree.tree_unflatten(outputs, program.out_spec)

    def _uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        with export.TRACING, torch.no_grad():  # while another thread traces it, its weights are fake
            return self.model(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlannedModel:
        """`to`, `half` and the like: compiled code would read the new weights as the old ones, so cells are traced, and compared, anew."""
        self.wait()
        self._cells.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what is compiled reads this model's weights, so a copy compiles its own in its first calls."""
        return {**self.__dict__, "_cells": {}, "_building": {}}

    def wait(self) -> None:
        """Wait for the cell that compiles in the background, if there is one; raises what went wrong there."""
        self._collect(wait=True)

    def _collect(self, wait: bool = False) -> None:
        """Take over what was compiled in the background."""
        for index, (process, building) in list(self._building.items()):
            if process != os.getpid():  # forked meanwhile, without the thread that compiles: traced anew
                self._building.pop(index, None)
                self._cells.pop(index, None)
            elif wait or building.done():
                self._cells[index] = self._cells[index][0], building.result()
                if self._building.pop(index, None):  # of several threads that come here at once, one tells
                    sizes = export.ranges_text(self.plan.cells[index].ranges)
                    log.warning("the plan's cell for %s is compiled: calls run it from now on", sizes)

    def _check(self, leaves: Sequence[Any]) -> None:
        """PlanError for another constant, or a tensor with another number of dimensions."""
        planned = iter(self.plan.tensors)
        for path, leaf in zip(self.plan.leaves, leaves, strict=True):
            expected = self.plan.constants.get(path)
            if expected is None:
                shape = next(planned).shape
                if isinstance(leaf, Tensor) and leaf.dim() == len(shape):
                    continue
                expected = f"a tensor of sizes {shape}{' (-1 varies)' if -1 in shape else ''}"
            elif not isinstance(leaf, Tensor) and repr(leaf) == expected:
                continue
            given = f"a tensor of sizes {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"{leaf!r:.200}"
            raise PlanError(f"{path} is {given}; the plan is for {expected}. Solve again for another.")

    def _cell(self, leaves: Sequence[Any]) -> int | None:
        sizes: dict[str, int] = {}
        for path, leaf in zip(self.plan.leaves, leaves, strict=True):
            for dim, symbol in self.plan.dynamic.get(path, {}).items():
                size = int(leaf.shape[dim])
                if sizes.setdefault(symbol, size) != size:
                    raise PlanError(f"{symbol!r} is {sizes[symbol]} in one argument and {size} in {path!r} (dimension {dim}).")
        found = next(export.covering([c.ranges for c in self.plan.cells], sizes), None)
        if found is None:
            lowest = self.plan.lowest
            ends = ", ".join(f"{s} {lowest[s]}..{e[-1]}" for s, e in self.plan.buckets.items())
            given = ", ".join(f"{s}={n}" for s, n in sizes.items())
            beyond = ", ".join(s for s, n in sizes.items() if not lowest[s] <= n <= self.plan.buckets[s][-1])
            self._adapt(f"{given} is outside of the plan ({ends})", UNCOMPILED, f"{beyond} outside of the plan")
        return found

    def _prepare(self, index: int, named: Mapping[str, Any]) -> bool:
        """Compile a cell for its first call, or have that done in the background; the log says how long the call waited.

        False, and nothing is done, where that is to be in the background but something else compiles: torch traces one at a time.
        """
        cell, background, start = self.plan.cells[index], self.options.compile_in_background, time.perf_counter()
        sizes = export.ranges_text(cell.ranges)
        if not background:
            log.warning("compiling the plan's cell for %s in this call; lz.warmup does so ahead of time", sizes)
        if not export.begin_tracing(blocking=not background):
            return False
        try:
            try:
                if index in self._cells:
                    return True  # another thread has done it
                program = export.export_program(self.model, named, self.plan.dynamic, cell.ranges)
            finally:
                export.TRACING.release()
            if fingerprint(program.gm) != cell.fingerprint:
                what = f"this {type(self.model).__name__}{', in training mode,' * self.model.training} is not the one that was planned"
                raise PlanError(f"{what}: another graph. Solve again.")
            self._cells[index] = program, program.gm.forward if background else self._compiled(program, cell)
            if background:
                self._building[index] = os.getpid(), BACKGROUND.submit(self._compiled, program, cell)
        finally:
            torch_private.compile_lock().release()
        what = "is traced, and compiles in the background while calls run its graph" if background else "is compiled"
        log.warning("the plan's cell for %s %s: this call waited %.1f s", sizes, what, time.perf_counter() - start)
        return True

    def _compiled(self, program: Program, cell: CellPlan) -> Callable[..., Any]:
        dtype = getattr(torch, self.plan.autocast) if self.plan.autocast else None
        cast = torch.autocast(self.plan.environment["device"], dtype, enabled=dtype is not None)  # a thread has its own
        with torch_private.compile_lock(), cast:
            session = session_for(program, self.options, open_store(self.options.cache_dir))
            return compile_cell(session, program, cell)[0]

    def _fit(self, leaves: list[Any]) -> bool:
        """Convert leaves to the dtype, device and dimension order in which they were planned; False where a size is another."""
        places = [i for i, path in enumerate(self.plan.leaves) if path not in self.plan.constants]
        if not all(p.fits(leaves[i]) for i, p in zip(places, self.plan.tensors, strict=True)):
            given, expected = [tuple(leaves[i].shape) for i in places], [planned.shape for planned in self.plan.tensors]
            what = f"the plan is for tensors of sizes {expected} (-1 varies); given: {given}"
            self._adapt(what, UNCOMPILED, "sizes that do not vary in the plan")
            return False
        for i, planned in zip(places, self.plan.tensors, strict=True):
            why = planned.misfit(leaves[i])
            if why:
                path = self.plan.leaves[i]
                if path in self.plan.written:
                    raise PlanError(f"{path} {why}. The model writes into it, so that it cannot be converted: give it as it was planned.")
                self._adapt(f"{path} {why}", planned.copied(leaves[i]))
                leaves[i] = planned.converted(leaves[i])
        return True

    def _adapt(self, what: str, effect: str, case: str = "") -> None:
        """An error in strict, else a warning, one for each case (`what` if not given), which is counted."""
        case = case or what
        if self.options.layout_mode == "strict":
            raise PlanError(f"{what}. Give what was planned, or compile with layout_mode='adapt'.")
        if case not in self.adapted:
            warnings.warn(f"LayerZero: {what}: {effect}", stacklevel=6)
        self.adapted[case] = self.adapted.get(case, 0) + 1


def _autocast(device: str) -> str:
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else ""


def other_autocast(plan: ModelPlan) -> str:
    """How autocast differs from when the plan was solved, which decides what the model computes; empty if it does not."""
    here = _autocast(plan.environment["device"])
    return "" if here == plan.autocast else f"autocast is {here or 'off'}, and the plan was solved with it {plan.autocast or 'off'}"


def _environment(device: str) -> dict[str, str]:
    """The device's, and a hash of what its libraries' descriptors claim."""
    libraries = [library for library in backends.all_backends().values() if device in library.devices]
    claims = [(library.name, library.version(), known.digest if (known := descriptor(library)) else "") for library in libraries]
    return {**environment(device), "capabilities": hashlib.sha256(repr(sorted(claims)).encode()).hexdigest()[:16]}


def check_environment(plan: ModelPlan) -> None:
    """PlanError on another device or torch, a warning where another library could change a price."""
    device = plan.environment.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"the plan is for the GPU {plan.environment.get('name')!r}, and here torch finds no GPU. Solve again here.")
    here = _environment(device)
    for name in ("device", "name", "torch"):
        if here.get(name) != plan.environment.get(name):
            raise PlanError(f"the plan is for {name} {plan.environment.get(name)!r}, here it is {here.get(name)!r}. Solve again here.")
    other = {k: (v, here.get(k)) for k, v in plan.environment.items() if here.get(k) != v}
    if other:
        told = ", ".join(f"{k} {given!r}, here {found!r}" for k, (given, found) in other.items())
        warnings.warn(f"LayerZero: the plan was solved with {told}: it is right here too, perhaps not the fastest", stacklevel=4)
