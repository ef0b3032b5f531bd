"""torchao's int8 product: activations quantised row by row as they come, weights once (Dettmers et al., LLM.int8(), 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..types import Candidate, Rejection
from .base import Emitter, Kernel, SelectionContext, Values, by_name, quantize_rows
from .library import Library, LibraryBackend

LIBRARY = Library("torchao", "torchao.kernel", "pip install 'lz-compiler[torchao]'")


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times int8 weight (N, K) with its scale (N,): M rows of x are int8 in between, each with its own scale."""
    # A row with a NaN gets a scale of NaN, and is NaN throughout, as in any product.
    rows = x.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    q = (x.float() / rows).round().clamp(-127, 127).to(torch.int8)
    y = LIBRARY.load().int_scaled_matmul(q, weight.t(), rows) * scale
    return (y if bias is None else y + bias).to(x.dtype)


torchao_int8_linear = ops.define(
    "torchao_int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    _run,
    lambda x, weight, scale, bias: x.new_empty((x.shape[0], weight.shape[0])),
    torch.Tag.needs_exact_strides,
)


def _linear(emit: Emitter, t: Values, p: Values) -> Any:
    return emit.call(torchao_int8_linear, t["x"], t["w"], t["scale"], t.get("bias"))


def _quantized(emit: Emitter, t: Values, p: Values) -> Values:
    def rows(w: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows((w.t() if p["transposed"] else w).contiguous(), torch.int8)

    return {**t, "w": emit.constant(lambda w: rows(w)[0], t["w"]), "scale": emit.constant(lambda w: rows(w)[1], t["w"])}


class TorchAO(LibraryBackend):
    name = "torchao"
    devices: tuple[str, ...] = ("cpu",)
    kernels = by_name(Kernel("torchao.int8_linear", _linear, _quantized, packs=lambda p: ("stacked", "int8")))
    library = LIBRARY

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        if ctx.options.error_budget > 0:
            yield ctx.candidate(self.kernels[name], layouts={"w": "packed"}, weight_dtype="int8", lossy="int8")
        else:
            yield ctx.reject(name, "lossy", "int8 products are offered within an error_budget only")
