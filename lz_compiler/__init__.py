"""LayerZero: a kernel planner for torch.compile. `torch.compile(model, backend="layerzero")` needs no import of it.

The import is light: backends, solvers and Inductor are loaded when the first graph is compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import compile, doctor, explain
    from .baking import bake
    from .canary_run import CanaryReport, canary
    from .fuzzing import fuzz
    from .generation import StaticCacheDecoder
    from .kv_cache import KVCacheSpec
    from .model_fingerprint import fingerprint
    from .offline import load_plan, solve
    from .options import Options
    from .warming import load_baked, warmup

_LAZY = {
    "compile": ".api", "explain": ".api", "doctor": ".api", "bake": ".baking", "canary": ".canary_run",
    "CanaryReport": ".canary_run", "KVCacheSpec": ".kv_cache", "fingerprint": ".model_fingerprint", "solve": ".offline",
    "load_plan": ".offline", "Options": ".options", "StaticCacheDecoder": ".generation", "load_baked": ".warming", "warmup": ".warming",
    "fuzz": ".fuzzing",
}  # fmt: skip
__all__ = [
    "CanaryReport", "KVCacheSpec", "Options", "StaticCacheDecoder", "__version__", "bake", "canary", "compile", "doctor", "explain",
    "fingerprint", "fuzz", "load_baked", "load_plan", "solve", "warmup",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lz_compiler' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
