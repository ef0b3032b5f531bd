"""Never slower: the finalists run over the user's first real calls, and the clock decides.

Each call runs exactly one finalist, and every one is correct, so the race costs no extra work; its verdict is stored. In
training the backward pass counts: it is timed from the moment autograd enters the outputs until the inputs' gradients are
there. Threads share a race: a call beside another, or inside a CUDA graph's capture, runs the leader and does not count.
"""

from __future__ import annotations

import functools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_private
from .capture import tensors_in
from .errors import KernelError
from .measure import uncontended
from .types import EAGER, LOSSLESS

log = logging.getLogger(__name__)

WARMUP, ROUNDS, DROP_AFTER, DROP_RATIO = 2, 9, 3, 1.5

Finalist = Callable[..., Any]


class Race:
    """A callable that becomes its winner. `finish(times, winner, measured)` is told the medians in seconds; not `measured`: the
    leader has won since calls are repeated (activation checkpointing), and must then be of the same code.

    `rescue(name, error, args)` answers the call in which a finalist raised, or raises; the finalist is out then, and a winner is
    followed by `reference` (None: there is nothing to follow it). Where a rival of the leader runs out of memory (eager fuses nothing),
    it is out, and if calls may be `repeated`, since they write into no input, another finalist answers this one.

    `agree(times)`: for ranks that race in step. Each then runs the same finalist in the same call, none leaves early, and the clock that
    decides is what `agree` makes of all ranks' times.
    """

    def __init__(
        self, finalists: Mapping[str, Finalist], finish: Callable[[dict[str, float], str, bool], None], leader: str,
        check: Callable[[tuple[Any, ...]], list[str]] | None = None, rounds: int = ROUNDS, *,
        rescue: Callable[[str, Exception, tuple[Any, ...]], Any], reference: Finalist | None,
        agree: Callable[[dict[str, float]], dict[str, float]] | None = None, repeated: bool = False,
    ) -> None:  # fmt: skip
        self.finalists, self.agree, self.repeated = dict(finalists), agree, repeated
        self.rescue, self.reference = rescue, reference
        self.finish, self.leader, self.check = finish, leader, check
        self.rounds = rounds
        self.forward: dict[str, list[tuple[float, float]]] = {name: [] for name in finalists}
        self.backward: dict[str, list[float]] = {name: [] for name in finalists}
        self.calls = dict.fromkeys(finalists, 0)
        self.shape: object = None
        self.winner: tuple[str, Finalist] | None = None
        self.lock, self.timing = threading.RLock(), False
        self.hooks: list[Any] = []  # of backward passes that have not come

    def __call__(self, *args: Any) -> Any:
        name, run = self.winner or (self.leader, None)
        try:
            if run is None:
                with self.lock:
                    name, run = self._turn(args)
            return run(*args)
        except torch_private.run_errors() as error:
            if not self._too_large(name, error):
                return self._rescued(name, error, args)
        return self(*args)  # only here: the error holds what the finalist had made

    def _too_large(self, name: str, error: Exception) -> bool:
        """Whether a rival ran out of memory, which is out then, and the call may be repeated without it."""
        with self.lock:
            leads = name == (self.leader if self.winner is None else self.winner[0])
            if leads or self.agree is not None or not torch_private.out_of_memory(error):
                return False
            self._drop(name, "memory ran out")
        return self.repeated

    def _rescued(self, name: str, error: Exception, args: tuple[Any, ...]) -> Any:
        try:
            out = self.rescue(name, error, args)
        except KernelError:
            self._replace(name)
            raise
        self._replace(name)
        return out

    def _replace(self, name: str) -> None:
        """Go on without a finalist."""
        with self.lock:
            if (self.winner is not None or len(self.finalists) == 1) and self.reference is not None:
                self.winner = EAGER, self.reference
            self._drop(name, "it raised")

    def _turn(self, args: tuple[Any, ...]) -> tuple[str, Finalist]:
        """What this call runs."""
        if self.winner is not None:
            return self.winner
        if torch_private.is_capturing():
            name = self.leader if self.check is None else LOSSLESS  # which needs no check
            return name, self.finalists[name]
        if self.check is not None:
            for name in self.check(args):
                self._drop(name, "over the error budget")
            self.check = None
        if self.rounds and torch_private.saves_are_hooked():
            # A checkpointed forward pass is repeated by another call, which must save the same tensors: by the same code.
            return self._end({}, self.leader, False)
        shape = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in args)
        if self.shape is None:
            self.shape = shape
        if shape != self.shape or self.timing:
            return self.leader, self.finalists[self.leader]  # other sizes are not comparable; the verdict comes from the first
        if self.agree is None:
            self._drop_slow()
        waiting = [n for n in self.finalists if self.rounds and self.calls[n] < WARMUP + self.rounds]
        if not waiting or len(self.finalists) == 1:
            return self._decide()
        name = min(waiting, key=lambda n: self.calls[n])
        self.calls[name] += 1
        self.timing = True
        return name, functools.partial(self._timed, name, self.finalists[name], self.calls[name] > WARMUP)

    def _timed(self, name: str, run: Finalist, warm: bool, *args: Any) -> Any:
        try:
            tensors = tensors_in(args)
            sync = torch.cuda.synchronize if any(t.is_cuda for t in tensors) else (lambda: None)
            sync()
            cpu, start = time.process_time(), time.perf_counter()
            out = run(*args)
            sync()
            seconds = time.perf_counter() - start
            if warm:
                self.forward[name].append((seconds, seconds / max(time.process_time() - cpu, 1e-9)))
                self._time_backward(name, out, tensors, sync)
            return out
        finally:
            self.timing = False

    def _time_backward(self, name: str, out: Any, inputs: list[Tensor], sync: Callable[[], None]) -> None:
        roots = [t for t in tensors_in([out]) if t.grad_fn is not None]
        leaves = [t for t in inputs if t.requires_grad]
        if not roots or not leaves or not torch.is_grad_enabled():
            return
        began: list[float] = []

        def begin(_: Any) -> None:
            if not began:
                late = torch_private.when_computed(leaves, end)
                hooks.extend(late)
                self.hooks += late
                sync()
                began.append(time.perf_counter())

        def end() -> None:
            if began:
                sync()
                self.backward[name].append(time.perf_counter() - began[0])
                self._unhook(hooks)

        hooks = [root.grad_fn.register_prehook(begin) for root in roots if root.grad_fn is not None]
        self.hooks += hooks

    def _unhook(self, hooks: list[Any]) -> None:
        for hook in hooks:
            hook.remove()
        self.hooks = [hook for hook in self.hooks if hook not in hooks]

    def _drop(self, name: str, why: str) -> None:
        if name in self.finalists and len(self.finalists) > 1:
            log.info("%s leaves the race: %s", name, why)
            del self.finalists[name]
            if self.leader == name:
                self.leader = next(iter(self.finalists))

    def _drop_slow(self) -> None:
        ready = {n: self._median(n) for n in self.finalists if len(self.forward[n]) >= DROP_AFTER}
        if len(ready) == len(self.finalists):
            best = min(ready.values())
            for name, seconds in ready.items():
                if seconds > DROP_RATIO * best:
                    self._drop(name, f"{seconds * 1e3:.2f} ms against {best * 1e3:.2f} ms")

    def _median(self, name: str) -> float:
        """Median forward time of uncontended calls, plus median backward time."""
        back = self.backward[name]
        return statistics.median(uncontended(self.forward[name])) + (statistics.median(back) if back else 0.0)

    def _decide(self) -> tuple[str, Finalist]:
        times = {n: self._median(n) for n in self.forward if self.forward[n]}
        times = times if self.agree is None else self.agree(times)
        name = min((n for n in self.finalists), key=lambda n: times.get(n, float("inf")))
        return self._end(times, name, True)

    def _end(self, times: dict[str, float], name: str, measured: bool) -> tuple[str, Finalist]:
        self._unhook(self.hooks)
        self.winner = name, self.finalists[name]
        self.finish(times, name, measured)
        self.finalists = dict([self.winner])
        return self.winner


