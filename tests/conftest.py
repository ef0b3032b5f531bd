"""One cache folder for the whole run, nothing left from test to test."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything reads it: tests must neither use nor touch the user's timings.
os.environ["LAYERZERO_CACHE_DIR"] = tempfile.mkdtemp(prefix="layerzero-tests-")
# The processes that this one starts inherit it, xdist's workers too: the attention kernel is compiled once for all of them.
os.environ["TESTS_COMPILED"] = os.environ.get("TESTS_COMPILED") or tempfile.mkdtemp(prefix=f"layerzero-compiled-{os.getpid()}-")

import pytest
import torch
from machine import plant

atexit.register(shutil.rmtree, os.environ["LAYERZERO_CACHE_DIR"], ignore_errors=True)
if f"-{os.getpid()}-" in os.environ["TESTS_COMPILED"]:
    atexit.register(shutil.rmtree, os.environ["TESTS_COMPILED"], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules that turn Triton into its interpreter when they are imported, for the whole process: not beside a GPU's tests."""
    interpreted = collection_path.name.startswith("test_triton")
    return True if interpreted and config.getoption("markexpr") == "gpu" else None


@pytest.fixture(scope="session", autouse=True)
def known_peaks() -> None:
    plant(os.environ["LAYERZERO_CACHE_DIR"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
