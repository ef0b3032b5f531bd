"""`lz.fuzz` on three models: the proof of the baked file, then 500 random shapes each against the model. CPU, about two minutes.

python benchmarks/fuzz.py [--examples 500]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lz_compiler as lz
from lz_compiler.zoo import LlamaConfig, llama

Case = tuple[nn.Module, tuple[Tensor, ...], Mapping[str, Mapping[int, str]], Mapping[str, Sequence[int]]]


class Bert(nn.Module):
    """BERT of transformers, small, with random weights: token numbers and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        self.bert = BertModel(
            BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def cases() -> dict[str, Case]:
    small, (ids,), _ = llama(LlamaConfig(hidden=256, layers=2, intermediate=704, vocab=2000), length=64)
    mask = torch.ones(2, 32, dtype=torch.int64)
    both = {"input_ids": {1: "seq"}, "attention_mask": {1: "seq"}}
    return {
        "llama, seq": (small, (ids,), {"input_ids": {1: "seq"}}, {"seq": [16, 128]}),
        "BERT, seq in two arguments": (Bert().eval(), (torch.randint(1000, (2, 32)), mask), both, {"seq": [16, 64]}),
        "llama, batch and seq": (small, (ids.repeat(2, 1),), {"input_ids": {0: "batch", 1: "seq"}}, {"batch": [4], "seq": [16, 64]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    examples = parser.parse_args().examples
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (model, args, dynamic, buckets)) in enumerate(cases().items()):
            plan = lz.solve(model, args, dynamic=dynamic, buckets=buckets, freeze=True, race=False, cost_model="roofline")
            out = Path(folder) / str(i)
            lz.bake(plan, out, model, args)
            start = time.perf_counter()
            report = lz.fuzz(out, model=model, examples=examples)
            print(f"{name}: {time.perf_counter() - start:.1f} s\n{report}\n", flush=True)


if __name__ == "__main__":
    main()
