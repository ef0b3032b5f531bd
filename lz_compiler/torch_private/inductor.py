"""Compiling with TorchInductor: its pipeline, passes, regions and lowerings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import LayerZeroError
from .generated import collected
from .graphs import with_attributes


def estimated_rates() -> dict[str, Any]:
    """Bytes/s ("bandwidth") and flop/s by dtype ("flops") from which Inductor estimates what a node takes on the current CUDA device.
    Empty where it has none, and estimates 0."""
    from torch._inductor.utils import get_device_tflops, get_gpu_dram_gbps

    try:
        bandwidth = get_gpu_dram_gbps() * 1e9
        flops = {name: get_device_tflops(getattr(torch, name)) * 1e12 for name in ("float32", "bfloat16", "float16")}
    except Exception:  # what Triton and nvidia-smi raise, or that they are not here: Inductor catches the same
        return {}
    return {"bandwidth": bandwidth, "flops": flops} if min(bandwidth, *flops.values()) > 0 else {}


def mode_patches(mode: str) -> dict[str, Any]:
    """Inductor's own configuration for a torch.compile mode."""
    from torch._inductor import list_mode_options

    return {} if mode == "default" else dict(list_mode_options(mode))


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], backward: Callable[[Any], Any] = lambda run: run
) -> Callable[..., Any]:
    """TorchInductor's whole pipeline (AOTAutograd, partitioning, lowering) under a configuration.

    What our own passes raise on purpose comes out as it is; Inductor would wrap it. `backward` is given what a compiled backward
    graph runs, also one from AOTAutograd's cache, and returns what it shall run.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.exc import InductorError

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        token, whole = _is_inference.set(bool(kwargs.get("is_inference"))), _whole.set(gm)
        try:
            with _backwards_by(backward):  # again: this may run long after compile_fx has returned
                compiled = compile_fx_inner(gm, inputs, **kwargs)
        finally:
            _is_inference.reset(token)
            _whole.reset(whole)
        generated = collected()
        if generated is not None and hasattr(compiled, "source_code"):  # a graph without a call is run as it is
            generated.sources.append(compiled.source_code)  # type: ignore[attr-defined]
            generated.constants |= compiled.constants or {}  # type: ignore[attr-defined]
        return compiled

    try:
        with _backwards_by(backward):
            return compile_fx(gm, list(example_inputs), config_patches=dict(patches), inner_compile=inner)  # type: ignore[return-value,arg-type]
    except InductorError as error:
        if isinstance(error.inner_exception, LayerZeroError):
            raise error.inner_exception from None
        raise


def compile_frozen(
    gm: fx.GraphModule, example_inputs: Sequence[Any], values: Sequence[torch.Tensor | None], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """TorchInductor with its own freezing, as it does when it compiles a model by itself: `values` are the weights among the inputs.
    Called with all of them. What AOTAutograd said of the graph that was compiled before this one stays."""
    from torch._guards import TracingContext

    context = TracingContext.get()
    known = dict(vars(context))
    kept = [i for i, value in enumerate(values) if value is None]
    try:
        run = compile_with_inductor(with_attributes(gm, values), [example_inputs[i] for i in kept], {**patches, "freezing": True})
    finally:
        vars(context).update(known)
    return lambda *args: run(*[args[i] for i in kept])


def lowering_errors() -> tuple[type[Exception], ...]:
    """What TorchInductor raises where it cannot compile a graph."""
    from torch._inductor.exc import InductorError

    return (InductorError,)


_is_inference: ContextVar[bool] = ContextVar("is_inference", default=False)
_whole: ContextVar[fx.GraphModule | None] = ContextVar("whole", default=None)
_backward: ContextVar[Callable[[Any], Any] | None] = ContextVar("backward", default=None)


@contextmanager
def _backwards_by(backward: Callable[[Any], Any]) -> Iterator[None]:
    """What every backward graph that is made ready inside runs, goes through `backward` first."""
    _see_backwards()
    token = _backward.set(backward)
    try:
        yield
    finally:
        _backward.reset(token)


@functools.cache
def _see_backwards() -> None:
    """Every compiled graph passes here before it first runs: just compiled, from FX's cache, or from AOTAutograd's, which does not ask
    the inner compiler. There is no other place that sees the last."""
    from torch._inductor.output_code import CompiledFxGraph

    ready = CompiledFxGraph.post_compile

    def seen(self: Any, *args: Any, **kwargs: Any) -> None:
        ready(self, *args, **kwargs)
        backward = _backward.get()
        if backward is not None and self.fx_kwargs["is_backward"]:
            self.current_callable = backward(self.current_callable)

    CompiledFxGraph.post_compile = seen  # type: ignore[method-assign]


def graph_pass(run: Callable[[fx.Graph, bool], None], uuid: Callable[[], str | None]) -> Any:
    """`run(graph, is_inference)` as an Inductor pass before its own post-grad passes.

    `uuid` enters Inductor's cache keys; None keeps the compiled graph out of its caches.
    """
    from torch._inductor import custom_graph_pass

    # torch 2.11 does not tell a pass what kind of graph it is given.
    base: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)

    class Pass(base):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
            run(graph, _is_inference.get() if is_inference is None else is_inference)

        def uuid(self) -> str | None:
            return uuid()

    return Pass()


def is_whole(graph: fx.Graph) -> bool:
    """Whether a pass was given the graph that is compiled, and not one inside it, as a branch of torch.cond is."""
    return graph.owning_module is _whole.get()


def draws_own_numbers(graph: fx.Graph) -> bool:
    """Whether a graph draws random numbers as TorchInductor does, which are not eager's."""
    from torch._inductor import config

    drawn = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.nodes)
    return drawn and not config.fallback_random


def joint_pass(run: Callable[[fx.Graph], object], uuid: str) -> Any:
    """`run(graph)` as an Inductor pass on the graph of forward and backward together, before it is partitioned."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str:
            return uuid

    return Pass()


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


def precompile_headers() -> None:
    """Have the compiler read the headers of C++ templates now, and not for each kernel: nearly half of what compiling an attention
    kernel takes. TorchInductor does so with its own prefix; the code and its cache's keys stay the same."""
    from torch._inductor import codecache

    header = str(Path(__file__).with_name("templates.h"))
    usual = codecache.CppPythonBindingsCodeCache._get_uncompiled_header

    def chosen(cls: Any, device: str) -> str | None:
        return header if usual(device) else None

    codecache.CppPythonBindingsCodeCache._get_uncompiled_header = classmethod(chosen)  # type: ignore[assignment,method-assign]
    compile_region(lambda t: t["x"] + 1, {"x": torch.zeros(16)})  # also finds out what instructions the compiler may use


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
