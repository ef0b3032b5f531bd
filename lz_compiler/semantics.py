"""What each region means: its mathematics in plain torch, and inputs to try it on.

A kernel of any library is checked against `reference` in float64, so a new kernel gets its correctness sweep for free.
Tensors are given by role (`x`, `w`, `bias`, `other`, `q` ...), parameters as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .types import TensorSpec

aten = torch.ops.aten

Tensors = Mapping[str, Tensor]
Params = Mapping[str, Any]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _finish(y: Tensor, t: Tensors, p: Params) -> Tensor:
    """activation(y), or activation(y + other): what may follow a product or a convolution."""
    if p.get("binary"):
        other = t["other"].reshape(y.shape)
        y = y + other if p["binary"] == "add" else y * other
    return ACTIVATIONS[p["act"]](y) if p.get("act") else y


def linear(t: Tensors, p: Params) -> Tensor:
    """x (M, K) @ w^T + bias; w is (N, K), or (K, N) where `transposed`."""
    y = t["x"] @ (t["w"] if p["transposed"] else t["w"].t())
    return _finish(y + t["bias"] if "bias" in t else y, t, p)


def merged_linear(t: Tensors, p: Params) -> tuple[Tensor, ...]:
    """Several linears of one x: weights w0, w1, ... with biases b0, b1, ... where present."""
    out = []
    for i in range(p["count"]):
        y = t["x"] @ (t[f"w{i}"] if p["transposed"] else t[f"w{i}"].t())
        out.append(y + t[f"b{i}"] if f"b{i}" in t else y)
    return tuple(out)


def gated_linear(t: Tensors, p: Params) -> Tensor:
    """act(x w0^T + b0) * (x w1^T + b1)."""
    gate, up = (t["x"] @ t[f"w{i}"].t() for i in (0, 1))
    if "b0" in t:
        gate, up = gate + t["b0"], up + t["b1"]
    return ACTIVATIONS[p["act"]](gate) * up


def bmm(t: Tensors, p: Params) -> Tensor:
    """a (B, M, K) @ b (B, K, N)."""
    return torch.bmm(t["a"], t["b"])


def affine(t: Tensors, p: Params, like: Tensor) -> tuple[Tensor, Tensor]:
    """The per-channel steps after a convolution (an inference batch norm, say) as one scale and one shift, (C,) each."""
    scale, shift = torch.ones_like(like), torch.zeros_like(like)
    for i, step in enumerate(p["affine"]):
        c = t[f"c{i}"].reshape(-1)
        if step == "mul":
            scale, shift = scale * c, shift * c
        else:
            shift = shift + c if step == "add" else shift - c
    return scale, shift


def conv(t: Tensors, p: Params) -> Tensor:
    """2-d convolution, the per-channel steps, then what `_finish` does."""
    y = F.conv2d(t["x"], t["w"], t.get("bias"), p["stride"], p["padding"], p["dilation"], p["groups"])
    for i, step in enumerate(p["affine"]):
        c = t[f"c{i}"].reshape(1, -1, 1, 1)
        y = y * c if step == "mul" else y + c if step == "add" else y - c
    return _finish(y.to(t["x"].dtype), t, p)


def mask_inputs(call: Callable[..., Any], t: Tensors, p: Params) -> tuple[Any, Any]:
    """The tensors that an understood mask reads (masks.Reading), computed through `call(op, *args)`: the KV position (B or 1,)
    and which keys are visible at all (B or 1, K), or None."""
    position = keys = None
    for role, index, shift, negated in p.get("reads", ()):
        value = t[role]
        for dim in reversed(range(len(index))):
            if index[dim] == "key":
                value = call(aten.slice.Tensor, value, dim, shift, shift + p["keys"])
            elif index[dim] != "batch":
                value = call(aten.select.int, value, dim, index[dim])
        if role == "position":
            position = call(aten.reshape.default, value, [-1])
            continue
        order = [entry for entry in index if entry in ("batch", "key")]
        value = call(aten.permute.default, value, [1, 0]) if order == ["key", "batch"] else value
        if order == ["key"]:
            value = call(aten.reshape.default, value, [-1, p["keys"]])
        elif "key" not in order:  # all keys of a batch alike
            value = call(aten.expand.default, call(aten.reshape.default, value, [-1, 1]), [-1, p["keys"]])
        value = call(aten.logical_not.default, value) if negated else value
        keys = value if keys is None else call(aten.logical_and.default, keys, value)
    return position, keys


def visible(t: Tensors, p: Params) -> Tensor | None:
    """Which keys each query sees, (B or 1, 1, Q, K), or None where a kernel's own arguments say it all.

    Key j is visible to query i if j <= i + offset (causal; offset = position + shift), j > i + offset - window, and keys[j].
    """
    position, keys = mask_inputs(lambda op, *args: op(*args), t, p)
    if not p["window"] and not p["shift"] and position is None and keys is None:
        return None
    device = t["q"].device
    i, j = torch.arange(p["queries"], device=device)[:, None], torch.arange(p["keys"], device=device)[None, :]
    last = i + p["shift"] + (0 if position is None else position.reshape(-1, 1, 1, 1))
    seen = (j <= last) if p["causal"] else torch.ones((), dtype=torch.bool, device=device)
    if p["window"]:
        seen = seen & (j > last - p["window"])
    if keys is not None:
        seen = seen & keys[:, None, None, :]
    return seen.expand(*((1, 1) if seen.dim() < 4 else seen.shape[:2]), p["queries"], p["keys"])


def attention(t: Tensors, p: Params) -> Tensor:
    """softmax(q k^T * scale + mask) v; k and v may have fewer heads than q (`gqa`).

    The mask is a tensor, or what `visible` says: a row that sees nothing is 0, or with `uniform` (a mask that subtracts the
    largest number) the mean of v.
    """
    mask = t.get("mask")
    seen = visible(t, p)
    if seen is not None:
        mask = torch.where(seen, 0.0, torch.finfo(t["q"].dtype).min).to(t["q"].dtype) if p["uniform"] else seen
    causal = p["causal"] and seen is None
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask, 0.0, causal, scale=p["scale"], enable_gqa=p["gqa"])


def paged_attention(t: Tensors, p: Params) -> Tensor:
    """The operator's own reference, see ops.paged_attention."""
    return ops.paged_attention(t["q"], t["k_cache"], t["v_cache"], t["block_table"], t["seq_lens"], p["scale"], p["layout"])


