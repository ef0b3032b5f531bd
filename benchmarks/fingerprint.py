"""What `lz.fingerprint` costs for a folder with a tokenizer of 50,000 entries and its merges: warm, and in the cases that are not.

    python benchmarks/fingerprint.py [--entries 50000] [--repeats 200] [--json FILE]

Each number is a median of whole calls. Warm: nothing changed since the last call. Warm, store opened anew: the first call of a
process, without its imports. Touched: a file has a new time and the same bytes, so bytes are hashed and nothing is parsed. Cold:
nothing is stored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from lz_compiler.deploy.model_fingerprint import GRAIN_NS, KIND, fingerprint
from lz_compiler.timings import open_store


def write_folder(folder: Path, entries: int) -> None:
    """A byte-pair tokenizer in which every entry beyond the letters comes from a merge, a config, and 64 MB of weights."""
    letters = [chr(0x100 + code) for code in range(256)]
    pairs = itertools.product(letters, letters)
    merges = [pair for pair, _ in zip(pairs, range(entries - len(letters)), strict=False)]
    vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    added = [{"id": entries, "content": "<|end|>", "special": True}]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "ByteLevel"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": entries + 1}))
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 20) * 64)


def milliseconds(call: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    taken = []
    for _ in range(repeats):
        before()
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return median(taken) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json")
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}\n")
    with tempfile.TemporaryDirectory() as base:
        folder, cache = Path(base, "model"), str(Path(base, "cache"))
        folder.mkdir()
        write_folder(folder, options.entries)
        tokenizer, config = folder / "tokenizer.json", folder / "config.json"
        store, few = open_store(cache), max(5, options.repeats // 20)

        def call() -> object:
            return fingerprint(folder, cache)

        results = {"cold": milliseconds(call, few, before=lambda: store.clear(KIND))}
        time.sleep(GRAIN_NS / 1e9 + 0.1)  # only then is a stat a proof
        call()
        results |= {
            "warm": milliseconds(call, options.repeats),
            "warm, store opened anew": milliseconds(call, options.repeats, before=store.close),
            "touched config.json": milliseconds(call, few, before=lambda: os.utime(config)),
            "touched tokenizer.json": milliseconds(call, few, before=lambda: os.utime(tokenizer)),
        }
        print(f"tokenizer.json: {options.entries} entries, {tokenizer.stat().st_size / 1e6:.1f} MB; weights: 67.1 MB\n")
    print("| call | median ms |\n|---|---|")
    for name, value in results.items():
        print(f"| {name} | {value:.3f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
