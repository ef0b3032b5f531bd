"""What TorchInductor generated: its source, its kernels, and the sizes for which they hold."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .runtime import compile_lock

log = logging.getLogger(__name__)


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
        # The lock: configuration is the whole process's, and is put back in the order in which threads end.
        with compile_lock(), inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
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
            assumed = [PythonPrinter().doprint(expr) for expr in _assumed(env)]
        ranges.append(found)
    return ranges, first, assumed


def _assumed(env: Any) -> list[Any]:
    """What was assumed of symbols, or has to be asserted."""
    return [g.expr for g in env.guards] + [a.expr for late in env.deferred_runtime_asserts.values() for a in late]


def broken_assumption(
    values: Sequence[Any], names: Mapping[str, str], ranges: Mapping[str, tuple[int, int]]
) -> tuple[str, dict[str, int]] | None:
    """What was assumed of the symbolic sizes of `values` while they were compiled, and sizes in `ranges` for which it is not so.

    `names`: what each of torch's symbols was declared as; several can be one. Up to 512 sizes of a single symbol are tried, of several
    the ends, their neighbours and the middle.
    """
    import sympy

    sizes: list[Any] = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else ()) if not isinstance(s, int)]
    if not sizes:
        return None
    env = sizes[0].node.shape_env
    for assumed in _assumed(env):
        if any(str(symbol) not in names for symbol in assumed.free_symbols):
            continue
        declared = {symbol: sympy.Symbol(names[str(symbol)], integer=True, positive=True) for symbol in assumed.free_symbols}
        expr = assumed.xreplace(declared)
        free = sorted(set(declared.values()), key=str)
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


def collected() -> Generated | None:
    """What is being collected by `generated_code`, or None."""
    return _generated.get()


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


@dataclass(frozen=True, slots=True)
class CompiledTriton:
    """A Triton kernel for one configuration: its cubin, and how it is launched, as Python over the names of its parameters."""

    cubin: bytes
    warps: int
    shared: int  # bytes
    parameters: tuple[str, ...]  # of a launch in generated code, before its stream
    lines: tuple[str, ...]  # statements that the grid needs
    grid: tuple[str, str, str]
    types: str  # of what the cubin takes, one letter each
    passed: tuple[str, ...]


def compiled_triton(name: str, source: str) -> CompiledTriton | None:
    """A kernel that Inductor generated or inlined, as torch's own static launcher runs it (torch/_inductor/runtime/triton_heuristics.py).

    None for one that it cannot launch, and for one of several configurations that has not run in this process: which one is
    best is then unknown.
    """
    import torch._inductor.config as inductor
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel
    from torch._inductor.runtime.triton_heuristics import GridExpr

    kernel = getattr(PyCodeCache.load(source), name)
    configs = [launcher.config for launcher in kernel.launchers] or kernel.configs
    if len(configs) != 1:
        return None
    with inductor.patch(use_static_triton_launcher=False):  # Triton's own object, which has the cubin
        compiled = kernel._precompile_config(configs[0])
    binary = compiled.kernel
    if getattr(binary.metadata, "launch_pdl", False) or getattr(binary.metadata, "launch_cooperative_grid", False):
        return None
    binary._cubin_path = None
    try:
        static = StaticallyLaunchedCudaKernel(binary)
    except NotImplementedError:
        return None
    if getattr(static, "_has_tensordesc", False) or getattr(static, "global_scratch_size", 0):
        return None
    assert static.cubin_raw is not None
    _, parameters, nones = compiled._get_arg_lists(static.arg_names, static.declared_constexprs)
    passed = [a for i, a in enumerate(static.arg_names) if i not in static.full_constexprs and a not in nones]
    scratch = int(static.has_global_scratch) + int(static.has_profile_scratch)  # empty, but parameters of the cubin
    grid = GridExpr.from_meta(compiled.inductor_meta, compiled.config)
    return CompiledTriton(
        static.cubin_raw, static.num_warps, static.shared, tuple(parameters), tuple(grid.prefix),
        (str(grid.x_grid), str(grid.y_grid), str(grid.z_grid)), static.arg_tys + "O" * scratch, (*passed, *["None"] * scratch),
    )  # fmt: skip
