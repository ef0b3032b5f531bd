"""What canary runs have found, in the timings store, and what a planner may therefore not use.

A row of kind `canary` holds the verdicts on one backend's capabilities, under everything they depend on: the device and its
driver, torch, the library's version and the descriptor's hash; under a new version nothing is known, and so nothing forbidden.
A row of kind `canary_failed` names, for one environment, the backends in which something failed: while there is none, a plan costs
one look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import backends
from ..backends.base import Backend, SelectionContext
from ..timings import TimingStore
from ..types import Candidate, Plan, Rejection
from .canary_regions import capability_of
from .capabilities import descriptor

CANARY, FAILED = "canary", "canary_failed"
BAD = ("failed", "crashed", "timed_out")


@functools.cache
def driver() -> str:
    """The NVIDIA driver's version here, or nothing."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    return next((word for word in text.split() if word[0].isdigit() and word.count(".") >= 1), "")


def hardware(environment: Mapping[str, str]) -> str:
    """What results depend on, as text: threads change times only."""
    known = {k: v for k, v in environment.items() if k != "threads"}
    known |= {"driver": driver()} if environment["device"] == "cuda" else {}
    return "|".join(f"{k}={v}" for k, v in sorted(known.items()))


def _key(backend: Backend, environment: Mapping[str, str]) -> str:
    known = descriptor(backend)
    return f"{backend.name}|{backend.version()}|{known.digest if known else ''}|{hardware(environment)}"


def remember(store: TimingStore, backend: Backend, environment: Mapping[str, str], value: Mapping[str, Any]) -> None:
    """Keep what a canary run found: {"capabilities": {name: {"status", "detail", "shape"}}, ...}. One that was skipped found nothing:
    what an earlier one says of a version stays."""
    before, index = last_run(store, backend, environment), hardware(environment)
    skipped = bool(value.get("skipped"))
    key = f"{backend.name}|skipped||{index}" if skipped else _key(backend, environment)
    store.put_record(CANARY, key, {**value, "run": 1 + (before["run"] if before else 0)})
    if skipped:
        return
    named = set(_named(store, environment))
    failed = any(found["status"] in BAD for found in value["capabilities"].values())
    if failed != (backend.name in named):
        store.put_record(FAILED, index, {"backends": sorted(named ^ {backend.name})})


def last_run(store: TimingStore, backend: Backend, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The newest run of this backend on this device, whatever the versions."""
    name = f"name={environment['name']}"
    runs = [e for e in store.ls().entries if e.kind == CANARY and e.key.startswith(f"{backend.name}|") and name in e.key.split("|")]
    known = [(_counted(value), e.created or 0.0, value) for e in runs for value in [store.get_record(CANARY, e.key)] if value]
    if not known:
        return None
    # Counted, not dated: a clock may have been set back.
    number, _, found = max(known, key=lambda run: run[:2])
    return {**found, "run": number, "capabilities": dict(_entries(found.get("capabilities")))}


def _counted(value: Mapping[str, Any]) -> int:
    """A run's number, of a row that anyone may have written."""
    number = value.get("run", 0)
    return number if type(number) is int else 0


def _named(store: TimingStore, environment: Mapping[str, str]) -> list[str]:
    """The backends in which something failed, of a row that anyone may have written."""
    names = (store.get_record(FAILED, hardware(environment)) or {}).get("backends", ())
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _entries(capabilities: object) -> list[tuple[str, dict[str, Any]]]:
    return [(name, v) for name, v in capabilities.items() if isinstance(v, dict)] if isinstance(capabilities, dict) else []


class Trust:
    """What the canary forbids in one environment, read when it is first asked for."""

    def __init__(self, store: TimingStore, environment: Mapping[str, str]) -> None:
        self.store, self.environment = store, environment
        self.failed: dict[str, str] = {}  # capability -> why
        self._entries: dict[str, dict[str, Any]] = {}  # of each backend that was asked for, by capability
        for name in _named(store, environment):
            backend = backends.all_backends().get(name)
            found = (store.get_record(CANARY, _key(backend, environment)) or {}) if backend else {}
            for capability, v in _entries(found.get("capabilities")):
                if v.get("status") in BAD:
                    self.failed[capability] = f"{v['status']} in the canary at {v.get('shape')}: {v.get('detail')}"

    def passed(self, ctx: SelectionContext, candidate: Candidate) -> bool:
        """Whether the canary has tried what the candidate needs, and it went well."""
        owner = backends.owners()[candidate.kernel]
        if owner not in self._entries:
            found = self.store.get_record(CANARY, _key(backends.all_backends()[owner], self.environment)) or {}
            self._entries[owner] = dict(_entries(found.get("capabilities")))
        return bool(self._entries[owner].get(capability_of(ctx, candidate), {}).get("status") == "passed")

    def marks(self) -> tuple[str, ...]:
        """What a stored verdict must be distinguished by: nothing, as long as nothing failed."""
        return tuple(f"quarantined {capability}" for capability in sorted(self.failed))

    def refusal(self, ctx: SelectionContext, candidate: Candidate) -> Rejection | None:
        """Why the canary forbids a candidate. The graph as it stands is never forbidden: it must run at all."""
        if not self.failed or candidate.as_is:
            return None
        why = self.failed.get(capability_of(ctx, candidate))
        return Rejection(candidate.kernel, "quarantined", why) if why else None

    def of_plan(self, plan: Plan, regions: Callable[[], Iterable[SelectionContext]]) -> str | None:
        """The first choice of a plan made elsewhere or earlier that the canary forbids here, in words."""
        if not self.failed:
            return None
        contexts = {ctx.region: ctx for ctx in regions()}
        for candidate in (c.candidate for c in plan.choices if c.candidate.region in contexts):
            refused = self.refusal(contexts[candidate.region], candidate)
            if refused is not None:
                return f"{candidate.kernel} {refused.detail}"
        return None