REFERENCES: dict[str, Callable[[Tensors, Params], Any]] = {
    "linear": linear,
    "merged_linear": merged_linear,
    "gated_linear": gated_linear,
    "bmm": bmm,
    "conv": conv,
    "attention": attention,
    "paged_attention": paged_attention,
}


SAMPLE = 16  # output channels that a float64 reference computes
LARGE = 1 << 26  # scores beyond which attention is checked on some of its heads


def sampled(op: str, t: Tensors, p: Params) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Inputs that compute only some output channels of a product or convolution, or heads of a large attention, and the
    selection of these from a whole result: float64 is slow, and a wrong kernel is wrong in every channel."""
    if op == "attention":
        return _some_heads(t)
    if op == "paged_attention":
        return _some_entries(t, p)
    channels = t["w"].shape[0 if op == "conv" or not p["transposed"] else 1] if op in ("linear", "conv") else 0
    if channels <= SAMPLE or (op == "conv" and p["groups"] != 1):
        return dict(t), lambda y: y
    index = torch.arange(SAMPLE, device=t["w"].device) * channels // SAMPLE
    dim = {"w": 1 if op == "linear" and p["transposed"] else 0, "other": 1}
    if op == "linear" and "other" in t:
        t = {**t, "other": t["other"].reshape(-1, channels)}  # it has the shape in which the product is read: its heads apart, say
    picked = {
        role: v if role in ("x", "size") else v.reshape(-1)[index] if role not in dim else v.index_select(dim[role], index)
        for role, v in t.items()
    }
    return picked, lambda y: y.index_select(1, index) if op == "conv" else y.reshape(-1, channels)[:, index]


def _some_heads(t: Tensors) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Two batches and one group of heads of a large attention."""
    q, k = t["q"], t["k"]
    if q.dim() != 4 or q.shape[:3].numel() * k.shape[2] < LARGE or q.shape[0] != k.shape[0]:
        return dict(t), lambda y: y
    group = q.shape[1] // k.shape[1]

    def pick(role: str, v: Tensor) -> Tensor:
        v = v[:2] if v.dim() > (2 if role == "mask" else 0) and v.shape[0] == q.shape[0] else v
        heads = {"q": group, "k": 1, "v": 1}.get(role, group if v.dim() == 4 and v.shape[1] == q.shape[1] else None)
        return v[:, :heads] if heads else v

    return {role: pick(role, v) for role, v in t.items()}, lambda y: y[:2, :group]


