"""A machine of known peaks, so that plans by the roofline's prices are the same wherever the tests run."""

from __future__ import annotations

import os
from pathlib import Path

from lz_compiler.target import environment
from lz_compiler.timings import open_store

PEAKS = {
    "bandwidth": 2e10, "cache_bandwidth": 1e11, "cache_bytes": 1 << 24, "launch_ns": 2000,
    "flops": {"float32": 2e11, "bfloat16": 8e11, "float16": 1e10, "transcendental": 3e9},
}  # fmt: skip


def plant(folder: str, **changes: object) -> None:
    """Make a cache folder one of a machine in use: the peaks of this CPU as if they had been measured, the attention kernel compiled."""
    key = "|".join(f"{k}={v}" for k, v in sorted(environment("cpu").items()))
    open_store(folder).put_record("peaks", key, {**PEAKS, **changes})
    compiled = Path(folder) / "compiled"
    if not compiled.exists():
        compiled.symlink_to(os.environ["TESTS_COMPILED"])
