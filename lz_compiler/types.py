"""The nouns of LayerZero. Frozen data, no torch object in anything that is stored; behaviour lives elsewhere.

Costs are integers in nanoseconds. Tensors and nodes are named as in the FX graph that was planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

PLANNED, LOSSLESS, INDUCTOR, EAGER = "layerzero", "layerzero-lossless", "inductor", "eager"  # finalists of the race


class Status(StrEnum):
    """What a solver proved. FEASIBLE is never presented as OPTIMAL."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """How a tensor's elements exist between two kernels: a layout and a dtype.

    Layouts: `strided` (eager's own strides), `channels_last`, `packed` (a library's opaque weight layout), and `fused`
    (not in memory at all: inside one group of nodes that TorchInductor fuses).
    """

    layout: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.layout}:{self.dtype}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and strides in elements, on concrete hint sizes; dtype as torch prints it without the `torch.` prefix."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Region:
    """A set of nodes with one meaning. `inputs` and `outputs` are tensor names; single-node regions are regions too."""

    op: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a kernel is not a candidate. `code` is for programs, `detail` for people."""

    kernel: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel for one region. Formats run parallel to the region's inputs and outputs.

    `epsilon` is the kernel's relative error beyond the reference's own (0 for a lossless kernel), `workspace` bytes of
    scratch memory, `params` what the emitter needs besides the region (plain values only), `key` the identity of the
    measurement that prices it (candidates of repeated layers share one).
    """

    kernel: str
    region: Region
    in_formats: tuple[Format, ...]
    out_formats: tuple[Format, ...]
    epsilon: float = 0.0
    workspace: int = 0
    params: tuple[tuple[str, object], ...] = ()
    key: str = ""

    def param(self, name: str, default: Any = None) -> Any:
        return dict(self.params).get(name, default)

    @property
    def as_is(self) -> bool:
        """Whether it is the node of the graph as it stands, in whose place nothing is put."""
        return bool(self.param("as_is"))


@dataclass(frozen=True, slots=True)
class Cost:
    """Nanoseconds, their source (`measured`, `learned`, `roofline`, `inductor`, `assumed`), and the spread of the samples (p80 - p20).

    `factor` is a policy's preference: it counts in the objective, and leaves the price itself as it is.
    """

    ns: int
    source: str
    spread: int = 0
    factor: float = 1.0

    @property
    def weighed(self) -> int:
        """Nanoseconds as the objective counts them."""
        return self.ns if self.factor == 1.0 else round(self.ns * self.factor)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensor `tensor` from format `src` to `dst`: paid once, shared by all consumers."""

    tensor: str
    src: Format
    dst: Format


@dataclass(frozen=True, slots=True)
class Problem:
    """One integer program (see planner.py for the equations).

    `costs` runs parallel to `candidates`, `conversion_costs` to `conversions`. `sources` are (tensor, format) pairs that
    exist at no cost, `sinks` those that must exist at the end. `candidate_class` and `tensor_class` tie what repeats:
    members of one class (a transformer's identical layers) take the same decision. Empty means nothing is tied.
    `error_budget` bounds the root of the sum of squared epsilons of the used candidates (independent rounding errors). `part`: of each
    candidate, the graph that it stands in, where several graphs are planned together: each has the budget for itself. Members of a
    class are of one part; empty means one graph.
    """

    candidates: tuple[Candidate, ...]
    costs: tuple[Cost, ...]
    conversions: tuple[Conversion, ...] = ()
    conversion_costs: tuple[Cost, ...] = ()
    sources: frozenset[tuple[str, Format]] = frozenset()
    sinks: tuple[tuple[str, Format], ...] = ()
    error_budget: float = 0.0
    memory_limit: int | None = None
    candidate_class: tuple[int, ...] = ()
    tensor_class: Mapping[str, int] = field(default_factory=dict)
    part: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Solution:
    """Indices into the problem's candidates and conversions. `bound` is a proved lower bound on the objective, in ns."""

    chosen: tuple[int, ...]
    converted: tuple[int, ...]
    objective: int
    bound: int
    status: Status
    solver: str
    wall_s: float = 0.0

    @property
    def gap(self) -> float:
        return 0.0 if self.objective == 0 else (self.objective - self.bound) / self.objective


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one region, and what was decided against.

    `flops` and `nbytes` are what the kernel must compute and move (0: not known); `after`: the plan's choices whose results it
    reads, directly or through views and calls that are no choice.
    """

    candidate: Candidate
    cost: Cost
    alternatives: tuple[tuple[Candidate, Cost], ...] = ()
    rejections: tuple[Rejection, ...] = ()
    flops: int = 0
    nbytes: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A device with what was measured on it once: bytes/s, flop/s by dtype, ns per launch; and what timings on it depend on
    (`environment`: the device's name, library versions). A tensor of at most `cache_bytes` that was just written is read at
    `cache_bandwidth` (0 bytes: not known). `links`: of each kernel of an all-reduce (bytes, ns), as the ranks of this job measured it.
    `inductor`: bytes/s ("bandwidth") and flop/s by dtype ("flops") as TorchInductor has them; empty: not known."""

    device: str
    name: str
    bandwidth: float
    flops: Mapping[str, float]
    launch_ns: int
    environment: Mapping[str, str]
    cache_bytes: int = 0
    cache_bandwidth: float = 0.0
    links: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def least_ns(self) -> int:
        """No kernel takes less: on a GPU the host launches ahead of the device, so that what is shorter than a launch takes one."""
        return self.launch_ns if self.device == "cuda" else 1


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for one graph, complete: `lower` and `explain` read nothing else. Choices are in the graph's order.

    `barred`: finalists that may not run the graph, since they would use what the policy forbids. `peaks`: the target's, in
    bytes/s under "bandwidth" and flop/s by dtype. `modules`: the module that made a choice's node, where the capture says it.
    `problem`: digest of the integer program that this solves, where it was written (plan_io.problem_name).
    """

    fingerprint: str
    kind: str
    environment: Mapping[str, str]
    choices: tuple[Choice, ...]
    conversions: tuple[tuple[Conversion, Cost], ...]
    objective: int
    bound: int
    status: Status
    solver: str
    epsilon: float
    plan_s: float
    notes: tuple[str, ...] = ()
    barred: tuple[str, ...] = ()
    peaks: Mapping[str, float] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def predicted(self) -> int:
        """Nanoseconds that the plan should take: the objective without a policy's factors."""
        return self.objective + sum(c.cost.ns - c.cost.weighed for c in self.choices)

    @property
    def gap(self) -> float:
        return 0.0 if self.objective == 0 else (self.objective - self.bound) / self.objective


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided for a graph: the finalist that runs, and the plans that stand behind it. Kept for the next process, told to other
    ranks, made of a stored plan.

    `times`: seconds a call, of each finalist that raced. `error`: the plan's measured one, with an error budget; its estimate was the
    dilution times that of its kernels (None: the usual one), mended `tightened` times, and `over` the budget still. `written`: into
    which of its inputs the graph writes, None if that is not known. `calls`: kernel -> how often Inductor's code calls what for it.
    `why`: what failed. `lossless`: the plans of a finalist that keeps any budget. `race`: whether ranks race in step.
    """

    winner: str
    plans: tuple[Plan, ...]
    times: Mapping[str, float]
    error: float | None = None
    written: tuple[int, ...] | None = None
    calls: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    why: str | None = None
    collective: bool = False
    random: bool = False
    dilution: float | None = None
    tightened: int = 0
    over: bool = False
    lossless: tuple[Plan, ...] = ()
    race: bool = False
