"""Liger's fused gate (Hsu et al., Liger Kernel: efficient Triton kernels for LLM training, 2024) behind two products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import Emitter, Kernel, Values, by_name
from .library import Library, LibraryBackend

aten = torch.ops.aten

LIBRARY = Library("liger-kernel", "liger_kernel", "pip install 'lz-compiler[liger]'")


def _run(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, both (..., N) and contiguous."""
    if act == "silu":
        return LIBRARY.load("liger_kernel.ops.swiglu").swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return LIBRARY.load("liger_kernel.ops.geglu").geglu_forward(gate.contiguous(), up.contiguous())[2]


liger_gate = ops.define(
    "liger_gate(Tensor gate, Tensor up, str act) -> Tensor",
    _run,
    lambda gate, up, act: gate.new_empty(gate.shape),
    torch.Tag.needs_exact_strides,
)


def _gated(emit: Emitter, t: Values, p: Values) -> Any:
    halves = []
    for i in (0, 1):
        w = emit.call(aten.permute.default, t[f"w{i}"], [1, 0])
        halves.append(emit.call(aten.addmm.default, t[f"b{i}"], t["x"], w) if f"b{i}" in t else emit.call(aten.mm.default, t["x"], w))
    return emit.call(liger_gate, *halves, p["act"])


class Liger(LibraryBackend):
    name = "liger"
    devices: tuple[str, ...] = ("cuda",)
    kernels = by_name(Kernel("liger.gated_linear", _gated))
    library = LIBRARY
