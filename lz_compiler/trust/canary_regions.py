"""The small regions that a canary tries kernels on: every operation with each of its features, in each layout, at boundary shapes;
and the name of the capability that a candidate needs, the same for a region of a model and for one made here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import semantics
from ..backends.base import SelectionContext, natural_layout
from ..kv_cache import KVCacheSpec
from ..options import Options
from ..types import Candidate, Region, TensorSpec

# With a budget, lossy kernels are offered too; their mode offers compiled ones, and none is refused for CUDA graphs' sake.
OPTIONS = Options(error_budget=0.5, mode="max-autotune-no-cudagraphs", freeze=True)
LAYOUTS = ("contiguous", "channels_last", "rows", "strided")  # rows: only the last dimension is contiguous
# The first of each is odd on purpose: where trying takes long, it is the only one.
PRODUCTS = ((17, 33, 47), (16, 64, 32), (8, 128, 64), (1, 16, 16), (1, 1, 1), (129, 31, 65))  # rows, inner, width
IMAGES = ((2, 16, 9, 5), (1, 1, 1, 1), (1, 3, 7, 7), (2, 32, 14, 14))
ATTENTIONS = ((2, 4, 17, 33, 64), (1, 2, 16, 16, 16), (1, 4, 1, 40, 64), (1, 2, 65, 65, 128), (1, 1, 1, 1, 8))  # B, H, Q, K, D
PAGES = ((1, 2, 1, 16, 4, 64), (2, 4, 1, 16, 3, 128), (2, 4, 3, 8, 5, 64))  # B, H, Q, page size, pages each, D


def strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Strides in elements: `rows` as in a slice of wider rows, `strided` as in a transposed tensor."""
    if layout == "channels_last" and len(shape) == 4:
        _, c, h, w = shape
        return c * h * w, 1, c * w, c
    order = range(len(shape)) if layout == "strided" else reversed(range(len(shape)))
    found, step = [0] * len(shape), 1
    for i, dim in enumerate(order):
        found[dim] = step
        step *= shape[dim] + (8 if layout == "rows" and i == 0 else 0)
    return tuple(found)


def layout_of(spec: TensorSpec) -> str:
    """Which of LAYOUTS a tensor has; dimensions of size 1 have none."""
    real = [(size, step) for size, step in zip(spec.shape, spec.stride, strict=True) if size != 1]
    wanted = 1
    for size, step in reversed(real):
        if step != wanted:
            break
        wanted *= size
    else:
        return "contiguous"
    if natural_layout(spec) == "channels_last":
        return "channels_last"
    return "rows" if real[-1][1] == 1 and spec.shape[-1] != 1 else "strided"


def worst_layout(specs: Iterable[TensorSpec]) -> str:
    return max(("contiguous", *map(layout_of, specs)), key=LAYOUTS.index)


def feature_of(ctx: SelectionContext) -> str:
    """What a region asks of a kernel beside the plain operation: `bias+gelu+frozen`, `causal+window`, or `plain`."""
    p, has = ctx.params, set(ctx.roles)
    weights = [r for r in ctx.roles if r[0] in "wbc" and r not in ("b", "block_table")]
    words = ["bias"] * bool(has & {"bias", "b0"}) + ["affine"] * bool(p.get("affine")) + [str(p[k]) for k in ("binary", "act") if p.get(k)]
    words += [k for k in ("transposed", "causal", "gqa", "window", "shift", "uniform", "scale") if p.get(k)]
    if ctx.region.op == "conv":
        pointwise = p["w_shape"][2:] == (1, 1)
        words += ["pointwise"] * pointwise + ["grouped"] * (p["groups"] > 1) + ["dilated"] * (max(p["dilation"]) > 1)
    if ctx.region.op == "attention":
        words += ["position"] * ("position" in has) + ["keys"] * any(r.startswith("keys") for r in has)
        words += [f"mask:{ctx.spec('mask').dtype}"] if "mask" in has else []
    words += [str(p["layout"])] if ctx.region.op == "paged_attention" else []
    words += ["frozen"] * (bool(weights) and all(r in ctx.frozen for r in weights))
    return "+".join(words) or "plain"


