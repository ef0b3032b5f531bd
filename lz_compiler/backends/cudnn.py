"""cuDNN's convolutions through torch, channels last, with the batch norm folded and bias, residual and relu fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .. import ops
from ..types import Candidate, Rejection
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name
from .folding import fold, folding_candidate

aten = torch.ops.aten


def _fold(emit: Emitter, t: Values, p: Values) -> Values:
    t = fold(emit, t, p, lambda w: w.contiguous(memory_format=torch.channels_last))
    return t if p["is_frozen"] else {**t, "w": emit.call(aten.clone.default, t["w"], memory_format=torch.channels_last)}


def _conv(emit: Emitter, t: Values, p: Values) -> Any:
    x = t["x"]
    geometry = (list(p["stride"]), list(p["padding"]), list(p["dilation"]), p["groups"])
    if p["act"] is None:
        y = emit.call(ops.cudnn_conv, x, t["w"], *geometry)
        return y if t["bias"] is None else emit.call(aten.add.Tensor, y, emit.call(aten.reshape.default, t["bias"], [1, -1, 1, 1]))
    if p["binary"]:
        return emit.call(ops.cudnn_conv_add_relu, x, t["w"], t["other"], t["bias"], *geometry)
    return emit.call(ops.cudnn_conv_relu, x, t["w"], t["bias"], *geometry)


class Cudnn(Described):
    name = "cudnn"
    devices: tuple[str, ...] = ("cuda",)
    # cudnn_convolution_relu and _add_relu ask cuDNN for any algorithm, whatever torch's flags say (ATen/native/cudnn/ConvShared.cpp).
    kernels = by_name(Kernel("cudnn.conv", _conv, _fold, packs=lambda p: ("folded", p["affine"], p["dtype"])))

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        yield folding_candidate(ctx, self.kernels[name])
