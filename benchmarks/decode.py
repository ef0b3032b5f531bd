"""Tokens a second of a decoding loop: a baked folder against TorchInductor's CUDA graphs, four layers of Llama-3-8B's width.

    python benchmarks/decode.py [--batches 1,32] [--steps 256] [--device cuda] [--json FILE]

A static cache of 4096 tokens, full but for the steps. Columns: `generate` of transformers, which compiles its forward with
`reduce-overhead`; the same compiled forward in a plain loop; `torch.compile(backend="layerzero")` in that loop; the baked folder in
that loop. Greedy choice of the next token, bfloat16; median of several runs, columns in turn. The columns start from the same cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import workloads_cuda

import lz_compiler as lz

FROZEN = {"freeze": True, "cudagraphs": True}
LENGTH = 4096


class Loop:
    """Greedy decoding by `forward(ids) -> logits (batch, 1, vocabulary)`, from the cache's state at the start of each run."""

    def __init__(self, forward: Callable[..., Any], state: dict[str, torch.Tensor], first: torch.Tensor, steps: int) -> None:
        self.forward, self.state, self.first, self.steps = forward, state, first, steps
        self.start = {name: value.clone() for name, value in state.items()}

    def rewind(self) -> None:
        for name, value in self.state.items():
            value.copy_(self.start[name])

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        ids, made = self.first, []
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            ids = self.forward(ids)[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
        return torch.cat(made, 1)


def fill(decoder: Any, used: int) -> None:
    torch.manual_seed(1)
    for name, buffer in decoder.named_buffers(recurse=False):
        if "length" in name:
            buffer.fill_(used)
        else:
            buffer.normal_()


def generate(decoder: Any, steps: int, used: int) -> Callable[[], torch.Tensor]:
    """transformers' own loop on the decoder's cache: the prompt is as long as what the cache holds, and one token more."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import CompileConfig

    batch = decoder.cache.layers[0].keys.shape[0]
    prompt = torch.ones(batch, used + 1, dtype=torch.int64, device=decoder.model.device)
    config = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0, compile_config=CompileConfig()
    )
    run = decoder.model.generate
    return lambda: run(prompt, generation_config=config, past_key_values=decoder.cache)[:, -steps:]


def baked(decoder: Any, first: torch.Tensor, folder: Path) -> Any:
    plan = lz.solve(decoder, (first,), **FROZEN)
    fill(decoder, 0)
    lz.bake(plan, folder, decoder, (first,))
    return lz.warmup(folder)


def run_batch(batch: int, steps: int, device: str, rounds: int, folder: Path) -> dict[str, Any]:
    used = LENGTH - steps - 8
    with torch.no_grad():
        decoder = lz.StaticCacheDecoder(workloads_cuda.transformer("llama", device), batch, LENGTH).eval()
    first = torch.ones(batch, 1, dtype=torch.int64, device=device)
    module = baked(decoder, first, folder)
    columns: dict[str, Any] = {}
    for name, options in (
        ("Inductor, reduce-overhead", {"mode": "reduce-overhead"}),
        ("LayerZero", {"backend": "layerzero", "options": FROZEN}),
    ):
        other = copy.deepcopy(decoder)
        fill(other, used)
        columns[name] = Loop(torch.compile(other, **options), dict(other.named_buffers(recurse=False)), first, steps)
    state = {name: getattr(module, name) for name in module.STATE}
    fill(decoder, used)
    for name, value in state.items():
        value.copy_(getattr(decoder, name.removeprefix("w_")))
    columns["LayerZero, baked"] = Loop(module.forward, state, first, steps)
    theirs = copy.deepcopy(decoder)
    columns["generate, Inductor reduce-overhead"] = Loop(lambda ids: ids, dict(theirs.named_buffers(recurse=False)), first, steps)
    own = generate(theirs, steps, used)
    times: dict[str, list[float]] = {name: [] for name in columns}
    made: dict[str, torch.Tensor] = {}
    for turn in range(rounds + 2):
        for name, loop in columns.items():
            try:
                loop.rewind()
                torch.cuda.synchronize() if device == "cuda" else None
                start = time.perf_counter()
                made[name] = own() if name.startswith("generate") else loop()
                torch.cuda.synchronize() if device == "cuda" else None
                if turn > 1:
                    times[name].append(time.perf_counter() - start)
            except (RuntimeError, ValueError, TypeError) as error:
                if turn == 0:
                    print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    expected = made["Inductor, reduce-overhead"]
    return {
        name: {"tokens_per_s": batch * steps / median(seconds), "ms_a_step": 1e3 * median(seconds) / steps,
               "same_tokens": float((made[name] == expected).float().mean())}
        for name, seconds in times.items() if seconds
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.steps} steps, cache of {LENGTH}\n")
    print("| batch | column | tokens/s | ms a step | same tokens as Inductor's |\n|---|---|---|---|---|")
    rows = []
    for batch in map(int, args.batches.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = run_batch(batch, args.steps, args.device, args.rounds, Path(folder) / "out")
        for column, row in found.items():
            print(
                f"| {batch} | {column} | {row['tokens_per_s']:.0f} | {row['ms_a_step']:.3f} | {100 * row['same_tokens']:.0f} % |",
                flush=True,
            )
            rows.append({"batch": batch, "column": column, **row})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
