"""LayerZero's own Triton kernels (lz_compiler/kernels), imported when a region asks for them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .. import semantics
from ..types import Candidate, Rejection
from .aten import paged_arguments
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name, natural_layout, quantize_rows, split_columns, stacked
from .folding import fold, folding_candidate

aten = torch.ops.aten

MULTIPROCESSORS = 132  # of Hopper's large chips, when planning for a card that is elsewhere


@functools.cache
def _kernels(module: str) -> ModuleType:
    return import_module(f"..kernels.{module}", __package__)


def _gemv(emit: Emitter, t: Values, p: Values) -> Any:
    op, width = _kernels("gemv").gemv._opoverload, p["width"]
    other = emit.call(aten.reshape.default, t["other"], [-1, width]) if "other" in t else None
    args = (t["x"], t["w"], t.get("bias"), other, t.get("scale"), p.get("act") or "", p.get("gated", False))
    return emit.call(op, *args, **dict(p["variant"]))


def _gemv_merged(emit: Emitter, t: Values, p: Values) -> tuple[Any, ...]:
    return split_columns(emit, _gemv(emit, t, {**p, "width": sum(p["widths"])}), p["widths"])


def _pack(emit: Emitter, t: Values, p: Values) -> Values:
    """The weights' rows one below the other, quantised where the candidate asks for it; their biases likewise."""
    weights = [t[r] for r in t if r[0] == "w"]
    biases = [t[r] for r in t if r[0] == "b"]
    kept: dict[str, Any] = {r: t[r] for r in t if r[0] not in "wb"}

    if biases:
        kept["bias"] = emit.constant(lambda *b: torch.cat(b), *biases)
    if not p["weight_dtype"]:
        return {**kept, "w": emit.constant(lambda *w: stacked(w, p), *weights)}
    dtype = semantics.torch_dtype(p["weight_dtype"])
    kept["w"] = emit.constant(lambda *w: quantize_rows(stacked(w, p), dtype)[0], *weights)
    return {**kept, "scale": emit.constant(lambda *w: quantize_rows(stacked(w, p), dtype)[1], *weights)}


def _prepared(emit: Emitter, t: Values, p: Values) -> Values:
    return _pack(emit, t, p) if p["weight_dtype"] else t


def _depthwise_weight(emit: Emitter, t: Values, p: Values) -> Values:
    return fold(emit, t, p, torch.clone)


def _depthwise(emit: Emitter, t: Values, p: Values) -> Any:
    op = _kernels("depthwise_conv").depthwise_conv._opoverload
    return emit.call(op, t["x"], t["w"], t["bias"], p["stride"][0], p["padding"][0], **dict(p["variant"]))


def _decode(emit: Emitter, t: Values, p: Values) -> Any:
    position, keys = semantics.mask_inputs(emit.call, t, p)
    op, scale = _kernels("decode_attention").decode_attention._opoverload, _scale(p)
    shift = p["shift"] if p["causal"] else p["keys"]  # not causal: every key comes before the last
    return emit.call(op, t["q"], t["k"], t["v"], position, keys, shift, p["window"], scale, **dict(p["variant"]))


def _attention(emit: Emitter, t: Values, p: Values) -> Any:
    position, keys = semantics.mask_inputs(emit.call, t, p)
    op, mask = _kernels("attention").attention._opoverload, (p["shift"], p["causal"], p["window"], p["uniform"])
    return emit.call(op, t["q"], t["k"], t["v"], position, keys, *mask, _scale(p), **dict(p["variant"]))


def _paged(emit: Emitter, t: Values, p: Values) -> Any:
    op = _kernels("paged_attention").paged_attention._opoverload
    return emit.call(op, *paged_arguments(t), _scale(p), p["layout"], **dict(p["variant"]))


def _scale(p: Values) -> float:
    return float(p["scale"] if p["scale"] is not None else p["head"] ** -0.5)


