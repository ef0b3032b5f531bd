"""Every private interface of torch that LayerZero uses, behind names of our own: a new torch version is this file's work.

Imports of torch's private modules are inside the functions, so that `import lz_compiler` costs nothing.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .errors import LayerZeroError, TorchVersionError

log = logging.getLogger(__name__)

SUPPORTED = ((2, 11), (2, 15))


def check_version() -> None:
    """Raise TorchVersionError outside the range that this module was written against."""
    low, high = SUPPORTED
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not low <= found <= high:
        raise TorchVersionError(
            f"lz_compiler works with torch {low[0]}.{low[1]} to {high[0]}.{high[1]}, found {torch.__version__}. "
            f"Install one of them, for example: pip install 'torch=={high[0]}.{high[1]}.*'"
        )


def mode_patches(mode: str) -> dict[str, Any]:
    """Inductor's own configuration for a torch.compile mode."""
    from torch._inductor import list_mode_options

    return {} if mode == "default" else dict(list_mode_options(mode))


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], backward: Callable[[Any], Any] = lambda run: run
) -> Callable[..., Any]:
    """TorchInductor's whole pipeline (AOTAutograd, partitioning, lowering) under a configuration.

    What our own passes raise on purpose comes out as it is; Inductor would wrap it. `backward` is given what a compiled backward
    graph runs, and returns what it shall run; one from AOTAutograd's cache is not seen.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.exc import InductorError

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        token = _is_inference.set(bool(kwargs.get("is_inference")))
        try:
            compiled = compile_fx_inner(gm, inputs, **kwargs)
        finally:
            _is_inference.reset(token)
        if kwargs.get("is_backward"):
            compiled.current_callable = backward(compiled.current_callable)  # type: ignore[attr-defined]
        generated = _generated.get()
        if generated is not None:
            generated.sources.append(compiled.source_code)  # type: ignore[attr-defined]
            generated.constants |= compiled.constants or {}  # type: ignore[attr-defined]
        return compiled

    try:
        return compile_fx(gm, list(example_inputs), config_patches=dict(patches), inner_compile=inner)  # type: ignore[return-value,arg-type]
    except InductorError as error:
        if isinstance(error.inner_exception, LayerZeroError):
            raise error.inner_exception from None
        raise


@dataclass(slots=True)
class Generated:
    """What Inductor generated for the graphs that were compiled: the Python source of each, the constants that they read by
    name, and of a constant in a library's own layout how it was packed: (operator, plain tensor, further arguments)."""

    sources: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: dict[str, tuple[str, torch.Tensor, tuple[Any, ...]]] = field(default_factory=dict)
    limits: set[tuple[str, str, int, int]] = field(default_factory=set)  # kernels that are for fewer sizes: (kernel, symbol, low, high)


_generated: ContextVar[Generated | None] = ContextVar("generated", default=None)