def capability_of(ctx: SelectionContext, candidate: Candidate) -> str:
    """`kernel|operation|dtype|layout|feature`: what must have passed for the candidate to be trusted there.

    The layout is the worst of what the kernel itself reads; conversions and packing come before it.
    """
    found = ["contiguous"]
    for spec, fmt in zip(ctx.specs, candidate.in_formats, strict=True):
        if fmt.layout == "channels_last" and len(spec.shape) == 4:
            found.append("channels_last" if layout_of(spec) != "contiguous" or spec.shape[1] > 1 else "contiguous")
        elif fmt.layout != "packed":
            found.append(layout_of(spec))
    params, dtype = dict(candidate.params), ctx.specs[0].dtype
    inner = params.get("weight_dtype") or candidate.in_formats[0].dtype
    dtype += f">{inner}" if inner != dtype else ""
    return "|".join((candidate.kernel, ctx.region.op, dtype, max(found, key=LAYOUTS.index), feature_of(ctx)))


def contexts(op: str, dtype: str, device: str) -> Iterator[tuple[str, SelectionContext]]:
    """(shape as text, region) for every feature, layout and boundary shape of one operation."""
    regions: Callable[[_Maker], Iterator[tuple[str, SelectionContext]]] = {
        "linear": _linear, "merged_linear": _merged, "gated_linear": _gated, "bmm": _bmm, "conv": _conv, "attention": _attention,
        "paged_attention": _paged,
    }[op]  # fmt: skip
    for layout in ("contiguous", "channels_last", "strided") if op == "conv" else ("contiguous", "rows", "strided"):
        made = regions(_Maker(op, dtype, device, layout))
        # Sizes of 1 have no stride: such a region is the contiguous one again.
        yield from ((text, ctx) for text, ctx in made if worst_layout(ctx.specs) == layout)


@dataclass(frozen=True, slots=True)
class _Maker:
    op: str
    dtype: str
    device: str
    layout: str

    def __call__(
        self, inputs: Mapping[str, Sequence[int]], outputs: Sequence[Sequence[int]], params: Mapping[str, Any], *,
        frozen: bool = False, default: bool = False, dtypes: Mapping[str, str] | None = None, kv_cache: KVCacheSpec | None = None,
        laid_out: Sequence[str] | None = None,
    ) -> SelectionContext:  # fmt: skip
        """A region of these inputs by role; `laid_out` have the layout: those that flow through a network, if not told otherwise."""
        specs = [
            TensorSpec(tuple(shape), strides(shape, self.layout if role in (laid_out or _FLOWING) else "contiguous"),
                       (dtypes or {}).get(role, self.dtype), self.device)
            for role, shape in inputs.items()
        ]  # fmt: skip
        plain = self.device == "cuda" and self.dtype == "float64"  # not by cuDNN, and what torch uses instead keeps no channels last
        out_layout = "channels_last" if self.op == "conv" and self.layout == "channels_last" and not plain else "contiguous"
        outs = tuple(TensorSpec(tuple(shape), strides(shape, out_layout), self.dtype, self.device) for shape in outputs)
        region = Region(self.op, ("node",), tuple(inputs), tuple(f"out{i}" for i in range(len(outs))))
        constants = frozenset(r for r in inputs if r not in _FLOWING) if frozen else frozenset()
        return SelectionContext(region, tuple(inputs), tuple(specs), outs, {**params, "values": tuple(inputs)}, constants, OPTIONS,
                                default, kv_cache)  # fmt: skip


_FLOWING = ("x", "other", "a", "b", "q", "k", "v", "k_cache", "v_cache")
_Made = Iterator[tuple[str, SelectionContext]]