def over_budget(
    references: Sequence[Finalist], lossy: Mapping[str, Finalist], budget: float, report: Callable[[str, float], None],
    written: Sequence[int] | None,
) -> Callable[[tuple[Any, ...]], list[str]]:  # fmt: skip
    """A check for Race: run the first reference that memory suffices for and each lossy finalist once on the first real inputs, and
    name those whose relative error (L2, worst of the outputs and changed inputs) is over the budget.

    The runs leave no trace: inputs at the positions `written` (None: any may be) are copied, and the state of the random
    number generators is put back.
    """

    def check(args: tuple[Any, ...]) -> list[str]:
        places = range(len(args)) if written is None else written
        devices = {t.device.index for t in tensors_in(args) if t.is_cuda}

        def trial(run: Finalist) -> list[Tensor]:
            values = _copied(args, places)
            with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
                return tensors_in([run(*values), [values[i] for i in places]])

        def expect(references: Sequence[Finalist]) -> list[Tensor]:
            try:
                return trial(references[0])
            except torch_private.run_errors() as error:
                if len(references) == 1 or not torch_private.out_of_memory(error):
                    raise
            return expect(references[1:])

        failed = []
        expected = expect(references)
        for name, run in lossy.items():
            error = max((_relative(y, e) for y, e in zip(trial(run), expected, strict=True)), default=0.0)
            report(name, error)
            if not error <= budget:
                failed.append(name)
        return failed

    return check