@contextmanager
def generated_code() -> Iterator[Generated]:
    """Collect what Inductor generates inside; nothing comes from its caches, which would not say."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    found = Generated()
    token = _generated.set(found)
    try:
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            yield found
    finally:
        _generated.reset(token)


def compiled_sizes(values: Sequence[Any]) -> tuple[list[list[tuple[int, int]]], dict[str, tuple[int, int]], list[str]]:
    """For which sizes of fake inputs the code made from them holds: (for each tensor, the range of each dimension; the dimensions
    (position, dimension) that a symbol stands for; what was assumed or has to be asserted of the symbols, as Python).

    What torch.export narrowed or asserts is in it, and what Inductor assumed when it chose loops and layouts by the example's sizes.
    """
    from torch.utils._sympy.printers import PythonPrinter

    ranges: list[list[tuple[int, int]]] = []
    first: dict[str, tuple[int, int]] = {}
    assumed: list[str] = []
    for position, value in enumerate(values):
        found = []
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, int):
                found.append((size, size))
                continue
            env, symbol = size.node.shape_env, size.node._expr
            bound = env.var_to_range[symbol]
            found.append((int(bound.lower), int(min(bound.upper, 1 << 62))))  # or endless
            first.setdefault(str(symbol), (position, dim))
            every = [g.expr for g in env.guards] + [a.expr for late in env.deferred_runtime_asserts.values() for a in late]
            assumed = [PythonPrinter().doprint(expr) for expr in every]
        ranges.append(found)
    return ranges, first, assumed


def broken_assumption(values: Sequence[Any], ranges: Mapping[str, tuple[int, int]]) -> tuple[str, dict[str, int]] | None:
    """What was assumed of the symbolic sizes of `values` while they were compiled, and sizes in `ranges` for which it is not so.

    Up to 512 sizes of a single symbol are tried, of several the ends, their neighbours and the middle.
    """
    import sympy

    sizes: list[Any] = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else ()) if not isinstance(s, int)]
    if not sizes:
        return None
    env = sizes[0].node.shape_env
    for expr in [g.expr for g in env.guards] + [a.expr for late in env.deferred_runtime_asserts.values() for a in late]:
        free = sorted(expr.free_symbols, key=str)
        if any(str(symbol) not in ranges for symbol in free):
            continue
        axes = []
        for low, high in (ranges[str(symbol)] for symbol in free):
            all_of_it = len(free) == 1 and high - low < 512
            some = {low, low + 1, (low + high) // 2, high - 1, high}
            axes.append(range(low, high + 1) if all_of_it else sorted(n for n in some if low <= n <= high))
        for point in itertools.product(*axes):
            if expr.xreplace({symbol: sympy.Integer(n) for symbol, n in zip(free, point, strict=True)}) == False:  # noqa: E712
                return str(expr), {str(symbol): n for symbol, n in zip(free, point, strict=True)}
    return None


@contextmanager
def packing(name: str) -> Iterator[None]:
    """If code is collected, note how the constant that is made inside is packed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    generated = _generated.get()
    if generated is None:
        yield
        return
    packed = generated.packed

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_reorder_" in func.name():
                packed[name] = (func.name().split(".")[0], args[0], tuple(args[1:]))
            return func(*args, **(kwargs or {}))

    with Note():
        yield


def compiled_cpp(argument_types: Sequence[str], source: str) -> str:
    """The shared library (a Python extension with one function, `kernel`) of a C++ loop nest that Inductor generated."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return str(CppPythonBindingsCodeCache.load_pybinding(list(argument_types), source).__self__.__file__)


_is_inference: ContextVar[bool] = ContextVar("is_inference", default=False)


def _passes_know_inference() -> bool:
    """Whether Inductor tells a custom pass what kind of graph it is given (torch 2.11 does not)."""
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass")


def written_inputs(count: int) -> list[int] | None:
    """Which of its `count` inputs the graph that AOTAutograd just compiled changes; None if it merged some, or did not say."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    found = context.fw_metadata if context is not None else None
    if found is None or len(found.input_info) != count:
        return None
    return [i for i, info in enumerate(found.input_info) if info.mutates_data or info.mutates_metadata]


def aliased_outputs() -> bool:
    """Whether the graph that AOTAutograd just compiled returns an input, or views (also when it did not say)."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    found = context.fw_metadata if context is not None else None
    fresh = ("non_alias", "unsafe_view_alias")
    return found is None or any(info.output_type.name not in fresh for info in found.output_info)


def graph_pass(run: Callable[[fx.Graph, bool], None], uuid: Callable[[], str | None]) -> Any:
    """`run(graph, is_inference)` as an Inductor pass before its own post-grad passes.

    `uuid` enters Inductor's cache keys; None keeps the compiled graph out of its caches.
    """
    from torch._inductor import custom_graph_pass

    known = _passes_know_inference()
    base: Any = custom_graph_pass.CustomInferenceAwareGraphPass if known else custom_graph_pass.CustomGraphPass

    class Pass(base):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
            run(graph, _is_inference.get() if is_inference is None else is_inference)

        def uuid(self) -> str | None:
            return uuid()

    return Pass()


def joint_pass(run: Callable[[fx.Graph], object], uuid: str) -> Any:
    """`run(graph)` as an Inductor pass on the graph of forward and backward together, before it is partitioned."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str:
            return uuid

    return Pass()


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave fake-tensor, functional and tracing modes: what runs inside touches real memory."""
    from torch._guards import tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), tracing(None), torch.no_grad(), _no_autocast():
        yield


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def cudagraph_skips(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell why Inductor does not use CUDA graphs for what is compiled inside, where it decides so."""
    from torch._inductor.cudagraph_utils import cudagraphs_log

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage().splitlines()[0])

    handler = Handler(logging.WARNING)
    cudagraphs_log.addHandler(handler)
    try:
        yield
    finally:
        cudagraphs_log.removeHandler(handler)


