"""LayerZero: a kernel planner for torch.compile. `torch.compile(model, backend="layerzero")` needs no import of it.

The import is light: backends, solvers and Inductor are loaded when the first graph is compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import compile, doctor, explain
    from .kv_cache import KVCacheSpec
    from .options import Options

_LAZY = {"compile": ".api", "explain": ".api", "doctor": ".api", "KVCacheSpec": ".kv_cache", "Options": ".options"}
__all__ = ["KVCacheSpec", "Options", "__version__", "compile", "doctor", "explain"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lz_compiler' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
