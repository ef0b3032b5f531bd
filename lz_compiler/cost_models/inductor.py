"""What TorchInductor estimates a node to take (torch/_inductor/scheduler.py, BaseSchedulerNode._get_estimated_runtime):
max(flops / rate, bytes / bandwidth) by its own rates for the device, without a launch, the same whichever library runs it."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import SelectionContext
from ..errors import OptionError
from ..types import Candidate, Cost, Target
from . import Priced
from .roofline import assumed_error, work


def unknown_rates(target: Target) -> str | None:
    """Why there is no estimate for this target, or None."""
    if target.inductor:
        return None
    if target.device != "cuda":
        return f"Inductor estimates kernels of GPUs only, not of {target.name}."
    return (
        f"the peaks of {target.name} are stored without Inductor's rates. `lz cache clear peaks` has them measured again, on that "
        f"device and with Triton and nvidia-smi, from which Inductor has its rates."
    )


class Inductor:
    """OptionError for a target whose rates by Inductor are not known."""

    def __init__(self, target: Target) -> None:
        why = unknown_rates(target)
        if why:
            raise OptionError(f"cost_model 'inductor': {why} Give another, such as 'roofline'.")
        self.bandwidth, self.flops = target.inductor["bandwidth"], target.inductor["flops"]

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        return [(assumed_error(candidate, ctx), self.cost(ctx, candidate)) for candidate in candidates]

    def cost(self, ctx: SelectionContext, candidate: Candidate) -> Cost:
        flops, moved = work(ctx, candidate)
        rate = self.flops.get(candidate.out_formats[0].dtype, self.flops["float32"])
        return Cost(max(1, round(max(flops / rate, moved / self.bandwidth) * 1e9)), "inductor")