def _linear(make: _Maker) -> _Made:
    plain: dict[str, Any] = {"bias": False, "act": None, "binary": None, "transposed": False}
    wanted = [{**plain, "bias": bias, "transposed": turned} for bias in (False, True) for turned in (False, True)]
    wanted += [{**plain, "bias": True, "act": act} for act in semantics.ACTIVATIONS]
    wanted += [{**plain, "bias": True, "binary": binary} for binary in ("add", "mul")]
    for want, frozen, (m, k, n) in itertools.product(wanted, (False, True), PRODUCTS):
        extended = want["act"] or want["binary"]
        if extended and (m, k, n) not in PRODUCTS[:3]:
            continue
        inputs = {"x": (m, k), "w": (k, n) if want["transposed"] else (n, k), **({"bias": (n,)} if want["bias"] else {})}
        inputs |= {"other": (m, n)} if want["binary"] else {}
        params = {"transposed": want["transposed"], "rows": m, "width": n, "act": want["act"], "binary": want["binary"],
                  "dynamic_rows": False, "out_reshape": ""}  # fmt: skip
        yield f"{m}x{k}x{n}", make(inputs, [(m, n)], params, frozen=frozen, default=not extended)


def _merged(make: _Maker) -> _Made:
    for biased, turned, (m, k, n) in itertools.product((False, True), (False, True), PRODUCTS):
        widths = (n, 16, n)
        inputs: dict[str, Sequence[int]] = {
            "x": (m, k),
            **{f"w{i}": (k, width) if turned else (width, k) for i, width in enumerate(widths)},
        }
        inputs |= {f"b{i}": (width,) for i, width in enumerate(widths)} if biased else {}
        params = {"count": 3, "widths": widths, "transposed": turned, "rows": m, "dynamic_rows": False}
        yield f"{m}x{k}x{n}", make(inputs, [(m, width) for width in widths], params, frozen=True)


def _gated(make: _Maker) -> _Made:
    for biased, act, (m, k, n) in itertools.product((False, True), ("silu", "gelu", "gelu_tanh", "relu"), PRODUCTS):
        inputs = {"x": (m, k), "w0": (n, k), "w1": (n, k), **({"b0": (n,), "b1": (n,)} if biased else {})}
        params = {"rows": m, "dynamic_rows": False, "width": n, "act": act, "out_reshape": ""}
        yield f"{m}x{k}x{n}", make(inputs, [(m, n)], params, frozen=True)


def _bmm(make: _Maker) -> _Made:
    for m, k, n in PRODUCTS:
        yield f"3x{m}x{k}x{n}", make({"a": (3, m, k), "b": (3, k, n)}, [(3, m, n)], {}, default=True)


