"""Errors that a user can cause or fix. Each message says what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SHOWN = 200  # characters of a wrong name


class LayerZeroError(Exception):
    """Base of every error that LayerZero raises on purpose."""


class OptionError(LayerZeroError, ValueError):
    """An option, mode or value that does not exist."""


class TorchVersionError(LayerZeroError, ImportError):
    """The installed torch is outside the supported range."""


class PolicyError(OptionError):
    """A policy that cannot be read, names what does not exist, or leaves a graph without a plan."""


class KernelError(LayerZeroError, RuntimeError):
    """A kernel raised while a compiled graph ran, and the call could not be repeated without it."""


class DeviceLostError(LayerZeroError, RuntimeError):
    """A kernel that was being measured left the device unusable for the rest of the process."""

    def __init__(self, index: int, what: str, error: str) -> None:
        self.index, self.error = index, error  # which of the candidates that were measured together
        super().__init__(
            f"{what} left the CUDA device unusable for this process while it was measured: {error}. It is recorded as failed, and "
            f"not tried again on this machine: start the process again."
        )


class UnjudgedError(LayerZeroError, RuntimeError):
    """Eager's own result is not finite where float64's is: no kernel can be judged by it."""


class PlanError(LayerZeroError, ValueError):
    """A plan that cannot be read, or does not belong to this graph or machine."""


class CapabilityError(LayerZeroError, ValueError):
    """A backend's descriptor that cannot be read: not JSON, of an unknown schema version, or with a field that does not exist."""


class ModelError(LayerZeroError, ValueError):
    """A learned cost model that cannot be read, or cannot be trained."""


class TooFewError(ModelError):
    """Not enough measurements to train a cost model on."""


class FingerprintError(LayerZeroError, ValueError):
    """A model folder that has no fingerprint, or a stored fingerprint that cannot be read."""


class RankError(LayerZeroError, RuntimeError):
    """Ranks of one job that do not agree, or of which one did not come in time."""


class SolverError(LayerZeroError, RuntimeError):
    """No valid plan exists for the problem as posed."""


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no message"


def told(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(str(error))}"


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """A message for a wrong name, with the nearest right one."""
    names = sorted(allowed)
    text = str(given) if len(str(given)) <= MAX_SHOWN else f"{str(given)[:MAX_SHOWN]}..."
    near = difflib.get_close_matches(text, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {text!r}.{hint} Allowed: {', '.join(names)}."
