"""Circuit breaking: a kernel that raises while a compiled graph runs is not planned again, and the call is answered by eager.

What failed is a capability: a kernel in one version, for one op and dtype, on one environment. It is kept in the timings store
under the kind `quarantine`; a new version of the kernel, its library, torch or the driver is another capability. What baked files
reported of theirs is taken over from the cache folder (failures.py).

Errors that reach Python are caught in every call: by a frame around what Dynamo calls, and around what autograd calls in the
backward pass. In the race its own frame does it. A call costs 61 ns more for it with 2 arguments, and 0.7 us with 300, where an
empty call through Dynamo's guards takes 11 us (CPython 3.11 on a Xeon, `benchmarks/guard.py`).
"""

from __future__ import annotations

import linecache
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from .. import backends, torch_private
from ..errors import KernelError
from ..target import environment
from ..timings import TimingStore
from ..types import Candidate, Choice, Plan, Rejection
from .failures import KIND, Failed, take
from .verdicts import hardware

log = logging.getLogger(__name__)

Rescue = Callable[[Exception, tuple[Any, ...]], Any]


class Quarantine:
    """The capabilities of a device that failed here before, and why."""

    def __init__(self, store: TimingStore, device: str) -> None:
        self.store = store
        take(store)
        self.known = store.get_records(KIND)
        self.suffix = hardware(environment(device)) if self.known else ""

    def names(self) -> list[str]:
        """What failed, without the environment."""
        return [key.removesuffix(self.suffix) for key in self.known if key.endswith(self.suffix)]

    def reason(self, candidate: Candidate) -> str | None:
        """Why this candidate may not be used, or None. The graph as it stands is always allowed: eager runs the same."""
        if not self.known or candidate.as_is:
            return None
        value = self.known.get(subject(candidate).capability(self.suffix))
        return None if value is None else f"raised at run time: {value.get('error')}; `lz cache clear {KIND}` gives it another try"

    def refusal(self, candidate: Candidate) -> Rejection | None:
        why = self.reason(candidate)
        return Rejection(candidate.kernel, "quarantined", why) if why else None

    def of_plans(self, plans: Iterable[Plan]) -> str | None:
        """The first choice of these plans that failed before, in words."""
        found = (
            (c.candidate.kernel, self.reason(c.candidate)) for p in plans for c in p.choices if c.candidate.kernel in backends.owners()
        )
        return next((f"{kernel} {reason}" for kernel, reason in found if reason), None)


def subject(candidate: Candidate) -> Failed:
    """What is to blame where this candidate raises."""
    known, library = backends.kernel(candidate.kernel), backends.all_backends()[backends.owners()[candidate.kernel]]
    dtype = str(candidate.param("dtype"))
    return Failed(candidate.kernel, str(known.version), library.version(), candidate.region.op, dtype)


def called_as(graph: fx.Graph, choices: Iterable[Choice]) -> dict[str, dict[str, int]]:
    """For each kernel that a plan placed in the graph: what Inductor's code will call it, and how often for one region."""
    found: dict[str, Counter[str]] = {}
    for node in graph.nodes:
        if node.meta.get("layerzero") and node.op == "call_function":
            found.setdefault(node.meta["layerzero"], Counter()).update(torch_private.called_names(node))
    regions = Counter(choice.candidate.kernel for choice in choices)
    return {kernel: {name: max(1, n // max(1, regions[kernel])) for name, n in names.items()} for kernel, names in found.items()}


def blamed(error: BaseException, calls: Mapping[str, Iterable[str]]) -> list[str]:
    """The kernels whose call stands in a line of the traceback."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [linecache.getline(frame.f_code.co_filename, number) for frame, number in frames]
    text = "".join(line for line in lines if line)
    return [kernel for kernel, names in calls.items() if any(re.search(pattern(n), text) for n in names)]


def pattern(name: str) -> str:
    """How a call by this name reads in generated code, as a regular expression: Inductor numbers Triton functions."""
    return rf"(?<![\w.]){re.escape(name)}{'' if '.' in name else r'(_[0-9]+)*'}(?!\w)"


def guarded(run: Callable[..., Any], rescue: Rescue, reference: Callable[..., Any] | None) -> Callable[..., Any]:
    """`run`, watched: what it raises goes to `rescue`, and then `reference`, if any, takes its place."""
    broken = False

    def watched(*args: Any) -> Any:
        nonlocal run, broken
        try:
            return run(*args)
        except torch_private.run_errors() as error:
            if broken:  # the reference's own
                raise
            try:
                out = rescue(error, args)
            except KernelError:
                run, broken = reference or run, reference is not None
                raise
            run, broken = reference or run, reference is not None
            return out

    return watched


class Breaker:
    """What one graph does when its plan raises: `calls` and `written` as known once it is compiled."""

    def __init__(self, store: TimingStore, device: str, reference: Callable[..., Any], label: str) -> None:
        self.store, self.device, self.reference, self.label = store, device, reference, label
        self.calls: dict[str, dict[str, int]] = {}
        self.tripped: str | None = None
        self.kernels: list[str] = []  # that were found to be the reason

    def rescue(
        self, error: Exception, args: tuple[Any, ...], plans: Sequence[Plan], written: Sequence[int] | None, stop: str | None,
    ) -> Any:  # fmt: skip
        """The call's result by the reference. The kernel is to blame only if that succeeds on the same inputs.

        Raises the error itself where memory ran out or the reference fails too (then eager's own error), KernelError where the
        call cannot be repeated: the graph writes into its inputs, or for the reason `stop`.
        """
        if torch_private.out_of_memory(error):
            raise error
        kernels = blamed(error, self.calls)
        named = ", ".join(kernels) or "its compiled code"
        why = f"graph {self.label}: {named} raised {type(error).__name__}: {_line(error)}"
        if written is None or written:
            stop = "the graph may have written into its inputs" if written is None else f"the graph writes into its inputs {list(written)}"
        if stop is not None and not kernels:
            raise error  # perhaps the inputs' own fault, which only the reference could tell
        out = self.reference(*args) if stop is None else None
        self.tripped, self.kernels = why, kernels
        for candidate in (c.candidate for p in plans for c in p.choices if c.candidate.kernel in kernels):
            self._put(candidate, error)
        disabled = (
            f"{named} is not planned again on this machine (`lz cache clear {KIND}` undoes it)" if kernels else "it is not used again"
        )
        if stop is not None:
            raise KernelError(f"{why}. The call cannot be repeated: {stop}; {disabled}.") from error
        warnings.warn(f"LayerZero: {why}. This graph runs by eager until it is compiled anew; {disabled}.", stacklevel=4)
        return out

    def _put(self, candidate: Candidate, error: Exception) -> None:
        failed = subject(candidate)
        value = {
            "kernel": failed.kernel, "op": failed.op, "dtype": failed.dtype, "graph": self.label,
            "error": f"{type(error).__name__}: {_line(error)}",
        }  # fmt: skip
        self.store.put_record(KIND, failed.capability(hardware(environment(self.device))), value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
