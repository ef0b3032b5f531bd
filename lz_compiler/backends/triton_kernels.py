"""LayerZero's own Triton kernels (lz_compiler/kernels), imported when a region asks for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .. import semantics
from ..types import Candidate, Rejection
from .aten import paged_arguments
from .base import Emitter, Kernel, SelectionContext, Values, natural_layout, quantize_rows, split_columns, stacked
from .folding import fold_constants, folded, folding_candidate

aten = torch.ops.aten

MAX_ROWS = 8  # of x, beyond which tensor cores win
MAX_QUERIES = 8
MIN_KEYS = 16  # with a single key and a key mask the decode kernel has faulted on an H200 now and then, for a reason not found
MULTIPROCESSORS = 132  # of Hopper's large chips, when planning for a card that is elsewhere
FLOATS = ("bfloat16", "float16", "float32")


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
    if p["is_frozen"]:
        return fold_constants(emit, t, p, torch.clone)
    weight, bias = folded(emit, t, p)
    return {**t, "w": weight, "bias": bias}


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


class Triton:
    name = "triton"
    devices: tuple[str, ...] = ("cuda",)
    kernels: Mapping[str, Kernel] = {
        kernel.name: kernel
        for kernel in (
            Kernel("triton.gemv", _gemv, _prepared),
            Kernel("triton.gemv_merged", _gemv_merged, _pack),
            Kernel("triton.gemv_gated", _gemv, _pack),
            Kernel("triton.depthwise_conv", _depthwise, _depthwise_weight),
            Kernel("triton.decode_attention", _decode),
            Kernel("triton.attention", _attention),
            Kernel("triton.paged_attention", _paged),
        )
    }

    def version(self) -> str:
        return "lz"  # each kernel carries its own; Triton's version comes with torch's

    def missing(self) -> str | None:
        return None if find_spec("triton") else "Triton is not installed: pip install 'lz-compiler[gpu]'"

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        if ctx.region.op in ("linear", "merged_linear", "gated_linear"):
            yield from self._gemv(ctx)
        elif ctx.region.op == "conv":
            yield from self._depthwise(ctx)
        elif ctx.region.op == "attention":
            yield from self._attention(ctx)
        elif ctx.region.op == "paged_attention":
            yield from self._paged(ctx)

    def _attention(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, p, (q, k, v) = "triton.attention", ctx.params, (ctx.spec(r) for r in "qkv")
        if "mask" in ctx.roles or (p["causal"] and ctx.default and p["queries"] != p["keys"]):
            yield ctx.reject(name, "mask", "needs a mask that was understood, or none")
        elif q.dtype not in FLOATS:
            yield ctx.reject(name, "dtype", f"{', '.join(FLOATS)}, not {q.dtype}")
        elif len({len(s.shape) for s in (q, k, v)} | {4}) > 1 or k.shape != v.shape or q.shape[0] != k.shape[0]:
            yield ctx.reject(name, "shape", "(batch, heads, length, size), k like v, one batch")
        elif p["dynamic_rows"] or any(0 in s.shape for s in ctx.specs) or any(s.stride[-1] != 1 for s in (q, k, v)):
            yield ctx.reject(name, "dynamic_shape", "fixed shapes with elements, head dimension contiguous")
        elif q.shape[3] > 256 or q.shape[1] % k.shape[1]:
            yield ctx.reject(name, "shape", "heads of at most 256, as many in q as in k or a multiple")
        elif p["uniform"] and (p["causal"] or p["window"]):
            yield ctx.reject(name, "mask", "a row that sees no key is 0 here, and the mean of v in eager")
        elif p["scale"] is not None and p["scale"] <= 0:
            yield ctx.reject(name, "scale", "a scale above 0")
        else:
            size, rows = 4 if q.dtype == "float32" else 2, q.shape[1] // k.shape[1] * q.shape[2]
            first = _kernels("attention").parameters(q.shape[2], q.shape[3], size)
            narrow = {"block_n": 64, "warps": 4 if q.shape[3] <= 64 else 8, "stages": 3}
            for variant in (first, {**first, **narrow}) if size == 2 and q.shape[2] > 64 else (first,):
                yield ctx.candidate(self.kernels[name], variant=tuple(variant.items()), head=q.shape[3])
            bounded = p["causal"] or not p["window"]
            fits = q.shape[2] <= MAX_QUERIES and rows <= _kernels("decode_attention").MAX_ROWS and bounded and not p["uniform"]
            if fits and k.shape[2] >= MIN_KEYS:
                yield from self._decode(ctx, rows, size)

    def _decode(self, ctx: SelectionContext, rows: int, size: int) -> Iterable[Candidate]:
        batch, heads, length, head = ctx.spec("k").shape
        for variant in _split_variants(batch, heads, rows, length, head, size):
            yield ctx.candidate(self.kernels["triton.decode_attention"], variant=variant, head=head)

    def _paged(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, q, cache, p = "triton.paged_attention", ctx.spec("q"), ctx.kv_cache, ctx.params
        assert cache is not None
        rows, most = q.shape[1] // cache.kv_heads * q.shape[2], _kernels("decode_attention").MAX_ROWS
        if q.dtype not in FLOATS:
            yield ctx.reject(name, "dtype", f"{', '.join(FLOATS)}, not {q.dtype}")
        elif p["dynamic_rows"] or any(0 in s.shape for s in ctx.specs):
            yield ctx.reject(name, "dynamic_shape", "fixed shapes with elements")
        elif any(ctx.spec(role).stride[-1] != 1 for role in ("q", "k_cache", "v_cache")):
            yield ctx.reject(name, "stride", "the head dimension must be contiguous")
        elif cache.head_size > 256 or rows > most:
            yield ctx.reject(name, "shape", f"heads of at most 256, at most {most} queries for each key-value head")
        elif p["scale"] is not None and p["scale"] <= 0:
            yield ctx.reject(name, "scale", "a scale above 0")
        else:
            size = 4 if q.dtype == "float32" else 2
            for variant in _split_variants(q.shape[0], cache.kv_heads, rows, p["keys"], cache.head_size, size):
                yield ctx.candidate(self.kernels[name], variant=variant, head=cache.head_size)

    def _depthwise(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name, p, x, (channels, _, *size) = "triton.depthwise_conv", ctx.params, ctx.spec("x"), ctx.spec("w").shape
        if x.dtype not in FLOATS:
            yield ctx.reject(name, "dtype", f"{', '.join(FLOATS)}, not {x.dtype}")
        elif p["groups"] != channels or channels == 1 or channels != x.shape[1] or max(size) > 7 or set(p["dilation"]) != {1}:
            yield ctx.reject(name, "shape", "one filter a channel of several, at most 7x7, not dilated")
        elif len({*p["stride"]}) > 1 or len({*p["padding"]}) > 1 or p["dynamic_rows"] or 0 in x.shape:
            yield ctx.reject(name, "shape", "equal strides and paddings, fixed and not empty")
        elif p["act"] or p["binary"]:
            yield ctx.reject(name, "epilogue", "ends with a bias only")
        else:
            for variant in _kernels("depthwise_conv").variants(ctx.outputs[0].shape[3]):
                weight = {"layouts": {"w": natural_layout(ctx.spec("w"))}}
                yield folding_candidate(ctx, self.kernels[name], variant=tuple(variant.items()), **weight)

    def _gemv(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        name = {"linear": "triton.gemv", "merged_linear": "triton.gemv_merged", "gated_linear": "triton.gemv_gated"}[ctx.region.op]
        p, x, frozen = ctx.params, ctx.spec("x"), all(r in ctx.frozen for r in ctx.roles if r[0] in "wb")
        if x.dtype not in FLOATS:
            yield ctx.reject(name, "dtype", f"{', '.join(FLOATS)}, not {x.dtype}")
        elif p["dynamic_rows"] or not 1 <= x.shape[0] <= MAX_ROWS or 0 in ctx.outputs[0].shape or x.stride[-1] != 1:
            yield ctx.reject(name, "shape", f"one to {MAX_ROWS} rows, fixed, contiguous")
        elif p.get("binary") and (p["act"] or p["binary"] != "add"):
            yield ctx.reject(name, "epilogue", "an activation or a residual, not both")
        elif p.get("act") not in (None, "relu", "silu", "gelu", "gelu_tanh"):
            yield ctx.reject(name, "epilogue", f"no fused {p['act']}")
        elif not frozen and p.get("transposed"):
            yield ctx.reject(name, "stride", "reads the weight row by row")
        elif ctx.region.op == "linear" and any(spec.stride[-1] != 1 for spec in ctx.specs):
            yield ctx.reject(name, "stride", "the last dimension of each input must be contiguous")
        else:
            yield from self._variants(ctx, name, frozen)

    def _variants(self, ctx: SelectionContext, name: str, frozen: bool) -> Iterable[Candidate]:
        (rows, inner), gated = ctx.spec("x").shape, ctx.region.op == "gated_linear"
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
