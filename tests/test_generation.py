"""Decoding loops on transformers' static cache: nothing is planned or compiled from one step to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lz_compiler as lz
from lz_compiler.errors import OptionError
from lz_compiler.patterns import Recogniser

FAST: dict[str, Any] = {"race": False, "cost_model": "roofline"}
STEPS = 12


def tiny(**kwargs: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, **kwargs
    )
    return LlamaForCausalLM(config).eval()


def greedy(forward: Any, prompt: Tensor, steps: int) -> Tensor:
    """The tokens that a plain loop chooses, the first from the whole prompt."""
    made, ids = [], prompt
    with torch.no_grad():
        for _ in range(steps):
            ids = forward(ids)[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
    return torch.cat(made, 1)


def expected(model: Any, prompt: Tensor, steps: int) -> Tensor:
    ids = prompt
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :]


@pytest.mark.slow
def test_generate_compiles_one_graph_for_all_steps() -> None:
    model, prompt = tiny(), torch.randint(128, (2, 7))
    wanted = expected(model, prompt, STEPS)
    model.forward = torch.compile(model.forward, backend="layerzero", options=FAST)
    made = model.generate(
        prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, cache_implementation="static", pad_token_id=0
    )
    assert torch.equal(made[:, 7:], wanted)
    graphs = counters["layerzero"]["graphs"]
    assert 1 <= graphs <= 2, "one for the prompt, one for all steps"
    again = model.generate(
        prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, cache_implementation="static", pad_token_id=0
    )
    assert torch.equal(again, made)
    assert counters["layerzero"]["graphs"] == graphs


@pytest.mark.slow
def test_a_planned_and_a_baked_decoder(tmp_path: Path) -> None:
    """A prompt and its steps by two cells that share one cache; sizes inside a cell never plan or compile anything."""
    model, prompt = tiny(), torch.randint(128, (2, 7))
    wanted = expected(model, prompt, STEPS)
    decoder = lz.StaticCacheDecoder(model, batch=2, length=32).eval()
    plan = lz.solve(decoder, (prompt,), dynamic={"input_ids": {1: "tokens"}}, buckets={"tokens": [1, 16]}, freeze=True, **FAST)
    assert decoder.cumulative_length_0 == 0, "solving leaves no trace in the cache"
    lz.bake(plan, tmp_path / "out", decoder, (prompt,))
    run = lz.compile(decoder, plan=plan)
    assert torch.equal(greedy(run, prompt, STEPS), wanted)
    before = dict(counters["layerzero"])
    decoder.reset()
    assert torch.equal(greedy(run, prompt, STEPS), wanted)
    assert dict(counters["layerzero"]) == before
    module = lz.warmup(tmp_path / "out")
    assert torch.equal(greedy(module.forward, prompt, STEPS), wanted)


@pytest.mark.slow
def test_attention_knows_the_form_of_its_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers share one object; attention to keys that are no cache's has none."""
    seen: list[Any] = []
    regions = Recogniser.regions

    def noting(self: Recogniser) -> Any:
        for ctx in regions(self):
            seen.append((ctx.region.op, ctx.kv_cache))
            yield ctx

    monkeypatch.setattr(Recogniser, "regions", noting)
    model, ids = tiny(), torch.randint(128, (2, 1))
    lz.solve(lz.StaticCacheDecoder(model, batch=2, length=32).eval(), (ids,), **FAST)
    specs = [spec for op, spec in seen if op == "attention"]
    expected = lz.KVCacheSpec(strategy="contiguous", layout="HND", kv_heads=2, head_size=16, dtype="float32", device="cpu")
    assert len(specs) >= 2
    assert all(spec == expected and spec is specs[0] for spec in specs), specs
    assert {spec for op, spec in seen if op != "attention"} == {None}
    seen.clear()
    lz.solve(model, (), {"input_ids": torch.randint(128, (2, 7)), "use_cache": False, "return_dict": False}, **FAST)
    assert {spec for op, spec in seen if op == "attention"} == {None}


def test_a_sliding_cache_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        sliding_window=8,
    )  # fmt: skip
    with pytest.raises(OptionError, match="layer 0 caches in a StaticSlidingWindowLayer"):
        lz.StaticCacheDecoder(MistralForCausalLM(config).eval(), batch=1, length=32)
