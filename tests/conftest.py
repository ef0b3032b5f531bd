"""One cache folder for the whole run, nothing left from test to test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# Before anything reads it: tests must neither use nor touch the user's timings.
os.environ["LAYERZERO_CACHE_DIR"] = tempfile.mkdtemp(prefix="layerzero-tests-")

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
