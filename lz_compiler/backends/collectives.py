"""All-reduces of torch.distributed: the group's own, and on GPUs that read each other's memory torch's kernels over symmetric memory."""

from __future__ import annotations

from collections.abc import Iterable

from .. import ops, torch_private
from ..types import Candidate, Rejection
from .base import Described, Emitter, Kernel, SelectionContext, Values, by_name


def _own(emit: Emitter, t: Values, p: Values) -> object:
    return emit.call(torch_private.all_reduce(), t["x"], p["reduce"], p["group"])


def _symmetric(emit: Emitter, t: Values, p: Values) -> object:
    return emit.call(ops.all_reduce, t["x"], p["shots"], p["group"])


class Collectives(Described):
    """Never run to be measured by one rank alone: prices are those that all ranks of the job measured together (collectives.py)."""

    name = "collectives"
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels = by_name(
        Kernel("c10d.all_reduce", _own),
        Kernel("symm_mem.one_shot", _symmetric),
        Kernel("symm_mem.two_shot", _symmetric),
    )

    def offers(self, ctx: SelectionContext, name: str) -> Iterable[Candidate | Rejection]:
        if name == "c10d.all_reduce":
            yield ctx.candidate(self.kernels[name], as_is=True)
        else:
            yield ctx.candidate(self.kernels[name], shots=name.partition(".")[2])
