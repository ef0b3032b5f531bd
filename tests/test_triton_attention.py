"""The attention kernels through Triton's interpreter, in a process of its own: Triton decides at its import whether kernels are
interpreted, and other tests import it as a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_attention.py")


@pytest.mark.parametrize(("marked", "least"), [("not slow", 37), pytest.param("slow", 15, marks=pytest.mark.slow)])
def test_attention_kernels(marked: str, least: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(CASES)]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False)
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert passed is not None
    assert int(passed[1]) >= least, ran.stdout[-2000:]
