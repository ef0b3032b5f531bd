"""A kernel library of a third party, as its package would ship it: an operator, two kernels, a Backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lz_compiler.backends.base import Emitter, Kernel, SelectionContext, Values
from lz_compiler.types import Candidate, Rejection

licence = {"valid": True, "calls": 0, "products": True}

_lib = torch.library.Library("acme", "DEF")
_lib.define("linear(Tensor x, Tensor w, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    licence["calls"] += 1
    if not licence["valid"]:
        raise RuntimeError("acme: the licence has expired")
    return torch.nn.functional.linear(x, w, b)


_lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("acme::linear", lambda x, w, b: x.new_empty((x.shape[0], w.shape[0])), lib=_lib)


_lib.define("product(Tensor x, Tensor w) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _product(x: Tensor, w: Tensor) -> Tensor:
    if not licence["products"]:
        raise RuntimeError("acme: no licence for products")
    return torch.nn.functional.linear(x, w)


_lib.impl("product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("acme::product", lambda x, w: x.new_empty((x.shape[0], w.shape[0])), lib=_lib)


def _call(emit: Emitter, t: Values, p: Values) -> object:
    weight = emit.call(torch.ops.aten.permute.default, t["w"], [1, 0]) if p["transposed"] else t["w"]
    return emit.call(torch.ops.acme.linear.default, t["x"], weight, t["bias"])


def _call_product(emit: Emitter, t: Values, p: Values) -> object:
    weight = emit.call(torch.ops.aten.permute.default, t["w"], [1, 0]) if p["transposed"] else t["w"]
    return emit.call(torch.ops.acme.product.default, t["x"], weight)


class Acme:
    name = "acme"
    devices: tuple[str, ...] = ("cpu",)
    kernels: Mapping[str, Kernel] = {
        k.name: k
        for k in (
            Kernel("acme.linear", _call), Kernel("acme.atomic", _call, deterministic=False), Kernel("acme.product", _call_product),
        )
    }  # fmt: skip

    def version(self) -> str:
        return "1.0"

    def missing(self) -> str | None:
        return None

    def candidates(self, ctx: SelectionContext) -> Iterable[Candidate | Rejection]:
        if ctx.region.op == "linear" and ctx.default and "bias" in ctx.roles:
            yield from (ctx.candidate(kernel) for name, kernel in self.kernels.items() if name != "acme.product")
        elif ctx.region.op == "linear" and ctx.default:
            yield ctx.candidate(self.kernels["acme.product"])
