"""Every example runs as a user runs it, and prints what its table in examples/README.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARY = re.compile(r"^    (?:\d+x )?([\w +]+): ((?:onednn|mkl|attention|mine)\.\w+)  [\d.]+ ms", re.MULTILINE)


def output(*command: str) -> str:
    # A fixed order of libraries instead of measurements: what is chosen does not depend on how busy the machine is.
    env = {**os.environ, "LAYERZERO_COST_MODEL": "constant"}
    done = subprocess.run([sys.executable, *command], cwd=EXAMPLES, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chosen(text: str) -> set[str]:
    """Kernels of other libraries than ATen and Inductor that a report lists as chosen."""
    return {kernel for _, kernel in LIBRARY.findall(text)}


def number(text: str, label: str) -> float:
    found = re.search(rf"{label}: ([\d.e+-]+)", text)
    assert found, text
    return float(found[1])


@pytest.mark.slow
def test_transformers_model() -> None:
    text = output("transformers_model.py")
    assert "mask causal" in text
    assert any("linear_packed" in kernel for kernel in chosen(text))
    assert number(text, "largest difference from eager") < 1e-4
    assert "tokens equal eager's: True" in text


@pytest.mark.slow
def test_timm_model() -> None:
    text = output("timm_model.py")
    assert "onednn.conv_packed" in chosen(text)
    assert number(text, "largest difference from eager") < 1e-4
    assert "classes equal eager's: True" in text


@pytest.mark.slow
def test_training() -> None:
    text = output("training.py")
    assert "forward graph" in text
    assert "onednn.linear" in chosen(text.partition("backward graph")[2])
    ours, eager = ([float(v) for v in line.split(":")[1].split()] for line in text.splitlines() if line.startswith("loss, "))
    assert ours == pytest.approx(eager, abs=2e-3)
    assert ours[-1] < 0.7 * ours[0]


@pytest.mark.slow
def test_generation() -> None:
    text = output("generation.py")
    assert chosen(text)
    assert "2 graphs for 24 tokens; compiled in the second run: 0" in text
    assert "tokens equal eager's: True" in text


def test_custom_kernel() -> None:
    text = output("custom_kernel.py")
    assert ("linear + relu", "mine.linear_relu") in LIBRARY.findall(text)
    assert number(text, "largest difference from eager") < 1e-4


@pytest.mark.slow
def test_ablation_notebook(tmp_path: Path) -> None:
    """Its code, cell by cell, gives the committed outputs; Jupyter is not needed."""
    cells = [c for c in json.loads((EXAMPLES / "ablation.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    mark = "# --- next cell ---"
    script = tmp_path / "cells.py"
    script.write_text(f"\nprint({mark!r})\n".join("".join(c["source"]) for c in cells))
    found = output(str(script)).split(f"{mark}\n")
    stored = ["".join("".join(o["text"]) for o in c["outputs"]) for c in cells]
    assert found[:2] == stored[:2]  # the same problems and prices, so the same objectives
    assert len(found) == len(stored) == 4
    # Where prices are equal, another version of the solver may take another plan; and seconds are seconds.
    assert re.findall(r"^\S+|measured +\S+", found[2], re.MULTILINE) == re.findall(r"^\S+|measured +\S+", stored[2], re.MULTILINE)
    solvers = [[line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")] for text in (found[3], stored[3])]
    assert solvers[0] == solvers[1]
    assert ["| greedy", "5/5"] in [row[:2] for row in solvers[0]]
