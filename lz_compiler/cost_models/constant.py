"""A fixed order of libraries instead of prices, as dispatchers have it: the first that can, does."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import SelectionContext
from ..types import Candidate, Cost, Target
from . import Priced
from .roofline import Roofline

# Vendor libraries before own kernels before what is generated, packed before plain.
ORDER = ("cudnn.", "cublas.", "onednn.", "mkl.", "attention.", "flash", "triton.", "inductor.", "aten.", "c10d.")


def rank(kernel: str) -> int:
    """Place in the order: 0 is the first; unknown libraries come after all."""
    return next((i for i, name in enumerate(ORDER) if kernel.startswith(name)), len(ORDER))


class Constant:
    """All kernels of a region cost what the roofline says of its cheapest, and a hundredth more for each place further down."""

    def __init__(self, target: Target) -> None:
        self.roofline = Roofline(target)

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        priced = self.roofline.price(ctx, candidates)
        least = min((self.roofline.cost(ctx, c).ns for c in candidates), default=0)
        return [(c, Cost(max(1, round(least * (1 + rank(c.kernel) / 100))), "assumed")) for c, _ in priced]  # type: ignore[misc]