def capture(run: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run` called several times; raises RuntimeError where it synchronises or cannot be captured.

    Warmed up on a side stream first, as torch asks for.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return graph


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
    """Inside, `hint` answers for other sizes of the symbols named; for the examples' of the others in `values` (SymInts)."""
    import sympy

    sizes = {v.node.expr: sympy.Integer(changed.get(str(v.node.expr), v.node.hint)) for v in values}
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def symbols_of(values: Iterable[Any]) -> dict[str, tuple[Any, int, int]]:
    """The plain symbols among the sizes of fake tensors: name -> (SymInt, lowest and highest size)."""
    found: dict[str, tuple[Any, int, int]] = {}
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if not isinstance(size, int) and size.node.expr.is_Symbol and size.node.has_hint():
                bound = size.node.shape_env.var_to_range[size.node.expr]
                found[str(size.node.expr)] = (size, int(bound.lower), int(bound.upper) if bound.upper.is_Integer else sys.maxsize)
    return found


def collected() -> Generated | None:
    """What is being collected by `generated_code`, or None."""
    return _generated.get()


def hint(value: Any) -> int:
    """A concrete size for a SymInt (its hint), for planning only; an unbacked one counts as 1."""
    if isinstance(value, int):
        return value
    node, sizes = value.node, _sizes.get()
    if sizes:
        return int(node.expr.xreplace(sizes))
    if node.has_hint():
        return int(node.hint)
    return 1


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


COMPILED_IN = {"w", "bias"}  # the tensors that compile_region makes constants on a CPU


def compile_region(run: Callable[..., Any], tensors: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """`run(tensors)` through Inductor alone, for measuring a kernel that exists only inside a compiled graph. On a CPU by its
    GEMM templates, with the tensors of COMPILED_IN frozen into the code."""
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    cpu = all(t.device.type == "cpu" for t in tensors.values())
    names = [name for name in tensors if not (cpu and name in COMPILED_IN)]
    constants = {name: t for name, t in tensors.items() if name not in names}
    gm = make_fx(lambda *values: (run({**constants, **dict(zip(names, values, strict=True))}),))(*(tensors[n] for n in names))
    gm.graph.eliminate_dead_code()  # what FlexAttention returns beside its result does not exist on a CPU
    templates: dict[str, Any] = {"max_autotune": True, "max_autotune_gemm_backends": "CPP"} if cpu else {}
    with config.patch({"post_grad_custom_pre_pass": None, "triton.cudagraphs": False, **templates}):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for node in gm.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, node.meta["val"])
        with mode:
            compiled = compile_fx_inner(gm, [mode.from_tensor(tensors[n]) for n in names], is_inference=True)
    return lambda values: compiled([values[name] for name in names])[0]


def fake_results(run: Callable[[Mapping[str, Any]], Any], tensors: Mapping[str, Any]) -> Any:
    """What `run(tensors)` gives by the operators' shape rules alone: what a compiler believes of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return run({name: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()})


@functools.cache
def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that cannot run here may raise."""
    errors: tuple[type[Exception], ...] = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (*errors, TritonError)


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


@functools.cache
def flex_attention() -> Any:
    """FlexAttention's operator. Inductor is told not to fuse what follows into its C++ kernel, which raises NotImplementedError
    then (torch 2.13, `epilogue_nodes`; torch.compile(mode="max-autotune") of flex_attention(...).relu() fails alike)."""
    from torch._higher_order_ops.flex_attention import flex_attention as operator
    from torch._inductor import ir, lowering

    lower = lowering.lowerings[operator]

    def alone(*args: Any, **kwargs: Any) -> Any:
        results = lower(*args, **kwargs)
        for box in results if isinstance(results, tuple) else ():
            buffer = getattr(getattr(box, "data", None), "data", None)
            if isinstance(buffer, ir.CppTemplateBuffer):
                buffer.allow_epilogue_fusion = False
        return results

    lowering.lowerings[operator] = alone
    return operator


def flex_options() -> dict[str, Any]:
    """The options that torch.nn.attention.flex_attention gives its operator for inference."""
    from torch.nn.attention import flex_attention as module

    like = torch.empty(0)
    with torch.no_grad():
        return dict(module._apply_kernel_options(like, like, like, False, None))


def flex_blocks(sees: Callable[..., Any], queries: int, keys: int, device: str, ahead: bool) -> tuple[Any, ...]:
    """The operator's block mask as its tuple, ending in a function. `ahead`: of the blocks in which `sees(b, h, i, j)` holds
    somewhere; else one block of everything."""
    from torch.nn.attention import flex_attention as module

    if ahead:
        known = module.create_block_mask(lambda b, h, i, j: sees(b, h, i, j), None, None, queries, keys, device=device)
        return tuple(known.as_tuple())
    one = torch.ones([1, 1, 1], dtype=torch.int32, device=device)
    whole = module.BlockMask.from_kv_blocks(one, 0 * one[None], BLOCK_SIZE=module._LARGE_SPARSE_BLOCK_SIZE, seq_lengths=(1, 1))
    return tuple(whole.as_tuple())


def is_fake(value: object) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def counters() -> Any:
    """torch._dynamo.utils.counters, where backends count what they did."""
    from torch._dynamo.utils import counters as dynamo_counters

    return dynamo_counters["layerzero"]


def trace_artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """Put a text into TORCH_TRACE (tlparse); free when tracing is off."""
    from torch._logging import trace_structured  # type: ignore[attr-defined]

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table: patterns are traced with it, so that they look like the graph they match."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


_EXTERN = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "_int_mm", "sort", "topk")


@functools.cache
def is_fusable(target: Any) -> bool:
    """Whether TorchInductor generates a loop for this operator (and so may fuse it), rather than calling a kernel."""
    from torch._inductor import lowering

    if not isinstance(target, torch._ops.OpOverload):
        return False
    handler = lowering.lowerings.get(target)
    if handler is None or getattr(handler, "_is_fallback_handler", False) or target in lowering.fallbacks:
        return False
    return target.overloadpacket.__name__ not in _EXTERN and target.namespace in ("aten", "prims")


_vendors: dict[Any, Any] = {}  # what Inductor emits for an operator that was given to lower_to


def called_names(node: fx.Node) -> set[str]:
    """By what names Inductor's Python code calls what a node stands for: a library's operator, or a Triton function."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    if "kernel_idx" in node.kwargs:
        kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
        while not hasattr(kernel, "__name__"):  # an autotuner or a heuristic around the function
            kernel = kernel.fn
        return {kernel.__name__}
    targets = [t for t in (node.target, _vendors.get(node.target)) if isinstance(t, torch._ops.OpOverload)]
    names = {(t.namespace, t.overloadpacket.__name__) for t in targets}
    return {f"torch.ops.{space}.{name}" for space, name in names} | {f"extern_kernels.{name}" for space, name in names if space == "aten"}


def lower_to(op: Any, vendor: Any, arrange: Callable[..., tuple[Any, ...]], strides: bool = False) -> None:
    """Make Inductor emit a direct call of `vendor` wherever the graph holds `op`; with `strides`, inputs keep the graph's order of strides.

    `arrange(layout, *args)` maps the operator's arguments to the vendor's: a tuple, or (tuple, keyword arguments). `layout`
    offers `contiguous`, `channels_last`, `transposed` and `weight`, which realise an input in that layout (the explicit
    layout contract of an opaque kernel).
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    def in_memory(value: Any) -> Any:
        """Written once, for this kernel and all other readers: a required layout alone makes a copy, and others recompute."""
        if isinstance(value.data, ir.StorageBox):
            value.realize()
        return value

    class Layout:
        @staticmethod
        def contiguous(value: Any) -> Any:
            view = value.data
            if isinstance(view, ir.PermuteView) and isinstance(view.data, ir.StorageBox):
                view.data.realize()
                if isinstance(view.data.get_layout(), ir.FlexibleLayout):  # laid out so that the view is contiguous
                    strides = dict(zip(view.dims, ir.FlexibleLayout.contiguous_strides(value.get_size()), strict=True))
                    view.data.data.freeze_layout_with_exact_strides([strides[i] for i in range(len(strides))])
            return ir.ExternKernel.require_contiguous(in_memory(value))

        @staticmethod
        def channels_last(value: Any) -> Any:
            """Exact strides, since kernels look at them: even a batch of one must not have stride 0."""
            _, c, h, w = value.get_size()
            return ir.ExternKernel.require_exact_strides(in_memory(value), [h * w * c, 1, w * c, c])

        @staticmethod
        def weight(value: Any) -> Any:
            """A convolution's weight: channels last, unless it is packed already."""
            name = in_memory(value).get_name() if isinstance(getattr(value, "data", None), ir.StorageBox) else None
            constant = V.graph.constants.get(name) if name else None
            packed = constant is not None and constant.is_mkldnn
            return value if packed else Layout.channels_last(value)

        @staticmethod
        def transposed(value: Any) -> Any:
            """A matrix's transpose, as a view of contiguous memory."""
            return lowering.lowerings[torch.ops.aten.permute.default](Layout.contiguous(value), [1, 0])

    call = lowering.fallback_handler(vendor, add_to_fallback_set=False)
    _vendors[op] = vendor

    def lowered(*args: Any) -> Any:
        arranged = arrange(Layout, *args)
        if isinstance(arranged[-1], dict):  # keyword arguments, where the vendor's schema asks for them
            return call(*arranged[0], **arranged[1])
        return call(*arranged)

    lowering.register_lowering(op, type_promotion_kind=None)(lowered)
    if strides:
        lowering.add_layout_constraint(op, lowering.constrain_to_fx_strides)


@functools.cache
def load_cpp(path: str, folder: str) -> str:
    """Compile a C++ file as Inductor compiles its loops, and load it; the library, which is returned, is kept in `folder`, or in
    Inductor's own cache where that cannot be written to."""
    import os
    from pathlib import Path
    from unittest import mock

    from torch._inductor.codecache import CppCodeCache

    place = {}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        place = {"TORCHINDUCTOR_CACHE_DIR": folder} if os.access(folder, os.W_OK) else {}
    except OSError as error:
        log.info("compiled kernels go to Inductor's cache: %s", error)
    with mock.patch.dict(os.environ, place):
        return str(CppCodeCache.load(Path(path).read_text())._name)


@functools.lru_cache(maxsize=1)
def _connection(store: Any) -> Any:
    return store.clone()


def job_store(prefix: str) -> Any:
    """The key-value store that the default process group met in, under a prefix: a second connection to it, since a wait
    blocks the first one for the group's own watchdogs."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore(prefix, _connection(_get_default_store()))


_COLLECTIVE = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "symm_mem")


def is_collective(target: Any) -> bool:
    """Whether an operator takes part in a communication between ranks (torch has no tag for them)."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in _COLLECTIVE


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for others (a DTensor for this rank's part), which AOTAutograd puts in its place."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


@contextmanager
def backward_at_once() -> Iterator[None]:
    """Lower a backward graph together with its forward graph, not when it is first run."""
    import torch._functorch.config as functorch

    with functorch.patch(force_non_lazy_backward_lowering=True):
        yield


def ensure_fake(vendor: Any, fake: Callable[..., Any]) -> None:
    """Give a vendor operator a shape rule where torch has none (Inductor runs it once on fake tensors)."""
    name = vendor.name()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        _implementations(vendor.namespace).impl(vendor, fake, "Meta")


@functools.cache
def _implementations(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "IMPL")


def node_source_lines(gm: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    """(file, line) pairs from which Dynamo traced the graph's nodes."""
    import re

    found: dict[tuple[str, int], None] = {}
    for node in gm.graph.nodes:
        for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
            found[(file, int(line))] = None
    return tuple(found)


def compile_lock() -> Any:
    """Held by whoever traces or compiles: torch replaces methods of nn.Module meanwhile, for all threads."""
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock


def compile_id() -> str:
    """Dynamo's name of the running compilation, such as `0/1`."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "?"


def multi_grad_hook(tensors: Sequence[torch.Tensor], fn: Callable[[], None]) -> Any:
    """Call `fn` once all gradients of `tensors` that the running backward computes are there."""
    from torch.autograd.graph import register_multi_grad_hook

    return register_multi_grad_hook(tensors, lambda grads: fn(), mode="all")
