"""A model as graphs with a fixed signature: one torch.export program for each cell of its declared shape ranges."""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import torch_private
from ..errors import LayerZeroError, OptionError, PlanError, told, unknown

Ranges = dict[str, tuple[int, int]]  # symbol -> lowest and highest size, both included
ENDLESS = 1 << 62  # a range's upper end where there is none
Dynamic = Mapping[str, Mapping[int, str]]  # argument -> dimension -> symbol
# What a model raises for sizes or arguments that it does not allow.
RAISED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
TRACING = threading.RLock()  # around torch.export, which puts fake tensors into the model meanwhile, and around calls of a model itself


@dataclass(frozen=True, slots=True)
class Program:
    """A graph of ATen operators, written ones among them, whose placeholders are the model's weights, then its arguments' leaves.

    `weights` runs parallel to the placeholders, with None for an argument; so do their names in the model, and `inputs`, the
    placeholders' fake values.
    """

    gm: fx.GraphModule
    weights: tuple[Tensor | None, ...]
    names: tuple[str, ...]
    inputs: list[Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    symbols: Mapping[tuple[int, int], str]  # (which of the arguments' leaves, dimension) -> what varies there
    ranges: Ranges

    @property
    def arguments(self) -> list[Any]:
        """The fake values of the arguments' leaves."""
        return [value for value, weight in zip(self.inputs, self.weights, strict=True) if weight is None]


def cells(buckets: Mapping[str, Sequence[int]], at_least: Mapping[str, int]) -> list[Ranges]:
    """The boxes into which upper ends cut the sizes, from a symbol's lowest (1 if not given) on. Size 1 is a cell of its own: torch.export
    compiles it in."""
    axes: list[list[tuple[str, tuple[int, int]]]] = []
    for symbol, ends in buckets.items():
        low, axis = at_least.get(symbol, 1), []
        for high in ends:
            axis += [(symbol, (1, 1))] if low == 1 < high else []
            low = 2 if low == 1 < high else low
            axis.append((symbol, (low, high)))
            low = high + 1
        axes.append(axis)
    return [dict(box) for box in itertools.product(*axes)]


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, planned: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the model's signature; those left at a default that is a plain constant, too.

    In the order of a plan's arguments where these are given: PlanError for others.
    """
    if not isinstance(args, (tuple, list)):  # a tensor would be taken row by row
        raise PlanError(f"args is {type(args).__name__}. Give a tuple of the arguments: (x,).")
    if not isinstance(kwargs, (dict, Mapping, type(None))):
        raise PlanError(f"kwargs is {type(kwargs).__name__}. Give a dict of the arguments: {{name: x}}.")
    signature = inspect.signature(model.forward)
    try:
        given = signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        what = "Give example arguments" if planned is None else "Call it as the model is called"
        raise PlanError(f"the arguments do not fit {type(model).__name__}.forward: {error}. {what}.") from error
    explicit = set(given.arguments)
    given.apply_defaults()
    bound = {name: v for name, v in given.arguments.items() if name in explicit or _kept(signature.parameters[name])}
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise PlanError(f"argument {name!r} of {type(model).__name__}.forward has no name to plan by. Wrap the model.")
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    if planned is None:
        return named
    if named.keys() != set(planned):
        raise PlanError(f"arguments given: {', '.join(named) or 'none'}; the plan is for: {', '.join(planned)}.")
    return {name: named[name] for name in planned}


def _kept(parameter: inspect.Parameter) -> bool:
    """Whether a parameter that was left at its default is an argument of the plan."""
    by_name = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return by_name and isinstance(parameter.default, (int, float, bool, str, type(None)))


def check_mode(model: nn.Module) -> None:
    """Warns of a model in training mode: what it does then is what is planned."""
    if model.training:
        what = f"{type(model).__name__} is in training mode: dropout and batch norms are planned as they are in training"
        warnings.warn(f"LayerZero: {what}. Call model.eval() first, unless that is what you want", stacklevel=3)


def check_tensors(model: nn.Module, leaves: Mapping[str, Any]) -> None:
    """PlanError for a tensor among the arguments' leaves or the weights that no plan can be for."""
    with TRACING:  # while another thread traces it, its weights are fake
        found = [*leaves.items(), *model.named_parameters(), *model.named_buffers()]
    for name, value in found:
        if isinstance(value, Tensor) and (value.layout is not torch.strided or value.device.type not in ("cpu", "cuda")):
            raise PlanError(f"{name} is {value.layout} on {value.device}; plans are for torch.strided tensors on cpu or cuda. Convert it.")


def paths(spec: pytree.TreeSpec, path: str = "") -> Iterator[str]:
    """Where each leaf of the arguments is, as `x`, `pair[0]` or `cache['sum']`."""
    if spec.is_leaf():
        yield path
        return
    of_dict = spec.type in (dict, OrderedDict)
    kind = "" if of_dict or spec.type in (list, tuple) else f".{spec.type.__name__}({spec.context!r})"
    for key, child in zip(spec.context if of_dict else itertools.count(), spec.children(), strict=False):
        yield from paths(child, f"{path}{kind}[{key!r}]" if path else key)


def flattened(named: Mapping[str, Any], planned: Sequence[str]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments in the planned order, whatever the order of a dict's keys is, and their structure. PlanError for
    another structure."""
    leaves, spec = pytree.tree_flatten(dict(named))
    found = tuple(paths(spec))
    if found == tuple(planned):
        return leaves, spec
    given, expected = [[path for path in some if path not in others] for some, others in ((found, planned), (planned, found))]
    if given or expected:
        what, planned_here = (", ".join(some) or "less" for some in (given, expected))
        raise PlanError(f"the arguments hold {what}; the plan is for {planned_here} there. Solve again for another structure.")
    return pytree.tree_flatten({name: _ordered(value, planned, name) for name, value in named.items()})


def _ordered(value: Any, planned: Sequence[str], path: str) -> Any:
    """The same with the keys of its dicts in the planned order."""
    if type(value) in (list, tuple):
        return type(value)(_ordered(part, planned, f"{path}[{i}]") for i, part in enumerate(value))
    if type(value) not in (dict, OrderedDict):
        return value
    place = {key: next((i for i, p in enumerate(planned) if p.startswith(f"{path}[{key!r}]")), 0) for key in value}
    return type(value)((key, _ordered(value[key], planned, f"{path}[{key!r}]")) for key in sorted(value, key=place.__getitem__))


def check_dynamic(named: Mapping[str, Any], dynamic: Dynamic, buckets: Mapping[str, Sequence[int]], at_least: Mapping[str, int]) -> None:
    """PlanError for a declaration that does not fit the arguments or itself."""
    for name, dims in dynamic.items():
        if not isinstance(named.get(name), Tensor):
            raise PlanError("dynamic: " + unknown("tensor argument", name, [n for n, v in named.items() if isinstance(v, Tensor)]))
        if not isinstance(dims, Mapping):
            raise OptionError(f"dynamic: {name!r} is {dims!r:.200}. Give its dimensions by name: dynamic={{{name!r}: {{0: symbol}}}}.")
        for dim, symbol in dims.items():
            if not _whole(dim) or not 0 <= dim < named[name].dim():
                held = f"dimensions 0 to {named[name].dim() - 1}" if named[name].dim() else "no dimension"
                raise PlanError(f"dynamic: {name!r} has {held}, given: {dim!r}.")
            if not isinstance(symbol, str) or not symbol.isidentifier():
                what = f"dynamic: dimension {dim} of {name!r} is called {symbol!r}, which cannot be a name"
                raise PlanError(f"{what}. Give letters, digits and underscores.")
            if symbol not in buckets:
                given = f", given: {', '.join(map(repr, buckets))}" if buckets else ""
                raise PlanError(f"dynamic: symbol {symbol!r} has no buckets{given}. Give buckets={{{symbol!r}: [upper ends]}}.")
    for symbol, ends in buckets.items():
        if symbol not in {s for dims in dynamic.values() for s in dims.values()}:
            raise PlanError(
                f"buckets: no dimension is called {symbol!r}. Say which one is: dynamic={{argument: {{dimension: {symbol!r}}}}}."
            )
        if not isinstance(ends, (list, tuple)):
            raise OptionError(f"buckets: {symbol!r} is {ends!r}. Give a list of upper ends: buckets={{{symbol!r}: [{ends!r}]}}.")
        if not ends or any(not _whole(e) or e < 1 for e in ends) or sorted(set(ends)) != list(ends):
            raise PlanError(f"buckets: {symbol!r} is {list(ends)!r}. Give upper ends: positive integers that grow.")
    for symbol, low in at_least.items():
        if symbol not in buckets:
            raise PlanError("at_least: " + unknown("symbol", symbol, buckets))
        if not _whole(low) or not 1 <= low <= buckets[symbol][0]:
            raise PlanError(
                f"at_least: {symbol!r} is {low!r:.200}. Give its lowest size: 1 to {buckets[symbol][0]}, where its first bucket ends."
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Argument:
    """How one tensor among the arguments was planned: dtype, device type, sizes (-1: dynamic), and its dimensions from the
    outermost in memory on."""

    dtype: str
    device: str
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(value: Tensor, dynamic: Container[int] = ()) -> Argument:
        strides, shape = value.stride(), tuple(-1 if dim in dynamic else size for dim, size in enumerate(value.shape))
        found, order = None, _by_stride(strides)
        while order != found:  # with dimensions of size 1, a dense tensor's strides can stand for another order
            found, order = order, _by_stride(torch.empty_permuted(value.shape, order, device="meta").stride())
        return Argument(str(value.dtype).removeprefix("torch."), value.device.type, shape, order)

    def fits(self, value: Tensor) -> bool:
        return value.dim() == len(self.shape) and all(p in (-1, n) for p, n in zip(self.shape, value.shape, strict=True))

    def misfit(self, value: Tensor) -> str:
        """How a tensor differs from what was planned, the same for all sizes; empty if it does not."""
        if str(value.dtype) != f"torch.{self.dtype}":
            return f"is {value.dtype}, planned as torch.{self.dtype}"
        if value.device.type != self.device:
            return f"is on {value.device}, planned on {self.device}"
        if dense(value, self.order):
            return ""
        order = Argument.of(value).order
        found = f"has its dimensions in the order {order}" if dense(value, order) else "is not dense"
        return f"{found}, planned as dense with its dimensions in the order {self.order}"

    def copied(self, value: Tensor) -> str:
        """What converting a tensor moves."""
        nbytes = value.numel() * getattr(torch, self.dtype).itemsize
        return f"it is converted in every call, which writes {nbytes:,} bytes for {tuple(value.shape)} with strides {value.stride()}"

    def converted(self, value: Tensor) -> Tensor:
        """`value` as planned: dense, and itself if it is so already."""
        if not self.misfit(value):
            return value
        return torch.empty_permuted(value.shape, self.order, dtype=getattr(torch, self.dtype), device=self.device).copy_(value)


def _by_stride(strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)))


def dense(value: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor has no gaps and its dimensions in this order in memory; one of size 1 takes no step."""
    step = 1
    for dim in reversed(order):
        if value.shape[dim] != 1 and value.stride(dim) != step:
            return False
        step *= max(value.shape[dim], 1)
    return True


def check_memory(named: Mapping[str, Any], dynamic: Dynamic, ranges: Ranges, sizes: Mapping[str, int] | None = None) -> None:
    """PlanError for a cell whose example at its upper ends, or at `sizes`, is larger than the memory that is free."""
    ends = sizes or {s: high for s, (_, high) in ranges.items()}
    need: dict[str, int] = {}
    for name, dims in dynamic.items():
        value: Tensor = named[name]
        shape = [ends[dims[dim]] if dim in dims else size for dim, size in enumerate(value.shape)]
        need[value.device.type] = need.get(value.device.type, 0) + math.prod(shape) * value.element_size()
    for device, nbytes in need.items():
        free = torch_private.free_memory(device)
        if free is not None and nbytes > free:
            raise PlanError(_too_large(ranges, f"its inputs alone need {nbytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"))


def _too_large(ranges: Ranges, why: str) -> str:
    return f"cell {ranges_text(ranges)} does not fit in memory ({why}): lower the last end."


@contextmanager
def in_memory(ranges: Ranges) -> Iterator[None]:
    """PlanError where the memory ends while a cell is made or run."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not torch_private.out_of_memory(error):
            raise
        raise PlanError(_too_large(ranges, f"{type(error).__name__}: {str(error)[:300]}")) from error


@contextmanager
def example_runs(ranges: Ranges) -> Iterator[None]:
    """PlanError where the model does not run with the example's values at a cell's sizes."""
    try:
        with in_memory(ranges):
            yield
    except LayerZeroError:
        raise
    except torch_private.run_errors() as error:
        what = f"the model does not run with the example's values at {ranges_text(ranges)}: {told(error)}"
        hint = "A cell runs at its upper ends, with these values cut or repeated: indices and lengths among them have to fit the smallest"
        raise PlanError(f"{what}. {hint}.") from error


def resized(named: Mapping[str, Any], dynamic: Dynamic, ranges: Ranges, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The arguments at the upper ends of a cell, or at `sizes`: made of their own values (again from the first one where they end), dense,
    and without gradients."""
    check_memory(named, dynamic, ranges, sizes)
    with in_memory(ranges):
        return _resized(named, dynamic, sizes or {s: high for s, (_, high) in ranges.items()})


def _resized(named: Mapping[str, Any], dynamic: Dynamic, sizes: Mapping[str, int]) -> dict[str, Any]:
    made = pytree.tree_map_only(Tensor, lambda t: Argument.of(t).converted(t.detach() if t.requires_grad else t), dict(named))
    for name, dims in dynamic.items():
        for dim, symbol in dims.items():
            value: Tensor = made[name]
            if value.shape[dim] == 0:
                raise PlanError(f"dimension {dim} of the example {name!r} is empty. Give an example with values.")
            if value.shape[dim] != sizes[symbol]:
                longer = value.index_select(dim, torch.arange(sizes[symbol], device=value.device) % value.shape[dim])
                made[name] = Argument.of(value).converted(longer)
    return pytree.tree_map_only(Tensor, _plain_steps, made)


def _plain_steps(value: Tensor) -> Tensor:
    """A dense tensor with the strides of a new one: a dimension of size 1 may have any, and the graph would tell them apart."""
    return value.as_strided(value.shape, torch.empty_permuted(value.shape, Argument.of(value).order, device="meta").stride())


def begin_tracing(blocking: bool = True) -> bool:
    """Take TRACING and torch's compile lock, both to be released. Waits for neither while it holds the other: compiling takes long, and a
    call of a model may compile a part of it."""
    lock = torch_private.compile_lock()
    while TRACING.acquire(blocking):
        if lock.acquire(blocking=False):
            return True
        TRACING.release()
        if not blocking:
            break
        with lock:
            pass
    return False


@contextmanager
def _tracing() -> Iterator[None]:
    begin_tracing()
    try:
        yield
    finally:
        torch_private.compile_lock().release()
        TRACING.release()


def export_program(
    model: nn.Module, named: Mapping[str, Any], dynamic: Dynamic, ranges: Ranges, sizes: Mapping[str, int] | None = None
) -> Program:
    """The model on one cell, traced at the upper ends of its ranges, or at `sizes`. No gradient. PlanError where torch.export cannot.

    A range without an end becomes the one that the model allows, which may be a single size.
    """
    from torch.export import Dim, ShapesCollection, export

    ranged = {s: Dim.AUTO if high == ENDLESS else Dim(s, min=low, max=high) for s, (low, high) in ranges.items() if low < high}
    example = _apart(model, resized(named, dynamic, ranges, sizes))
    shapes = ShapesCollection()
    for name, dims in dynamic.items():
        shapes[example[name]] = {dim: ranged[s] for dim, s in dims.items() if s in ranged}
    try:
        with _tracing(), torch.no_grad():
            declared = shapes.dynamic_shapes(model, (), example) if ranged else None
            # What torch cannot prove for the whole range is asserted in the graph.
            exported = export(model, (), example, dynamic_shapes=declared, strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    except torch_private.export_errors() as error:
        raise PlanError(f"torch.export cannot trace {type(model).__name__} for {ranges_text(ranges)}: {error}") from error
    except LayerZeroError:
        raise
    except RAISED as error:
        what = f"{type(model).__name__} raised for {ranges_text(ranges)}, while torch.export traced it: {told(error)}"
        raise PlanError(
            f"{what}. Leave out sizes that it does not allow (at_least={{symbol: lowest}}), and arguments, or wrap the model."
        ) from error
    gm = exported.graph_module
    for value in pytree.tree_leaves([node.args for node in gm.graph.nodes if node.op == "output"]):
        if isinstance(value, (str, float, complex)):
            raise PlanError(
                f"{type(model).__name__} returns {value!r}; a compiled graph returns tensors, whole numbers and None. Wrap the model."
            )
    state = {**exported.state_dict, **exported.constants}
    specs = exported.graph_signature.input_specs
    weights = tuple(state.get(spec.target) if spec.target else None for spec in specs)
    names = tuple(spec.target or spec.arg.name for spec in specs)
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in places:  # constants are in the graph's calls, and which weights are to be trained is no part of a plan
        node.meta["val"] = node.meta["val"].detach() if isinstance(node.meta["val"], Tensor) else None
    inputs = [node.meta["val"] for node in places]
    leaves = [name for name, value in named.items() for _ in pytree.tree_leaves(value)]
    symbols = {(i, dim): symbol for i, name in enumerate(leaves) for dim, symbol in dynamic.get(name, {}).items()}
    return Program(gm, weights, names, inputs, exported.call_spec.in_spec, exported.call_spec.out_spec, symbols, ranges)


def _apart(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    """The same in memory of its own for each tensor: torch.export takes what is given twice, or is a weight too, for one."""
    seen = {torch_private.memory_of(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}

    def own(value: Tensor) -> Tensor:
        place = torch_private.memory_of(value)
        if place in seen:
            return value.clone()
        seen.add(place)
        return value

    return pytree.tree_map_only(Tensor, own, example)


def check_memory_of_its_own(program: Program, written: Sequence[int] | None) -> None:
    """PlanError where the model writes into memory that two of its tensors share: AOTAutograd merges these into one input."""
    names: dict[int, dict[int, str]] = {}
    for i, weight in enumerate(program.weights):
        if weight is not None:
            names.setdefault(torch_private.memory_of(weight), {})[i] = program.names[i]
    for shared in names.values():
        if len(shared) > 1 and (written is None or shared.keys() & {*written}):
            raise PlanError(f"{' and '.join(shared.values())} share memory, and the model writes into it. Give each its own (clone).")


def check_sizes(program: Program) -> None:
    """PlanError where the code that was just compiled is for a part of the declared sizes only: torch.export narrowed a range, or
    Inductor assumed something of a size which is not true of all."""
    found, first, _ = torch_private.compiled_sizes(program.arguments)
    for (position, dim), symbol in program.symbols.items():
        (low, high), (least, most) = program.ranges[symbol], found[position][dim]
        if low < least or high > most:
            ends = " and ".join(str(end) for end, beyond in ((least - 1, low < least), (most, most < high)) if beyond)
            start = f", or start above with at_least={{{symbol!r}: {least}}}" if low < least else ""
            what = f"the model can be compiled for {symbol} {least}..{most} only, not for {low}..{high}"
            raise PlanError(f"{what}. Add {ends} to the ends of its buckets{start}.")
    names = {name: program.symbols[place] for name, place in first.items()}
    broken = torch_private.broken_assumption(program.arguments, names, program.ranges)
    if broken is not None:
        text, sizes = broken
        at = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
        raise PlanError(f"compiled for {ranges_text(program.ranges)}, the code assumes {text}, not so for {at}. Cut the buckets there.")


def ranges_text(ranges: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{s} {low}..{high}" for s, (low, high) in ranges.items()) or "the given shapes"


def covering(every: Sequence[Ranges], sizes: Mapping[str, int]) -> Iterator[int]:
    """Which of the cells hold these sizes."""
    return (i for i, ranges in enumerate(every) if all(low <= sizes[s] <= high for s, (low, high) in ranges.items()))
