"""What a backend is: a name, a version, and an answer for every region: candidates, or a Rejection with its reason.

To add one: write kernels (a function that computes a region from its inputs through an `Emitter`), and `candidates`.
The same function is measured, checked against the region's reference, and placed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kv_cache import KVCacheSpec
from ..options import Options
from ..trust.capabilities import fitting
from ..types import Candidate, Format, Region, Rejection, TensorSpec

Values = Mapping[str, Any]


class Emitter(Protocol):
    """Runs operators on tensors, or places them in a graph: kernels are written once against this."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op`, or add a node that will."""

    def loop(self, op: Any, *args: Any) -> Any:
        """The same for an elementwise `op`, which TorchInductor fuses with what reads it: its time is not the kernel's. `args[0]` is as
        large as the result."""

    def item(self, values: Any, index: int) -> Any:
        """One output of an operator that returns several."""

    def constant(self, make: Callable[..., Any], *values: Any) -> Any:
        """`make(*values)` computed once, ahead of time; `values` must be frozen weights."""

    def subgraph(self, function: Callable[..., Any], *examples: torch.Tensor) -> Any:
        """A function that an operator takes as an argument, traced with `examples` where it goes into a graph."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """`prepare(emit, values, params) -> values` happens once, at compile time (packing); `run` is the kernel.

    `version` enters the timings' keys: raise it when what `run` does changes.
    """

    name: str
    run: Callable[[Emitter, Values, Values], Any]
    prepare: Callable[[Emitter, Values, Values], Values] | None = None
    version: int = 1
    setup: Callable[[], object] | None = None  # makes the kernel's operator exist, where a compiled graph is loaded from a cache
    deterministic: bool = True  # the same inputs always give the same bits on one machine; a descriptor's word goes before
    packs: Callable[[Values], Hashable] | None = None  # parameters -> what packed weights depend on, equal: the same bytes; None: on all
    compiled: bool = False  # exists only inside a graph that TorchInductor compiles, and is measured so


@dataclass(frozen=True, slots=True)
class SelectionContext:
    """What a backend may know about a region. Specs and formats run parallel to `region.inputs`.

    `roles` name the inputs as the region's reference does; `frozen` holds the roles whose values never change. `kv_cache` says how
    the cache is cut up and laid out, where the region reads one: from pages, or from a buffer that the graph writes into.
    """

    region: Region
    roles: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    params: Mapping[str, Any]
    frozen: frozenset[str]
    options: Options
    default: bool = False  # the region is one node of the graph as it stands
    kv_cache: KVCacheSpec | None = None

    def spec(self, role: str) -> TensorSpec:
        return self.specs[self.roles.index(role)]

    def candidate(
        self, kernel: Kernel, dtype: str | None = None, layouts: Mapping[str, str] | None = None, out_layout: str | None = None,
        **extra: Any,
    ) -> Candidate:  # fmt: skip
        """A candidate of this region: inputs as eager lays them out unless `layouts` says otherwise, matrices in `dtype`.

        Vectors (bias, batch-norm terms) stay as they are: kernels convert them, at no cost worth planning.
        """
        layouts = layouts or {}
        ins = tuple(
            Format(layouts.get(role) or natural_layout(spec), dtype if dtype and _converts(role, spec) else spec.dtype)
            for role, spec in zip(self.roles, self.specs, strict=True)
        )
        outs = tuple(Format(out_layout or natural_layout(spec), dtype or spec.dtype) for spec in self.outputs)
        params = {**self.params, "roles": self.roles, **extra}
        params.setdefault("dtype", dtype or self.specs[0].dtype)
        return Candidate(kernel.name, self.region, ins, outs, params=tuple(sorted(params.items())))

    def reject(self, kernel: str, code: str, detail: str) -> Rejection:
        return Rejection(kernel, code, detail)


def natural_layout(spec: TensorSpec) -> str:
    """The name of the layout that eager gives this tensor: `channels_last` if it is so, else `strided`."""
    if len(spec.shape) != 4:
        return "strided"
    n, c, h, w = spec.shape
    last = spec.stride[1] == 1 and spec.stride[3] == c and spec.stride[2] == c * w and (n == 1 or spec.stride[0] == c * w * h)
    return "channels_last" if last and c > 1 and h * w > 1 else "strided"


def split_columns(emit: Emitter, whole: Any, widths: tuple[int, ...]) -> tuple[Any, ...]:
    """A merged product's result as its parts: views."""
    stops = [sum(widths[: i + 1]) for i in range(len(widths))]
    parts = zip(stops, widths, strict=True)
    return tuple(emit.call(torch.ops.aten.slice.Tensor, whole, 1, stop - width, stop) for stop, width in parts)


def stacked(weights: Iterable[torch.Tensor], params: Values) -> torch.Tensor:
    """Weights of one input, one below the other: (N0 + N1 + ..., K), whichever way round they are given."""
    return torch.cat([w.t() if params.get("transposed") else w for w in weights]).contiguous()


def quantize_rows(w: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """w (N, K) as (q, scale) with w ~ q * scale[:, None]: symmetric per row, q int8 or float8_e4m3fn, scale (N,) float32.

    The largest magnitude of a row lands on the largest of `dtype`; a row of zeros has scale 1.
    """
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    largest = w.float().abs().amax(1)
    scale = torch.where(largest > 0, largest / top, 1.0)
    q = w.float() / scale[:, None]
    return (q.round() if dtype == torch.int8 else q).clamp(-top, top).to(dtype), scale


def _converts(role: str, spec: TensorSpec) -> bool:
    matrix = role in ("x", "other", "q", "k", "v", "w") or (role[0] == "w" and role[1:].isdigit())
    return matrix and spec.dtype in ("float32", "float64", "float16", "bfloat16")


class Backend(Protocol):
    """A kernel library for some devices. `missing` says why it cannot be used here, or None."""

    @property
    def name(self) -> str: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    @property
    def kernels(self) -> Mapping[str, Kernel]: ...

    def version(self) -> str: ...

    def missing(self) -> str | None: ...

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]: ...


class Described:
    """A library whose descriptor says which kernels fit a region; what data cannot say, `offers` does. Unless it says otherwise it is a
    part of torch: always there, and torch's version is part of every target."""

    name: str
    devices: tuple[str, ...]
    kernels: Mapping[str, Kernel]

    def version(self) -> str:
        return "torch"

    def missing(self) -> str | None:
        return None

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        fit, refused = fitting(self, ctx)
        yield from refused
        why = self.broken(ctx.options.cache_dir) if fit else None
        for name in fit:
            if why is not None:
                yield ctx.reject(name, "library_import", why)
            else:
                yield from self.offers(ctx, name)

    def broken(self, cache_dir: str | None) -> str | None:
        """Why a library that is not missing cannot be imported, or None."""
        return None

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        """The candidates of one kernel whose declaration allows the region."""
        yield ctx.candidate(self.kernels[name])


def by_name(*kernels: Kernel) -> Mapping[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}
