"""Token by token over a static cache: planned once for the prompt and the steps, then a plain loop in which nothing compiles."""

import time

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lz_compiler as lz

STEPS = 24

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=1000
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(config.vocab_size, (1, 12))
wanted = model.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0)[:, prompt.shape[1] :]

decoder = lz.StaticCacheDecoder(model, batch=1, length=64).eval()
# Two cells share the cache: a prompt of 2 to 16 tokens, and one token at a time.
plan = lz.solve(decoder, (prompt,), dynamic={"input_ids": {1: "tokens"}}, buckets={"tokens": [1, 16]}, freeze=True, race=False)
run = lz.compile(decoder, plan=plan)


@torch.no_grad()
def generate(ids):
    decoder.reset()
    made = []
    for _ in range(STEPS):
        ids = run(ids)[:, -1].argmax(-1, keepdim=True)
        made.append(ids)
    return torch.cat(made, 1)


generate(prompt)  # the first call of a cell compiles it
graphs, start = counters["layerzero"]["graphs"], time.perf_counter()
tokens = generate(prompt)
seconds = time.perf_counter() - start

print(lz.explain(plan))
print(f"\n{STEPS} tokens in {seconds * 1e3:.0f} ms, graphs compiled meanwhile: {counters['layerzero']['graphs'] - graphs}")
print(f"tokens equal eager's: {torch.equal(tokens, wanted)}")
