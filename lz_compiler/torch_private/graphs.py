"""FX graphs, fake tensors and symbolic sizes."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from .runtime import real_tensors


def written_inputs(count: int) -> tuple[int, ...] | None:
    """Which of its `count` inputs the graph that AOTAutograd just compiled changes; None if it merged some, or did not say."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    found = context.fw_metadata if context is not None else None
    if found is None or len(found.input_info) != count:
        return None
    return tuple(i for i, info in enumerate(found.input_info) if info.mutates_data or info.mutates_metadata)


def aliased_outputs() -> bool:
    """Whether the graph that AOTAutograd just compiled returns an input, or views (also when it did not say)."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    found = context.fw_metadata if context is not None else None
    fresh = ("non_alias", "unsafe_view_alias")
    return found is None or any(info.output_type.name not in fresh for info in found.output_info)


@contextmanager
def tracing_like(graph: fx.Graph) -> Iterator[None]:
    """Compile as if Dynamo had just traced this graph: with its fake tensors and symbols."""
    from torch._guards import TracingContext, tracing

    with tracing(TracingContext(fake_mode_of(graph))):
        yield


def export_errors() -> tuple[type[Exception], ...]:
    """What torch.export raises for a model that it cannot trace, or not for the declared ranges."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._export.verifier import SpecViolationError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return TorchDynamoException, SpecViolationError, GuardOnDataDependentSymNode


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode that the graph was traced with, or None in a graph without tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


_sizes: ContextVar[dict[Any, Any] | None] = ContextVar("sizes", default=None)


@contextmanager
def hints_at(values: Iterable[Any], **changed: int) -> Iterator[None]:
    """Inside, `hint` answers for other sizes of the symbols named among `values` (SymInts); for all others, of strides say, as before."""
    import sympy

    sizes: dict[Any, Any] = {}
    for v in values:
        if not sizes:
            sizes |= getattr(v.node.shape_env, "backed_var_to_val", None) or v.node.shape_env.var_to_val  # torch's names of one thing
        sizes[v.node.expr] = sympy.Integer(changed.get(str(v.node.expr), v.node.hint))
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def permitted(values: Iterable[Any], **changed: int) -> bool:
    """Whether the graph's guards let the symbols named among `values` (SymInts) have other sizes, all others as in the example: guards may
    tie sizes to each other, or to a weight's, and Dynamo traces another graph for what they exclude."""
    import sympy

    values = list(values)
    env = values[0].node.shape_env
    with hints_at(values, **changed):
        sizes = _sizes.get()
    return all(env.replace(guard.expr).xreplace(sizes) is not sympy.false for guard in env.guards)


def symbols_of(values: Iterable[Any]) -> dict[str, tuple[Any, int, int]]:
    """The plain symbols among the sizes of fake tensors: name -> (SymInt, lowest and highest size)."""
    found: dict[str, tuple[Any, int, int]] = {}
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if not isinstance(size, int) and size.node.expr.is_Symbol and size.node.has_hint():
                bound = size.node.shape_env.var_to_range[size.node.expr]
                found[str(size.node.expr)] = (size, int(bound.lower), int(bound.upper) if bound.upper.is_Integer else sys.maxsize)
    return found