_WINDOWS = (  # filter, stride, padding, dilation, groups (0: one for each channel)
    (1, 1, 0, 1, 1), (1, 2, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (2, 2, 0, 1, 1), (3, 1, 2, 2, 1), (3, 1, 1, 1, 0), (5, 2, 2, 1, 0),
)  # fmt: skip


def _conv(make: _Maker) -> _Made:
    plain: dict[str, Any] = {"bias": False, "affine": (), "act": None, "binary": None}
    wanted = [plain, {**plain, "bias": True}, {**plain, "affine": ("sub", "mul", "mul", "add")}]
    wanted += [{**plain, "bias": True, "act": act} for act in ("relu", "silu", "sigmoid", "tanh", "gelu")]
    wanted += [{**plain, "bias": True, "binary": "add", "act": act} for act in (None, "relu")]
    wanted += [{**plain, "affine": ("mul", "add"), "act": "relu"}]
    for want, frozen, window, (b, c, h, w) in itertools.product(wanted, (False, True), _WINDOWS, IMAGES):
        size, step, pad, dilation, groups = window
        extended = want["affine"] or want["act"] or want["binary"]
        out = [(n + 2 * pad - dilation * (size - 1) - 1) // step + 1 for n in (h, w)]
        if min(out) < 1 or (extended and (b, c, h, w) != IMAGES[0]) or (groups == 0 and c == 1):
            continue
        filters = c if groups == 0 else c + 8
        inputs: dict[str, Sequence[int]] = {"x": (b, c, h, w), "w": (filters, 1 if groups == 0 else c, size, size)}
        inputs |= {"bias": (filters,)} if want["bias"] else {}
        inputs |= {f"c{i}": (1, filters, 1, 1) for i in range(len(want["affine"]))}
        shape = (b, filters, *out)
        inputs |= {"other": shape} if want["binary"] else {}
        params = {
            "stride": (step, step), "padding": (pad, pad), "dilation": (dilation, dilation), "groups": groups or c, "size": (b, c, h, w),
            "w_shape": inputs["w"], "affine": want["affine"], "act": want["act"], "binary": want["binary"],
            "rows": b * math.prod(out), "dynamic_rows": False,
        }  # fmt: skip
        text = f"{b}x{c}x{h}x{w} {size}x{size}/{step}"
        yield text, make(inputs, [shape], params, frozen=frozen, default=not extended)


_PREDICATES: tuple[dict[str, Any], ...] = (  # of attention: what its own arguments or an understood mask say
    {}, {"causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "same"}, {"mask": "same", "laid_out": ("mask",)},
    {"gqa": True}, {"gqa": True, "causal": True},
    {"understood": True, "causal": True}, {"understood": True, "causal": True, "shift": True},
    {"understood": True, "causal": True, "window": 7}, {"understood": True, "causal": True, "position": True},
    {"understood": True, "keys": True}, {"understood": True, "causal": True, "keys": True},
    {"understood": True, "causal": True, "position": True, "gqa": True}, {"understood": True, "causal": True, "uniform": True},
)  # fmt: skip


def _attention(make: _Maker) -> _Made:
    for want, (b, h, q, k, d) in itertools.product(_PREDICATES, ATTENTIONS):
        understood, grouped = want.get("understood", False), want.get("gqa", False) and h > 1
        laid_out = want.get("laid_out")
        if (want.get("causal") and q > k) or (want.get("gqa") and h == 1) or (laid_out and make.layout == "contiguous"):
            continue
        inputs: dict[str, Sequence[int]] = {"q": (b, h, q, d), **dict.fromkeys("kv", (b, h // 2 if grouped else h, k, d))}
        dtypes = {"mask": "bool" if want.get("mask") == "bool" else make.dtype, "position": "int64", "keys0": "bool"}
        reads: tuple[Any, ...] = (("position", (0,), 0, False),) if want.get("position") else ()
        reads += (("keys0", ("batch", "key"), 0, False),) if want.get("keys") else ()
        inputs |= {"mask": (b, 1, q, k)} if want.get("mask") else {}
        inputs |= {role: (1,) if role == "position" else (b, k) for role, *_ in reads}
        params = {
            "causal": want.get("causal", False), "scale": want.get("scale"), "gqa": grouped, "dynamic_rows": False, "queries": q,
            "keys": k, "shift": k - q if want.get("shift") else 0, "window": want.get("window", 0), "uniform": want.get("uniform", False),
            "square": q == k, **({"reads": reads, "mask": "canary"} if understood else {}),
        }  # fmt: skip
        yield f"{b}x{h}x{q}x{k}x{d}", make(inputs, [(b, h, q, d)], params, default=not understood, dtypes=dtypes, laid_out=laid_out)


def _paged(make: _Maker) -> _Made:
    for layout, (b, h, q, page, count, d), grouped in itertools.product(("NHD", "HND"), PAGES, (False, True)):
        heads = h // 2 if grouped else h
        cache = (b * count, page, heads, d) if layout == "NHD" else (b * count, heads, page, d)
        inputs = {"q": (b, h, q, d), "k_cache": cache, "v_cache": cache, "block_table": (b, count), "seq_lens": (b,)}
        params = {"scale": None, "layout": layout, "page_size": page, "keys": count * page, "pages": b * count, "dynamic_rows": False}
        spec = KVCacheSpec(
            strategy="paged", page_size=page, layout=layout, kv_heads=heads, head_size=d, dtype=make.dtype, device=make.device
        )
        dtypes = {"block_table": "int32", "seq_lens": "int32"}
        yield f"{b}x{h}x{q}x{count}*{page}x{d}", make(inputs, [(b, h, q, d)], params, default=True, dtypes=dtypes, kv_cache=spec)