def _some_entries(t: Tensors, p: Params) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Two batch entries of a large paged attention, with the pages that they may name."""
    if t["q"].shape[:3].numel() * p["keys"] < LARGE:
        return dict(t), lambda y: y
    table = t["block_table"][:2]
    caches = {role: t[role].index_select(0, table.reshape(-1)) for role in ("k_cache", "v_cache")}
    own = torch.arange(table.numel(), dtype=table.dtype, device=table.device).view(table.shape)
    return {"q": t["q"][:2], **caches, "block_table": own, "seq_lens": t["seq_lens"][:2]}, lambda y: y[:2]


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def blank(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A tensor to be written, with zeros in the padding between its rows: what lay there before may be a NaN, and some kernels of
    ATen's read it (bfloat16 products of an odd inner size)."""
    out = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    stored = out.untyped_storage().nbytes() // out.element_size()
    if stored > out.numel():
        out.as_strided((stored,), (1,)).zero_()
    return out


def laid_out(value: Tensor, stride: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A copy in other strides, padded or expanded: of an expanded dimension it holds the first value."""
    out = blank(value.shape, stride, dtype, device)
    index = tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)
    out[index].copy_(value[index])
    return out


def example(role: str, spec: TensorSpec, generator: torch.Generator, params: Params) -> Tensor:
    """A random tensor with the spec's shape, strides, dtype and device, scaled as a trained network's would be.

    A position in a cache is the last one that fits: the most work there is. Block tables name every page of the pool in random
    order, again and again if there are fewer than entries; lengths are from half of what fits up to all of it (the first one).
    A row of visible keys is padded on the right by up to half, one in four has holes as well.
    """
    dtype, device = torch_dtype(spec.dtype), generator.device
    if role.startswith("keys"):
        value = _padding(next(read for read in params["reads"] if read[0] == role), spec, generator)
    elif role == "block_table":
        value = torch.randperm(params["pages"], generator=generator, device=device)
        value = value.repeat(-(-math.prod(spec.shape) // params["pages"]))[: math.prod(spec.shape)].view(spec.shape)
    elif role == "seq_lens":
        value = torch.randint(params["keys"] // 2, params["keys"] + 1, spec.shape, generator=generator, device=device)
        value[0] = params["keys"]
    elif dtype is torch.bool:
        value = torch.rand(spec.shape, generator=generator, device=device) > 0.2
    elif role == "position":
        value = torch.full(spec.shape, params["keys"] - params["queries"] - params["shift"], device=device)
    else:
        value = torch.randn(spec.shape, generator=generator, device=device)
        if role.startswith("w"):  # weights: unit-variance outputs
            value /= max(1, value[0].numel() if value.dim() > 2 else spec.shape[-1]) ** 0.5
    return laid_out(value, spec.stride, dtype, spec.device)


def _padding(read: tuple[Any, ...], spec: TensorSpec, generator: torch.Generator) -> Tensor:
    _, index, _, negated = read
    shape = [size if index[dim] == "batch" else 1 for dim, size in enumerate(spec.shape)]
    lengths = 0.5 + 0.5 * torch.rand(shape, generator=generator, device=generator.device)
    if "key" not in index:
        return (lengths > 0.6).expand(spec.shape)
    key = index.index("key")
    size = spec.shape[key]
    place = torch.arange(size, device=generator.device).reshape([size if dim == key else 1 for dim in range(len(index))])
    seen = (place < (lengths * size).ceil()).expand(spec.shape)
    holes = torch.rand(spec.shape, generator=generator, device=generator.device) > 0.2
    seen = seen & (holes | (torch.rand(shape, generator=generator, device=generator.device) > 0.25))
    return ~seen if negated else seen
