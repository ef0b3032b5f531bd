"""One plan for all ranks of a torch.distributed job.

For each graph that Dynamo gives the ranks, in order, they meet in the job's own key-value store (docs/distributed.md):

    meet     every rank says what it has: hardware, versions and options, what failed there, the graph
    verdict  the lowest rank of each capability group plans, and tells the others of its group
    done     every rank says what it made of that; the same graph with another plan is an error
    differ   only then: every rank says which kernel its plan has where, and the error names the first differences
    times    where they race: what each rank measured, once every finalist had its calls

A capability group is the ranks with the same hardware, quarantine and graph. Messages are JSON; no collective is run.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from . import torch_private
from .backends.base import Backend
from .collectives import Curves, joined
from .errors import CapabilityError, RankError
from .options import Options
from .plan_io import digest, verdict_or_none
from .trust.capabilities import descriptor
from .trust.verdicts import driver
from .types import Verdict

HARDWARE = ("device", "name", "cpu_capability", "threads")  # of target.environment; everything else there is a version

_numbers = itertools.count()  # never used twice in one job: what an earlier graph left in the store is not read again


def several() -> bool:
    """Whether this process is one of several ranks. What one process pays: two calls."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@dataclass(slots=True)
class Team:
    """The ranks at one graph. Leaving its context with an error tells it to those who wait.

    Every wait ends: RankError names the ranks that did not come.
    """

    store: Any
    rank: int
    size: int
    number: int
    timeout_s: float  # for the others to come
    work_s: float  # for another rank to plan and compile
    members: list[int] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    told: dict[int, dict[str, Any]] = field(default_factory=dict)  # what each rank came with

    @property
    def leads(self) -> bool:
        return self.rank == self.members[0]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, RankError):
            for stage in {"verdict", "done"} - self.said:
                self.say(stage, {"raised": f"{type(error).__name__}: {error}"[:2000]})

    def say(self, stage: str, value: Mapping[str, Any]) -> None:
        self.said.add(stage)
        self.store.set(self._key(stage, self.rank), json.dumps(value))

    def hear(self, stage: str, ranks: Sequence[int], seconds: float) -> dict[int, dict[str, Any]]:
        """What these ranks say; RankError where one raised, or does not come in time."""
        deadline, found = time.monotonic() + seconds, {}
        for rank in ranks:
            try:
                self.store.wait([self._key(stage, rank)], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
                found[rank] = json.loads(self.store.get(self._key(stage, rank)))
            except torch.distributed.DistNetworkError as error:
                raise RankError(f"graph {self.number}: the job's store is gone, so the rank that holds it has ended: {error}") from error
            except RuntimeError as error:  # DistStoreError, and of a FileStore just this
                raise RankError(self._absent(stage, ranks, seconds)) from error
            if "raised" in found[rank]:
                raise RankError(f"graph {self.number}: rank {rank} raised {found[rank]['raised']}")
        return found

    def meet(self, facts: Mapping[str, Any]) -> None:
        """Find this rank's group. `facts`: {"hardware", "versions": {name: text}, "refused": [...], "graph"}.

        RankError where ranks with the same hardware differ in versions or options.
        """
        self.say("meet", facts)
        known = self.hear("meet", range(self.size), self.timeout_s)
        differing = _differing(known)
        if differing:
            raise RankError(f"ranks with the same hardware differ: {'; '.join(differing)}. Install and set the same everywhere.")
        self.told = known
        mine = _group(known[self.rank])
        self.members = [rank for rank, told in known.items() if _group(told) == mine]

    def links(self, known: Curves | None, measure: Callable[[], Curves]) -> Curves:
        """What all-reduces take, where every rank's graph wants to know: what is `known`, or measured by all if one rank does not know it.

        Each rank came with "known" or "unknown" in its facts, or with nothing where its graph has no collectives. Where several groups
        plan, nothing: ranks that chose differently would wait for each other for ever.
        """
        wishes = {told["links"] for told in self.told.values()}
        if "" in wishes or len(self.members) < self.size:
            return {}
        if known is not None and wishes == {"known"}:
            return known
        self.say("links", {"curves": measure()})
        heard = self.hear("links", range(self.size), self.timeout_s)
        return joined([heard[rank]["curves"] for rank in range(self.size)])

    def verdict(self) -> Verdict | None:
        """What the group's leader decided."""
        return verdict_or_none(self.hear("verdict", self.members[:1], self.work_s)[self.members[0]])

    def confirm(self, winner: str, plans: Sequence[Mapping[str, Any]], sums: Sequence[str] = ()) -> str:
        """Agree on what each member made of the verdict: one line that says so, for `explain`. `sums`: the kernels of its all-reduces, in
        order, which must be the same whatever else differs."""
        own = {"plan": digest([winner, *plans]), "winner": winner, "graphs": {p["fingerprint"]: digest(p) for p in plans}, "sums": [*sums]}
        self.say("done", own)
        known = self.hear("done", self.members, self.work_s)
        first = known[self.members[0]]
        wrong = [r for r, told in known.items() if told["winner"] != first["winner"] or _conflicting(told["graphs"], first["graphs"])]
        wrong += [r for r, told in known.items() if told["sums"] != first["sums"] and r not in wrong]
        if wrong:
            told = {rank: f"{known[rank]['winner']} {known[rank]['plan']}" for rank in (self.members[0], *wrong)}
            self.say("differ", _entries(plans))
            where = _first_differing(self.hear("differ", self.members, self.timeout_s))
            raise RankError(
                f"graph {self.number}: the same graph has several plans: {_by_rank(told)}{where}. Clear the caches: lz cache clear"
            )
        if self.leads:  # everyone has read it
            self.store.delete_key(self._key("verdict", self.rank))
        same = [rank for rank, told in known.items() if told["plan"] == own["plan"]]
        rest = sorted(set(range(self.size)) - set(same))
        maker = f"made by rank {self.members[0]}" if self.members[0] in same else "made by each"
        apart = f"; {_names(rest)} {'has' if len(rest) == 1 else 'have'} another: hardware, quarantine or graph differ" if rest else ""
        return f"plan {own['plan']} agreed by {_names(same)} of {self.size}, {maker}{apart}"

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any member gives."""
        self.say("over_budget", {"names": list(names)})
        known = self.hear("over_budget", self.members, self.timeout_s)
        return sorted({name for told in known.values() for name in told["names"]})

    def slowest(self, times: Mapping[str, float]) -> dict[str, float]:
        """Of each finalist the seconds of the member where it takes longest."""
        self.say("times", times)
        known = self.hear("times", self.members, self.timeout_s)
        return {name: max(told[name] for told in known.values()) for name in times}

    def _key(self, stage: str, rank: int) -> str:
        return f"{self.number}/{stage}/{rank}"

    def _absent(self, stage: str, ranks: Sequence[int], seconds: float) -> str:
        late = [rank for rank in ranks if not self.store.check([self._key(stage, rank)])]
        return (
            f"graph {self.number}: {_names(late)} did not come within {seconds:g} s (stage {stage!r}; this is rank {self.rank} of "
            f"{self.size}). Every rank must compile the same number of graphs. Option rank_timeout_s sets how long to wait; with "
            f"ranks=False each rank plans by itself."
        )


def team(options: Options) -> Team | None:
    """The ranks that plan together, or None: one process, switched off, or a process group without other processes."""
    if not several() or not options.ranks or torch.distributed.get_backend() == "fake":
        return None
    work_s = options.rank_timeout_s + options.measure_budget_s + options.solve_budget_s
    return Team(
        torch_private.job_store("layerzero"), torch.distributed.get_rank(), torch.distributed.get_world_size(), next(_numbers),
        options.rank_timeout_s, work_s,
    )  # fmt: skip


def facts(
    environment: Mapping[str, str], others: Mapping[str, str], refused: Iterable[str], graph: str, links: str = "",
) -> dict[str, Any]:  # fmt: skip
    """For Team.meet: `others` are versions and options beside those of the environment; `links`: for Team.links."""
    hardware = {k: v for k, v in environment.items() if k in HARDWARE}
    versions = {k: v for k, v in environment.items() if k not in HARDWARE} | dict(others)
    return {"hardware": hardware, "versions": versions, "refused": sorted(refused), "graph": graph, "links": links}


def libraries(backends: Iterable[Backend], device: str) -> dict[str, str]:
    """For `facts`: each backend's version and descriptor, and on a GPU the driver's and NCCL's."""
    found: dict[str, str] = {}
    for backend in backends:
        try:
            known = descriptor(backend)
            found[f"descriptor {backend.name}"] = known.digest[:12] if known else "none"
        except CapabilityError:
            found[f"descriptor {backend.name}"] = "unreadable"
        found[f"backend {backend.name}"] = backend.version()
    if device == "cuda":
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        found |= {"driver": driver(), "nccl": ".".join(map(str, nccl))}
    return found


def _group(told: Mapping[str, Any]) -> str:
    return digest([told["hardware"], told["refused"], told["graph"]])


def _differing(known: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """`torch is 2.13.0 on ranks 0-1, 2.13.1 on rank 2`, for each version that differs within the same hardware."""
    alike: dict[str, dict[int, Mapping[str, str]]] = {}
    for rank, told in known.items():
        alike.setdefault(digest(told["hardware"]), {})[rank] = told["versions"]
    found = []
    for ranks in alike.values():
        for name in sorted({name for versions in ranks.values() for name in versions}):
            values = {rank: versions.get(name, "missing") for rank, versions in ranks.items()}
            if len(set(values.values())) > 1:
                found.append(f"{name} is {_by_rank(values)}")
    return found


def _conflicting(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    return any(a[graph] != b[graph] for graph in a.keys() & b.keys())


def _entries(plans: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Of each graph, by nodes: the kernel, and a hash of all that the plan says there."""
    return {
        p["fingerprint"]: {"+".join(c["candidate"]["region"]["nodes"]): [c["candidate"]["kernel"], digest(c)] for c in p["choices"]}
        for p in plans
    }


def _first_differing(heard: Mapping[int, Mapping[str, Mapping[str, list[str]]]]) -> str:
    """`; at addmm: onednn.linear on rank 0, aten.mm on rank 1`, for the first three entries that are not the same on all ranks."""
    found = []
    for graph in dict.fromkeys(graph for told in heard.values() for graph in told):
        sides = {rank: told[graph] for rank, told in heard.items() if graph in told}
        for nodes in dict.fromkeys(nodes for side in sides.values() for nodes in side):
            values = {rank: side.get(nodes, ["nothing", ""]) for rank, side in sides.items()}
            one = len({kernel for kernel, _ in values.values()}) == 1  # then its formats, parameters or prices differ
            texts = {rank: f"{kernel} {text[:8]}" if one else kernel for rank, (kernel, text) in values.items()}
            found += [f"; at {nodes}: {_by_rank(texts)}"] if len(set(texts.values())) > 1 else []
    return "".join(found[:3])


def _by_rank(values: Mapping[int, str]) -> str:
    return ", ".join(f"{v} on {_names([r for r, w in values.items() if w == v])}" for v in dict.fromkeys(values.values()))


def _names(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs = [[r for _, r in group] for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