def _split_variants(batch: int, kv_heads: int, rows: int, length: int, head: int, size: int) -> Iterator[tuple[tuple[str, int], ...]]:
    """Tuning of a split-KV kernel: what should fill the card, and half and twice as many splits."""
    units = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else MULTIPROCESSORS
    first = _kernels("decode_attention").parameters(batch, kv_heads, rows, length, head, size, units)
    for splits in sorted({first["splits"], 2 * first["splits"], max(1, first["splits"] // 2)}):
        yield tuple({**first, "splits": splits}.items())


def _packs(p: Values) -> Hashable:
    return "stacked", p["weight_dtype"]


class Triton(Described):
    name = "triton"
    devices: tuple[str, ...] = ("cuda",)
    kernels = by_name(
        Kernel("triton.gemv", _gemv, _prepared, packs=_packs),
        Kernel("triton.gemv_merged", _gemv_merged, _pack, packs=_packs),
        Kernel("triton.gemv_gated", _gemv, _pack, packs=_packs),
        Kernel("triton.depthwise_conv", _depthwise, _depthwise_weight),
        Kernel("triton.decode_attention", _decode),
        Kernel("triton.attention", _attention),
        Kernel("triton.paged_attention", _paged),
    )

    def version(self) -> str:
        return "lz"  # each kernel carries its own; Triton's version comes with torch's

    def missing(self) -> str | None:
        return None if find_spec("triton") else "Triton is not installed: pip install 'lz-compiler[gpu]'"

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        match name:
            case "triton.depthwise_conv":
                for variant in _kernels("depthwise_conv").variants(ctx.outputs[0].shape[3], ctx.params["stride"][0]):
                    weight = {"layouts": {"w": natural_layout(ctx.spec("w"))}}
                    yield folding_candidate(ctx, self.kernels[name], variant=tuple(variant.items()), **weight)
            case "triton.attention":
                yield from self._attention(ctx)
            case "triton.decode_attention":
                yield from self._decode(ctx)
            case "triton.paged_attention":
                yield from self._paged(ctx)
            case _:
                yield from self._gemv(ctx, name)

    def _attention(self, ctx: SelectionContext) -> Iterable[Candidate]:
        q = ctx.spec("q")
        variant = _kernels("attention").parameters(q.shape[2], q.shape[3], 4 if q.dtype == "float32" else 2)
        yield ctx.candidate(self.kernels["triton.attention"], variant=tuple(variant.items()), head=q.shape[3])

    def _decode(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, q, (batch, heads, length, head) = "triton.decode_attention", ctx.spec("q"), ctx.spec("k").shape
        rows, most = q.shape[1] // heads * q.shape[2], _kernels("decode_attention").MAX_ROWS
        if rows > most:
            yield ctx.reject(name, "shape", f"at most {most} queries for each key-value head")
            return
        for variant in _split_variants(batch, heads, rows, length, head, 4 if q.dtype == "float32" else 2):
            yield ctx.candidate(self.kernels[name], variant=variant, head=head)

    def _paged(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, q, cache = "triton.paged_attention", ctx.spec("q"), ctx.kv_cache
        assert cache is not None
        rows, most = q.shape[1] // cache.kv_heads * q.shape[2], _kernels("decode_attention").MAX_ROWS
        if rows > most:
            yield ctx.reject(name, "shape", f"at most {most} queries for each key-value head")
            return
        size = 4 if q.dtype == "float32" else 2
        for variant in _split_variants(q.shape[0], cache.kv_heads, rows, ctx.params["keys"], cache.head_size, size):
            yield ctx.candidate(self.kernels[name], variant=variant, head=cache.head_size)

    def _gemv(self, ctx: SelectionContext, name: str) -> Iterable[Candidate]:
        (rows, inner), gated = ctx.spec("x").shape, ctx.region.op == "gated_linear"
        frozen = all(r in ctx.frozen for r in ctx.roles if r[0] in "wb")
        width = sum(ctx.params["widths"]) if "widths" in ctx.params else ctx.params["width"]
        lossy = ("int8", "float8_e4m3fn") if frozen and ctx.options.error_budget > 0 else ()
        layouts = {r: "packed" for r in ctx.roles if r[0] in "wb"} if ctx.region.op != "linear" or ctx.params["transposed"] else {}
        for dtype in ("", *lossy):
            if ctx.params.get("transposed") and ctx.region.op == "linear" and not dtype:
                continue
            extra: dict[str, Any] = {"weight_dtype": dtype, "gated": gated, **({"lossy": dtype} if dtype else {})}
            size = 1 if dtype else 2
            for variant in _kernels("gemv").variants(rows, width, inner, size):
                if ctx.spec("x").dtype == "float32" and variant.get("dot"):
                    continue
                packed = {"w": "packed"} if dtype and ctx.region.op == "linear" else layouts
                yield ctx.candidate(self.kernels[name], layouts=packed, variant=tuple(variant.items()), **extra)
