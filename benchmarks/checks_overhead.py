"""What all checks take of a warm compile: canary look-up, quarantine, descriptors, policy, the store's own.

    python benchmarks/checks_overhead.py

The checks' functions are timed where they are called from outside of one another. faults.py prints the same table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lz_compiler.timings import TimingStore

OVERHEAD = """
import json, sys, time
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import torch
from transformers import BertConfig, BertModel
import lz_compiler
from lz_compiler import backend, backends, cache_folder, plan_io, planning, timings
from lz_compiler.trust import capabilities, circuit, policy, verdicts
from lz_compiler.backends import base

spent, calls, inside = {}, {}, []
def timed(owner, name, label):
    run = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if inside:
            return run(*args, **kwargs)
        inside.append(label)
        start = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - start
            calls[label] = calls.get(label, 0) + 1
            inside.pop()
    setattr(owner, name, wrapped)

for name in ("__init__", "refusal", "marks"):
    timed(verdicts.Trust, name, "canary look-up (verdicts.py)")
for name in ("__init__", "refusal", "of_plans"):
    timed(circuit.Quarantine, name, "quarantine (circuit.py)")
timed(capabilities, "_descriptor", "descriptors: reading")
for name in ("subject", "refusal"):
    timed(capabilities, name, "descriptors: conditions")
for name in ("refusals", "weights", "check_names"):
    timed(policy.Policy, name, "policy")
timed(backend, "verdict_or_none", "stored verdict: types")
timed(cache_folder, "check", "cache folder and store: owner, links, structure")
timed(timings, "_prepare", "cache folder and store: owner, links, structure")
torch.manual_seed(0)
model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, intermediate_size=256)).eval()
ids = torch.randint(0, 1000, (2, 64))
rules = {"avoid": [{"op": "linear", "kernel": "aten.*"}], "prefer": [{"op": "attention", "backend": "aten"}]}
chosen = {"backends": ["aten", "onednn"], "policy": rules, "race": False, "measure_budget_s": 60.0}
with torch.no_grad():
    torch.compile(lambda x: x + 1)(torch.ones(3))
    torch._dynamo.reset()
    spent.clear(), calls.clear()
    start = time.perf_counter()
    torch.compile(model, backend="layerzero", options=chosen)(ids)
    whole = time.perf_counter() - start
names = sorted({name.rpartition("/")[2] for name in opened if "backends/" in name and name.endswith(".json")})
print("FOUND", json.dumps({"whole": whole, "spent": spent, "calls": calls, "opened": names}))
"""


def overhead(cache: Path) -> tuple[str, bool]:
    """What the checks take of the first call of a two-layer BERT, with stored timings, in a fresh process; planned anew each time."""
    env = {**os.environ, "LAYERZERO_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    runs = []
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", OVERHEAD], env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(json.loads(done.stdout.split("FOUND", 1)[1]))
        TimingStore.open(cache).clear("verdict")
    best = min(runs[1:], key=lambda run: sum(run["spent"].values()) / run["whole"])
    lines = ["| check | calls | ms | % of the compile |", "|---|--:|--:|--:|"]
    for name, seconds in sorted(best["spent"].items()):
        lines.append(f"| {name} | {best['calls'][name]} | {seconds * 1e3:.2f} | {100 * seconds / best['whole']:.2f} |")
    shares = [100 * sum(run["spent"].values()) / run["whole"] for run in runs[1:]]
    lines.append(f"| all | | {sum(best['spent'].values()) * 1e3:.2f} | {min(shares):.2f} |")
    lines.append(
        f"\nWhole warm compile: {best['whole']:.2f} s; of three runs the checks took {', '.join(f'{s:.2f}' for s in shares)} %. "
        f"Descriptors opened, with `backends=['aten', 'onednn']`: {', '.join(best['opened'])}."
    )
    return "\n".join(lines), max(shares) < 3.0 and best["opened"] == ["aten.json", "onednn.json"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table, fine = overhead(Path(folder))
    print(table)
    sys.exit(not fine)
