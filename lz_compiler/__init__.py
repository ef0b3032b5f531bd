"""LayerZero: a kernel planner for torch.compile. `torch.compile(model, backend="layerzero")` needs no import of it.

The import is light: backends, solvers and Inductor are loaded when the first graph is compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import compile, doctor, explain
    from .deploy.baking import bake
    from .deploy.fuzzing import FuzzReport, fuzz
    from .deploy.generation import StaticCacheDecoder
    from .deploy.model_fingerprint import Fingerprint, fingerprint
    from .deploy.offline import ModelPlan, load_plan, solve
    from .deploy.warming import load_baked, warmup
    from .kv_cache import KVCacheSpec
    from .options import Options
    from .reports.report import Report
    from .trust.canary import CanaryReport, canary

_LAZY = {
    "compile": ".api", "explain": ".api", "doctor": ".api", "KVCacheSpec": ".kv_cache", "Options": ".options",
    "solve": ".deploy.offline", "load_plan": ".deploy.offline", "bake": ".deploy.baking", "fuzz": ".deploy.fuzzing",
    "load_baked": ".deploy.warming", "warmup": ".deploy.warming", "StaticCacheDecoder": ".deploy.generation",
    "fingerprint": ".deploy.model_fingerprint", "canary": ".trust.canary", "CanaryReport": ".trust.canary",
    "Fingerprint": ".deploy.model_fingerprint", "FuzzReport": ".deploy.fuzzing", "ModelPlan": ".deploy.offline",
    "Report": ".reports.report",
}  # fmt: skip
__all__ = [
    "CanaryReport", "Fingerprint", "FuzzReport", "KVCacheSpec", "ModelPlan", "Options", "Report", "StaticCacheDecoder", "__version__",
    "bake", "canary", "compile", "doctor", "explain", "fingerprint", "fuzz", "load_baked", "load_plan", "solve", "warmup",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lz_compiler' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
