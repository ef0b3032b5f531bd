"""How fast this CPU is just now.

Clocks, and whoever else uses the host, slow a CPU by a quarter for tenths of seconds or for minutes, and CPU time does not tell. What is
measured meanwhile looks dear beside what was measured before. So a small product, whose best time is known, is timed along.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

SIZE = 512  # of the square product: about a millisecond on two cores
FIRST_S = 0.05  # for which it is timed before it is believed
PATIENCE_S = 2.0  # that a process waits, all in all, for a slow CPU
SLOW = 1.15  # times the best


class Pace:
    """`best_s`: seconds of the product when nothing slows it, as far as is known. `patience_s`: how long it may still be waited for."""

    def __init__(self) -> None:
        self.best_s, self.patience_s = math.inf, PATIENCE_S
        self._settled = False

    def expect(self, best_s: object) -> None:
        """Takes what was stored as the best of this machine, if it is a time."""
        if isinstance(best_s, int | float) and best_s > 0:
            self.best_s = min(self.best_s, best_s)

    def now(self) -> float:
        """Seconds of the product."""
        end = time.perf_counter() + (0.0 if self._settled else FIRST_S)
        seconds = self._product()
        while time.perf_counter() < end:
            seconds = self._product()
        self._settled = True
        return seconds

    def _product(self) -> float:
        a, out = _matrices()
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds = time.perf_counter() - start
        self.best_s = min(self.best_s, seconds)
        return seconds

    def brisk(self, times: Sequence[float]) -> list[int]:
        """Of the rounds between such times, those in which the CPU was not slow."""
        return [i for i, pair in enumerate(pairwise(times)) if max(pair) <= SLOW * self.best_s]

    def briskest(self, times: Sequence[float]) -> list[int]:
        """The same, but never none: where it was slow all along, those in which it was least so."""
        rounds = [max(pair) for pair in pairwise(times)]
        return [i for i, seconds in enumerate(rounds) if seconds <= SLOW * max(self.best_s, min(rounds))]


@functools.cache
def _matrices() -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whose tensors nothing outside of it may write
        a = torch.ones(SIZE, SIZE, dtype=torch.float32, device="cpu")
        return a, torch.empty_like(a)


PACE = Pace()
