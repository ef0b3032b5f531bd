"""A Hugging Face model: what LayerZero chooses for it, and that the outputs are eager's. Random weights, no download."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lz_compiler as lz

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=1000
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(config.vocab_size, (1, 64))

# freeze: weights never change, so they may be packed and merged. race=False keeps the example short: as a rule the plan, Inductor alone
# and eager run in turn over the first calls, and the fastest stays.
compiled = torch.compile(model, backend="layerzero", options={"freeze": True, "race": False})
with torch.no_grad():
    expected = model(ids, use_cache=False).logits
    logits = compiled(ids, use_cache=False).logits

print(lz.explain(compiled))
print(f"\nlargest difference from eager: {(logits - expected).abs().max():.1e}")
print(f"tokens equal eager's: {torch.equal(logits.argmax(-1), expected.argmax(-1))}")
