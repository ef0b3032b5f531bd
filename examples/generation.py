"""Text generation: `generate` with transformers' static cache. One graph for the prompt, one for all steps, then nothing compiles.

To plan such a decoder ahead of time, or to bake it: `lz.StaticCacheDecoder`, docs/offline_plans.md.
"""

import time

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lz_compiler as lz

STEPS = 24

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, vocab_size=1000
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(config.vocab_size, (1, 12))
how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
expected = model.generate(prompt, **how)

model.forward = torch.compile(model.forward, backend="layerzero", options={"freeze": True, "race": False})
model.generate(prompt, cache_implementation="static", **how)  # compiles
graphs, start = counters["layerzero"]["graphs"], time.perf_counter()
tokens = model.generate(prompt, cache_implementation="static", **how)
seconds = time.perf_counter() - start

print(lz.explain(model))
print(f"\n{graphs} graphs for {STEPS} tokens; compiled in the second run: {counters['layerzero']['graphs'] - graphs}")
print(f"{STEPS / seconds:.0f} tokens/s")
print(f"tokens equal eager's: {torch.equal(tokens, expected)}")
