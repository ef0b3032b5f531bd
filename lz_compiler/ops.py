"""LayerZero's operators: one per kernel that a plan may place in a graph.

Each is a thin name over a vendor's operator. Inductor lowers it to a direct call of that operator with an explicit input
layout (torch_private.lower_to), so at run time nothing of LayerZero stands between kernels. Run eagerly, they do the same.
Importing this module registers them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import torch_private
from .errors import unknown
from .kv_cache import LAYOUTS

mkldnn = torch.ops.mkldnn
aten = torch.ops.aten

_lib = torch.library.Library("lz", "DEF")
RUNS: dict[str, Callable[..., Any]] = {}  # operator -> the Python function that it runs


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], layout: torch.Tag = torch.Tag.flexible_layout) -> Any:
    """`flexible_layout`: the operator's lowering says which layouts it needs (Inductor would copy for any other tag first)."""
    name = schema.split("(")[0]
    RUNS[name] = run
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, layout))
    # Every backend key: a packed weight is an opaque oneDNN tensor and dispatches on its own key.
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lz::{name}", fake, lib=_lib)
    return getattr(torch.ops.lz, name).default


# --- products: x (..., K) with weight (N, K), plain or packed ---------------------------------------------------------


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_binary_fake(x: Tensor, other: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """Where something else stands before the weight."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_run(x: Tensor, weight: Tensor, bias: Tensor | None, attr: str, algorithm: str) -> Tensor:
    return mkldnn._linear_pointwise(x.contiguous(), weight, bias, attr, [], algorithm)


def _linear_binary_run(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, attr: str) -> Tensor:
    return mkldnn._linear_pointwise.binary(x.contiguous(), other.contiguous(), weight, bias, attr)


linear = define("linear(Tensor x, Tensor weight, Tensor? bias, str attr, str algorithm) -> Tensor", _linear_run, _linear_fake)
linear_binary = define(
    "linear_binary(Tensor x, Tensor other, Tensor weight, Tensor? bias, str attr) -> Tensor",
    _linear_binary_run,
    _linear_binary_fake,
)


if torch.backends.mkl.is_available():
    mkl_linear = define(
        "mkl_linear(Tensor x, Tensor packed, Tensor weight, Tensor? bias, int rows) -> Tensor",
        lambda x, packed, weight, bias, rows: torch.ops.mkl._mkl_linear(x.contiguous(), packed, weight, bias, rows),
        _linear_binary_fake,
    )


# --- convolutions: x (N, C, H, W), channels last in and out -----------------------------------------------------------


def _conv_shape(x: Tensor, weight: Tensor, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[Any]:
    spatial = [(x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return [x.shape[0], weight.shape[0], *spatial]


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], stride: list[int], dilation: list[int], *_: Any
) -> Tensor:
    shape = _conv_shape(x, weight, padding, stride, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv_binary_fake(x: Tensor, other: Tensor, *rest: Any) -> Tensor:
    return _conv_fake(x, *rest)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_CONV = "Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups, str attr"
conv = define(
    f"conv(Tensor x, {_CONV}) -> Tensor",
    lambda x, w, b, padding, stride, dilation, groups, attr: mkldnn._convolution_pointwise(
        _nhwc(x), w, b, padding, stride, dilation, groups, attr, [], ""
    ),
    _conv_fake,
)
conv_binary = define(
    f"conv_binary(Tensor x, Tensor other, {_CONV}, str? unary) -> Tensor",
    lambda x, other, w, b, padding, stride, dilation, groups, attr, unary: mkldnn._convolution_pointwise.binary(
        _nhwc(x), _nhwc(other), w, b, padding, stride, dilation, groups, attr, None, unary, [], ""
    ),
    _conv_binary_fake,
)


# --- CUDA: products that end in an activation, convolutions that end in relu (channels last) ---------------------------

addmm_activation = define(
    "addmm_activation(Tensor bias, Tensor x, Tensor weight, bool gelu) -> Tensor",
    lambda bias, x, weight, gelu: aten._addmm_activation(bias, x.contiguous(), weight.t(), use_gelu=gelu),
    lambda bias, x, weight, gelu: x.new_empty((x.shape[0], weight.shape[0])),
)


def _cudnn_fake(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:  # fmt: skip
    return _conv_fake(x, weight, None, padding, stride, dilation)


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
cudnn_conv = define(
    f"cudnn_conv(Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor",
    lambda x, w, stride, padding, dilation, groups: aten.convolution(
        _nhwc(x), _nhwc(w), None, stride, padding, dilation, False, [0, 0], groups
    ),
    _cudnn_fake,
)
cudnn_conv_relu = define(
    f"cudnn_conv_relu(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    lambda x, w, bias, *geometry: aten.cudnn_convolution_relu(_nhwc(x), _nhwc(w), bias, *geometry),
    lambda x, w, bias, *geometry: _cudnn_fake(x, w, *geometry),
)
cudnn_conv_add_relu = define(
    f"cudnn_conv_add_relu(Tensor x, Tensor weight, Tensor other, Tensor? bias, {_GEOMETRY}) -> Tensor",
    lambda x, w, other, bias, *geometry: aten.cudnn_convolution_add_relu(_nhwc(x), _nhwc(w), _nhwc(other), 1.0, bias, *geometry),
    lambda x, w, other, bias, *geometry: _cudnn_fake(x, w, *geometry),
)


# --- attention: q (B, H, Q, D), k and v (B, G, K, D); kept whole until the plan decides --------------------------------

_SDPA = "Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, bool enable_gqa"


def _sdpa_run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _sdpa_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    torch._check(k.shape[-2] == v.shape[-2])  # caches of keys and of values have a symbol each, which no rule of ATen's ties
    return _sdpa_run(q, k, v, *rest)


_FIXED = torch.Tag.needs_fixed_stride_order
sdpa = define(f"sdpa({_SDPA}) -> Tensor", _sdpa_run, _sdpa_fake, _FIXED)


def _sdpa_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa_run(q, k, v, mask, is_causal, scale, enable_gqa)


sdpa_math = define(f"sdpa_math({_SDPA}) -> Tensor", _sdpa_math, lambda q, k, v, *_: q.new_empty((*q.shape[:-1], v.shape[-1])), _FIXED)


# --- attention over a paged cache -------------------------------------------------------------------------------------------


def _paged_check(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, layout: str) -> None:
    check = torch._check_value
    check(layout in LAYOUTS, lambda: f"paged_attention: {unknown('layout', layout, LAYOUTS)}")
    check(
        q.dim() == k_cache.dim() == v_cache.dim() == 4 and block_table.dim() == 2 and seq_lens.dim() == 1,
        lambda: "paged_attention: give q and the caches with 4 dimensions, block_table with 2, seq_lens with 1",
    )
    kv_heads = k_cache.shape[2 if layout == "NHD" else 1]
    check(
        k_cache.shape == v_cache.shape and q.shape[3] == k_cache.shape[3] and q.shape[1] % kv_heads == 0,
        lambda: f"paged_attention: q {tuple(q.shape)} does not fit caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} in {layout}",
    )
    check(
        q.shape[0] == block_table.shape[0] and q.shape[0] == seq_lens.shape[0],
        lambda: f"paged_attention: q has {q.shape[0]} batch entries, block_table {block_table.shape[0]}, seq_lens {seq_lens.shape[0]}",
    )
    check(
        q.dtype == k_cache.dtype == v_cache.dtype and not block_table.is_floating_point() and not seq_lens.is_floating_point(),
        lambda: "paged_attention: q and both caches need one dtype, block_table and seq_lens whole numbers",
    )


def _gathered(cache: Tensor, pages: Tensor, hidden: Tensor, layout: str) -> Tensor:
    """The tokens of each batch entry one after the other, (B, G, K, D); what is hidden (B, K) is 0, so that nothing in it leaks."""
    batch, count = pages.shape
    own = cache.index_select(0, pages.reshape(-1)).unflatten(0, (batch, count))
    own = own.transpose(2, 3) if layout == "HND" else own
    return own.flatten(1, 2).masked_fill(hidden[:, :, None, None], 0).transpose(1, 2)


def _paged_run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float | None = None, layout: str = "NHD"
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v over the tokens that block tables point to, (B, H, Q, D) in memory order (B, Q, H, D).

    q is (B, H, Q, D), its queries the last Q tokens of each batch entry; the caches are (pages, page_size, G, D), or for layout
    "HND" (pages, G, page_size, D), in q's dtype, with G dividing H; block_table is (B, max_pages), seq_lens (B,), both int32 or
    int64. Token j of batch b stands in page block_table[b, j // page_size] at j % page_size. Query i sees the tokens
    j < seq_lens[b] - Q + 1 + i; one that sees none (an entry with seq_lens 0) is 0. seq_lens is at most max_pages * page_size.
    scale: D**-0.5 if None. Sums are float32, or float64 for float64.

    Entries of block_table past a length may hold anything, and so may tokens that no query sees. Pages may be shared. For
    inference: it has no backward formula. Raises ValueError where shapes or dtypes do not fit each other.
    """
    _paged_check(q, k_cache, v_cache, block_table, seq_lens, layout)
    batch, heads, queries, head = q.shape
    kv_heads, page_size = (k_cache.shape[i] for i in ((2, 1) if layout == "NHD" else (1, 2)))
    count = block_table.shape[1]
    if not q.is_cuda:  # on a GPU the longest length is not known without waiting for it
        count = min(count, -(-int(seq_lens.max()) // page_size)) if batch else 0
    result = q.new_zeros((batch, queries, heads, head)).transpose(1, 2)
    if not q.numel() or not count:
        return result
    lengths = seq_lens[:, None]
    used = torch.arange(count, device=q.device) * page_size < lengths
    pages = block_table[:, :count].masked_fill(~used, 0)
    tokens = torch.arange(count * page_size, device=q.device)
    k, v = (_gathered(cache, pages, tokens >= lengths, layout) for cache in (k_cache, v_cache))
    # Heads of one group as further queries: each key and value is read once, and no kernel has to know about groups.
    last = (lengths - queries + torch.arange(queries, device=q.device)).repeat(1, heads // kv_heads)[:, None, :, None]
    folded = q.reshape(batch, kv_heads, -1, head)
    out = F.scaled_dot_product_attention(folded, k, v, tokens <= last, scale=scale)
    return result.copy_(out.masked_fill_(last < 0, 0).reshape(q.shape))  # 0 also where q is NaN


def _paged_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float | None = None, layout: str = "NHD"
) -> Tensor:  # fmt: skip
    _paged_check(q, k_cache, v_cache, block_table, seq_lens, layout)
    batch, heads, queries, head = q.shape
    return q.new_empty((batch, queries, heads, head)).transpose(1, 2)


paged_attention = define(
    'paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, float? scale=None, str layout="NHD")'
    " -> Tensor",
    _paged_run,
    _paged_fake,
)


# --- all-reduce over memory that the GPUs of one machine share ---------------------------------------------------------------


def _all_reduce_run(x: Tensor, variant: str, group: str) -> Tensor:
    """The sum of every rank's x, contiguous. All ranks of the group call it in the same order, on one stream: they share one buffer.

    one_shot: each rank reads all others' whole tensors. two_shot: each sums its part of them, then reads the other parts
    (torch.distributed._symmetric_memory). ValueError for another variant.
    """
    torch._check_value(variant in ("one_shot", "two_shot"), lambda: unknown("variant", variant, ("one_shot", "two_shot")))
    x = x.contiguous()
    buffer = torch_private.symmetric_buffer(group, x.numel() * x.element_size(), x.device).narrow(0, 0, x.numel() * x.element_size())
    mine = buffer.view(x.dtype).view(x.shape)
    if variant == "one_shot":
        return torch.ops.symm_mem.one_shot_all_reduce_copy(mine, x, "sum", group)
    mine.copy_(x)
    return torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", group).clone()


all_reduce = define(
    "all_reduce(Tensor x, str variant, str group) -> Tensor",
    _all_reduce_run,
    lambda x, variant, group: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def attention_library() -> str:
    """The compiled backends/attention.cpp, kept in LAYERZERO_CACHE_DIR or the user's cache folder, whatever torch.compile's options say."""
    import platformdirs

    from .options import Options

    folder = Path(Options.resolve().cache_dir or platformdirs.user_cache_dir("layerzero")).expanduser() / "compiled"
    return torch_private.load_cpp(str(Path(__file__).with_name("backends") / "attention.cpp"), str(folder))


@functools.cache
def attention_brgemm() -> Any:
    """attention_brgemm(q, k, v, mask, causal, scale): the operator of backends/attention.cpp, compiled on first use."""
    attention_library()

    def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        batch, heads, length = q.shape[:3]
        return q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)

    torch.library.register_fake("lz::attention_brgemm", fake, lib=_lib)
    return torch.ops.lz.attention_brgemm.default


def register_lowerings() -> None:
    """Tell Inductor what each operator becomes. Called once, by the backend (it imports Inductor)."""
    lower, fake = torch_private.lower_to, torch_private.ensure_fake
    fake(mkldnn._linear_pointwise.binary, _linear_binary_fake)
    fake(mkldnn._convolution_pointwise.binary, _conv_binary_fake)
    lower(
        linear, mkldnn._linear_pointwise.default,
        lambda put, x, w, b, attr, algorithm: (put.contiguous(x), w, b, attr, [], algorithm),
    )  # fmt: skip
    lower(
        linear_binary, mkldnn._linear_pointwise.binary,
        lambda put, x, other, w, b, attr: (put.contiguous(x), put.contiguous(other), w, b, attr),
    )  # fmt: skip
    if torch.backends.mkl.is_available():
        fake(torch.ops.mkl._mkl_linear.default, _linear_binary_fake)
        lower(
            mkl_linear, torch.ops.mkl._mkl_linear.default,
            lambda put, x, packed, w, bias, rows: (put.contiguous(x), packed, w, bias, rows),
        )  # fmt: skip
    lower(
        sdpa, aten.scaled_dot_product_attention.default,
        lambda put, q, k, v, mask, is_causal, scale, enable_gqa: (
            (q, k, v, mask, 0.0, is_causal), {"scale": scale, "enable_gqa": enable_gqa}),
        strides=True,
    )  # fmt: skip
    lower(
        conv, mkldnn._convolution_pointwise.default,
        lambda put, x, w, b, padding, stride, dilation, groups, attr: (
            put.channels_last(x), put.weight(w), b, padding, stride, dilation, groups, attr, [], ""),
    )  # fmt: skip
    lower(
        conv_binary, mkldnn._convolution_pointwise.binary,
        lambda put, x, other, w, b, padding, stride, dilation, groups, attr, unary: (
            put.channels_last(x), put.channels_last(other), put.weight(w), b, padding, stride, dilation, groups,
            attr, None, unary, [], ""),
    )  # fmt: skip
    fake(aten.cudnn_convolution_relu.default, lambda x, w, bias, *geometry: _cudnn_fake(x, w, *geometry))
    fake(aten.cudnn_convolution_add_relu.default, lambda x, w, other, alpha, bias, *geometry: _cudnn_fake(x, w, *geometry))
    lower(
        addmm_activation, aten._addmm_activation.default,
        lambda put, bias, x, w, gelu: ((bias, put.contiguous(x), put.transposed(w)), {"use_gelu": gelu}),
    )  # fmt: skip
    lower(
        cudnn_conv, aten.convolution.default,
        lambda put, x, w, stride, padding, dilation, groups: (
            put.channels_last(x), put.weight(w), None, stride, padding, dilation, False, [0, 0], groups),
    )  # fmt: skip
    lower(
        cudnn_conv_relu, aten.cudnn_convolution_relu.default,
        lambda put, x, w, bias, *geometry: (put.channels_last(x), put.weight(w), bias, *geometry),
    )  # fmt: skip
    lower(
        cudnn_conv_add_relu, aten.cudnn_convolution_add_relu.default,
        lambda put, x, w, other, bias, *geometry: (
            put.channels_last(x), put.weight(w), put.channels_last(other), 1.0, bias, *geometry),
    )  # fmt: skip