def hint(value: Any) -> int:
    """A concrete size for a SymInt (its hint), for planning only; an unbacked one counts as 1."""
    if isinstance(value, int):
        return value
    node, sizes = value.node, _sizes.get()
    if sizes:
        expr = node.expr.xreplace(sizes)
        return int(expr.xreplace(dict.fromkeys(expr.free_symbols, 1)))
    if node.has_hint():
        return int(node.hint)
    return 1


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for all that the guards permit, however shape rules spell them (s*s//s is s). Adds no guard."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(one, int) and isinstance(other, int):
        return one == other
    # Some number for each symbol, with many divisors: what is spelt without a division may rest on a guard.
    first, second = (
        e.xreplace({s: sympy.Integer(5040 * (1 + zlib.crc32(str(s).encode()) % 9973)) for s in e.free_symbols})
        for e in (sympy.Integer(v) if isinstance(v, int) else v.node.expr for v in (one, other))
    )
    return bool(first == second) or statically_known_true(one == other)


def symbolic_range(value: Any) -> str:
    """Lower and upper bound of a SymInt as text, for the fingerprint."""
    node = value.node
    bounds = node.shape_env.var_to_range.get(node.expr) if node.shape_env is not None else None
    return f"{node.expr}{'' if bounds is None else f'[{bounds.lower},{bounds.upper}]'}"


def size_expr(value: Any) -> Any:
    """A SymInt as a sympy expression: comparing expressions adds no guard, comparing SymInts would."""
    return value.node.expr


def lower_bound(value: torch.Tensor, symbol: Any) -> int | None:
    """The guarded lower bound of a symbol in the sizes of a fake tensor's graph, or None where there is none."""
    mode = getattr(value, "fake_mode", None)
    bounds = mode.shape_env.var_to_range.get(symbol) if mode is not None and mode.shape_env is not None else None
    return int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else None


def placeholder_tensors(gm: fx.GraphModule) -> list[tuple[torch.Tensor | None, bool]]:
    """For each placeholder of a Dynamo graph: the real tensor behind it (None if unknown), and whether it is a parameter
    or buffer of a module (a source through `_parameters` or `_buffers`, or an nn.Parameter)."""
    found: list[tuple[torch.Tensor | None, bool]] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        arg = node.meta.get("grapharg")
        example = arg.example if arg is not None and getattr(arg, "is_tensor", False) else None
        real = example if isinstance(example, torch.Tensor) and not is_fake(example) else None
        source = getattr(getattr(arg, "source", None), "name", "")
        source = source() if callable(source) else source
        owned = isinstance(real, torch.nn.Parameter) or "_buffers[" in source or "_parameters[" in source
        found.append((real, real is not None and owned))
    return found


def guard_owned(gm: fx.GraphModule) -> None:
    """Guard the identity of every parameter and buffer of a Dynamo graph: another model of the same class is recompiled.

    Dynamo passes them as inputs and guards on their shapes alone, which is not enough where their values enter the code.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._guards import TracingContext

    if TracingContext.try_get() is None:
        return
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, (_, owned) in zip(inputs, placeholder_tensors(gm), strict=True):
        if owned:
            install_guard(node.meta["grapharg"].source.make_guard(GuardBuilder.ID_MATCH))


def autocasts(gm: fx.GraphModule) -> bool:
    """Whether autocast is on around the graph, or entered inside it."""
    from torch.amp.autocast_mode import _enter_autocast

    active = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return active or any(node.target is _enter_autocast for node in gm.graph.nodes)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that shares its parameters: Inductor may rewrite what it is given."""
    import copy

    new = copy.copy(gm)
    new.graph = copy.deepcopy(gm.graph)
    for old, copied in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            copied._dynamo_source = old._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source
    return new


def clamps(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph clamps something: TorchInductor's freezing fuses oneDNN's relu and clip into convolutions, which make a number
    of NaN."""
    words = ("relu", "hard", "clamp", "clip", "threshold")
    nodes = [node for part in gm.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]
    names = [
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "") for node in nodes if node.op[:4] == "call"
    ]
    return any(word in name.lower() for name in names for word in words)


def with_attributes(gm: fx.GraphModule, values: Sequence[torch.Tensor | None]) -> fx.GraphModule:
    """A copy of a Dynamo graph in which placeholders are attributes: those that have a value here, a parameter or a buffer."""
    new = copy_graph_module(gm)
    new._parameters, new._buffers = dict(gm._parameters), dict(gm._buffers)  # the copy shares them
    sources = dict(getattr(gm, "_param_name_to_source", {}))
    new._param_name_to_source = sources  # type: ignore[assignment]
    placeholders = [node for node in new.graph.nodes if node.op == "placeholder"]
    for i, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        if value is None:
            continue
        name = f"frozen_{i}"
        if isinstance(value, torch.nn.Parameter):
            new.register_parameter(name, value)
        else:
            new.register_buffer(name, value)
        sources[name] = node.meta["grapharg"].source
        with new.graph.inserting_before(node):
            attribute = new.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        new.graph.erase_node(node)
    new.recompile()
    return new


def fake_results(run: Callable[[Mapping[str, Any]], Any], tensors: Mapping[str, Any]) -> Any:
    """What `run(tensors)` gives by the operators' shape rules alone: what a compiler believes of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return run({name: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()})


def is_triton_op(op: Any) -> bool:
    """Whether the operator was made by torch.library.triton_op."""
    from torch._library.triton import triton_ops_to_kernels

    return isinstance(op, torch._ops.OpOverload) and op.name().removesuffix(".default") in triton_ops_to_kernels


def trace_triton(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """A triton_op on fake tensors as a functional graph of ATen calls and kernel launches, which Inductor compiles inline.

    One placeholder for each tensor of `args`, in order.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def run(*values: torch.Tensor) -> Any:
        given = iter(values)
        return op(*(next(given) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return make_fx(dispatch_functionalize(run, FunctionalTensorMode()), decomposition_table=decompositions())(*tensors).graph


def trace_function(function: Callable[..., Any], examples: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A function of tensors, all different objects, as a graph of ATen calls."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with real_tensors():
        return make_fx(lambda *values: function(*values))(*examples)


def is_fake(value: object) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table: patterns are traced with it, so that they look like the graph they match."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def memory_of(tensor: torch.Tensor) -> int:
    """What is the same for tensors that share memory, also for those without an address."""
    return int(tensor.untyped_storage()._cdata)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for others (a DTensor for this rank's part), which AOTAutograd puts in its place."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


def node_source_lines(gm: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    """(file, line) pairs from which Dynamo traced the graph's nodes."""
    import re

    found: dict[tuple[str, int], None] = {}
    for node in gm.graph.nodes:
        for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
            found[(file, int(line))] = None
    return tuple(found)
