"""What surrounds a running graph: modes, CUDA graphs, errors, locks."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave fake-tensor, functional and tracing modes: what runs inside touches real memory."""
    from torch._guards import tracing
    from torch.utils._python_dispatch import _disable_current_modes

    cpu, cuda = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with _disable_current_modes(), tracing(None), torch.no_grad(), cpu, cuda:
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


@contextmanager
def ungraphed() -> Iterator[None]:
    """What Inductor would replay from CUDA graphs is called as it was compiled: a replay's kernels belong to no operator."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager as Manager

    kept = Manager._run
    Manager._run = lambda self, new_inputs, function_id: self.ids_to_funcs[function_id].model(new_inputs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Manager._run = kept  # type: ignore[method-assign]


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
def recorded_allocations() -> Iterator[Callable[[], None]]:
    """What is given begins to record what torch allocates on the GPU, for `allocated_outside`."""
    try:
        yield lambda: torch.cuda.memory._record_memory_history("all", context=None, max_entries=1 << 16, clear_history=True)
    finally:
        torch.cuda.memory._record_memory_history(None)


def allocated_outside(graph: torch.cuda.CUDAGraph) -> int:
    """Bytes recorded that are not in the graph's pool: a replay uses that memory when it is someone else's."""
    known = torch.cuda.memory._snapshot()
    inside = [
        (s["address"], s["address"] + s["total_size"]) for s in known["segments"] if tuple(s["segment_pool_id"]) == tuple(graph.pool())
    ]
    made = (entry for trace in known["device_traces"] for entry in trace if entry["action"] == "alloc")
    return sum(entry["size"] for entry in made if not any(start <= entry["addr"] < end for start, end in inside))


@functools.cache
def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that cannot run here may raise."""
    errors: tuple[type[Exception], ...] = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, MemoryError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (*errors, TritonError)


@functools.cache
def run_errors() -> tuple[type[Exception], ...]:
    """What a compiled graph may raise because of a kernel in it, whose library may also assert, or load a part of itself late."""
    return (*kernel_errors(), LookupError, AssertionError, AttributeError, ArithmeticError, ImportError, OSError)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which is no kernel's fault. A CPU's allocator raises a plain RuntimeError."""
    texts = ("can't allocate memory", "CUDA out of memory", "Storage size calculation overflowed")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def free_memory(device: str) -> int | None:
    """Bytes that a new tensor may take on this kind of device; None where the system does not say."""
    if device == "cuda":
        cached: int = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def counters() -> Any:
    """torch._dynamo.utils.counters, where backends count what they did."""
    from torch._dynamo.utils import counters as dynamo_counters

    return dynamo_counters["layerzero"]


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Put a text into TORCH_TRACE (tlparse); free when tracing is off."""
    from torch._logging import trace_structured  # type: ignore[attr-defined]

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)


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


def compile_lock() -> Any:
    """Held by whoever traces or compiles: torch replaces methods of nn.Module meanwhile, for all threads."""
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock


def free_after_fork(*locks: Any) -> None:
    """In a child process: these locks and the compile lock are free, unless the thread that forked holds them. No other is here."""
    module = sys.modules.get("torch._dynamo.convert_frame")
    for lock in (*locks, *([] if module is None else [module.compile_lock])):
        if not lock._is_owned():
            lock._at_fork_reinit()


def compile_id() -> str:
    """Dynamo's name of the running compilation, such as `0/1`."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "?"


def saves_are_hooked() -> bool:
    """Whether what autograd saves goes through hooks: of activation checkpointing, say, in its forward pass and where it is repeated."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured in this thread's stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def when_computed(tensors: Sequence[torch.Tensor], fn: Callable[[], None]) -> list[Any]:
    """Inside a backward pass: call `fn` once all gradients of `tensors` that it computes are there. Returns the hooks to take off.

    torch.autograd.grad does not tell which gradients of leaves it computes: there `fn` is called at the end of the pass.
    """
    from torch.autograd.graph import _get_grad_fn_or_grad_acc, register_multi_grad_hook

    try:
        for tensor in tensors:
            torch._C._will_engine_execute_node(_get_grad_fn_or_grad_acc(tensor))  # type: ignore[attr-defined]
    except RuntimeError:
        torch.autograd.Variable._execution_engine.queue_callback(fn)  # type: ignore[attr-defined]
        return []
    return [register_multi_grad_hook(tensors, lambda grads: fn(), mode="all")]