def _copied(args: Sequence[Any], places: Iterable[int]) -> list[Any]:
    """`args` with the memory behind those at `places` copied, once each: what shared memory, or was one tensor, still does."""
    memory: dict[int, torch.UntypedStorage] = {}
    made: dict[int, Any] = {}

    def has_memory(value: Any) -> bool:
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
        return plain and not (value.is_conj() or value.is_neg())

    def copy(value: Any) -> Tensor:
        if id(value) not in made:
            base, place = value._base, (value.shape, value.stride(), value.storage_offset())
            if base is not None and base.dtype == value.dtype:  # AOTAutograd looks at the base of views
                made[id(value)] = copy(base).as_strided(*place)
            else:
                fresh = torch.empty(0, dtype=value.dtype, device=value.device)
                fresh.set_(memory[value.untyped_storage()._cdata], place[2], *place[:2])
                made[id(value)] = fresh.requires_grad_(value.requires_grad)
        return made[id(value)]

    for value in (args[i] for i in places):
        if not has_memory(value):
            made[id(value)] = value.clone() if isinstance(value, Tensor) else value
        elif value.untyped_storage()._cdata not in memory:
            memory[value.untyped_storage()._cdata] = value.untyped_storage().clone()
    with torch.no_grad():
        return [copy(a) if has_memory(a) and a.untyped_storage()._cdata in memory else made.get(id(a), a) for a in args]


def _relative(value: Tensor, expected: Tensor) -> float:
    """Infinite where what is not finite differs; whole numbers, which may differ wherever a value is rounded, are not compared."""
    if expected.is_complex():
        value, expected = torch.view_as_real(value.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    if not expected.is_floating_point() or expected.numel() == 0:
        return 0.0
    value, expected = value.detach().double(), expected.detach().double()
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(value), finite) or not torch.equal(value[~finite].nan_to_num(0.0), expected[~finite].nan_to_num(0.0)):
        return float("inf")
    scale = expected[finite].norm()
    return float((value[finite] - expected[finite]).norm() / scale) if scale > 0 else float(value[finite].norm())
