"""Ten workloads for one GPU, in bfloat16: four layers of Llama-3-8B's width, BERT-large's width, three vision models.

The floors are those of an NVIDIA H200, at rates measured on one: a copy moves 4.3 TB/s, an 8192-wide bfloat16 product of random
numbers runs at 790 TFLOP/s. They count the weights' products and attention, or the bytes of weights and cache, and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._inductor
from torch import nn
from workloads import Column, Suite, Workload

BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12

SIZES: dict[str, Any] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192,
    },
    "bert": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 4096},
    # (batch, length)
    "prefill_1x512": (1, 512), "prefill_1x4096": (1, 4096), "prefill_4x2048": (4, 2048),
    "decode_1x4096": (1, 4096), "decode_32x4096": (32, 4096), "train_4x2048": (4, 2048),
    "bert_large": (32, 512, 400),  # (batch, length, tokens that are not padding)
    # (architecture, batch, further arguments of the model)
    "resnet50": ("resnet50", 64, {}),
    "convnext_base": ("convnext_base", 64, {"ls_init_value": 1.0}),  # 1e-6 would hide all but the stem
    "vit_large": ("vit_large_patch16_224", 32, {}),
}  # fmt: skip


def transformer(name: str, device: str) -> nn.Module:
    """A transformers model with random weights, as loading one in bfloat16 leaves it (rotary frequencies in float32)."""
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

    kind, config = (AutoModelForCausalLM, LlamaConfig) if name == "llama" else (AutoModel, BertConfig)
    with torch.device(device):
        return kind.from_config(config(**SIZES[name]), dtype=torch.bfloat16).eval()


def weights(model: nn.Module) -> tuple[int, int]:
    """Numbers in a Llama's layers, and in its output head."""
    return sum(p.numel() for p in model.model.layers.parameters()), model.lm_head.weight.numel()


def tokens(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


def floor_ms(flops: float = 0, moved: float = 0) -> float:
    return 1e3 * max(flops / FLOP_PER_S, moved / BYTES_PER_S)


def prefill(name: str, device: str) -> Workload:
    model, (batch, length) = transformer("llama", device), SIZES[name]
    layers, head = weights(model)
    attention = 4 * model.config.num_hidden_layers * batch * length * length * model.config.hidden_size / 2  # causal: half
    body = 2 * batch * length * layers + attention
    floors = {
        "floor": floor_ms(body + 2 * batch * head, 2 * (layers + head)),  # the model is asked for its last position only
        "floor, head at all positions": floor_ms(body + 2 * batch * length * head),
    }
    return Workload(model, {"input_ids": tokens(model, batch, length), "use_cache": False, "logits_to_keep": 1}, floors)


@torch.no_grad()
def decode(name: str, device: str) -> Workload:
    from transformers import StaticCache

    model, (batch, length) = transformer("llama", device), SIZES[name]
    cache = StaticCache(config=model.config, max_cache_len=length)
    position = torch.full((batch, 1), length - 2, device=device)
    inputs = {"input_ids": tokens(model, batch, 1), "position_ids": position, "past_key_values": cache, "use_cache": True}
    model(**inputs)  # A static cache allocates in its first call, which must not be one inside a compiled graph.
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    cached = sum(2 * layer.keys.numel() for layer in cache.layers)
    return Workload(model, inputs, {"floor": floor_ms(moved=2 * (sum(weights(model)) + cached))})


def train(name: str, device: str) -> Workload:
    model, (batch, length) = transformer("llama", device), SIZES[name]
    ids = tokens(model, batch, length)
    return Workload(model.train(), {"input_ids": ids, "labels": ids, "use_cache": False}, trains=True)


def bert(name: str, device: str) -> Workload:
    model, (batch, length, real) = transformer("bert", device), SIZES[name]
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    mask[:, real:] = 0
    products = 2 * batch * length * sum(p.numel() for p in model.encoder.parameters())
    attention = 4 * model.config.num_hidden_layers * batch * length * real * model.config.hidden_size
    inputs = {"input_ids": tokens(model, batch, length), "attention_mask": mask}
    return Workload(model, inputs, {"floor": floor_ms(products + attention)})


def vision(name: str, device: str) -> Workload:
    import timm

    architecture, batch, arguments = SIZES[name]
    with torch.device(device):
        model = timm.create_model(architecture, pretrained=False, **arguments).eval()
        images = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16)
    for module in model.modules():  # as after training: fresh ones (a residual branch starts at zero) make zeros of most tensors
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return Workload(model.to(torch.bfloat16), {"x": images})


MODELS = {
    "decode_1x4096": decode, "decode_32x4096": decode, "prefill_1x512": prefill, "prefill_1x4096": prefill,
    "prefill_4x2048": prefill, "bert_large": bert, "resnet50": vision, "convnext_base": vision, "vit_large": vision,
    "train_4x2048": train,
}  # fmt: skip
INFERENCE = tuple(name for name in MODELS if name != "train_4x2048")
FROZEN = {"freeze": True, "cudagraphs": True}

COLUMNS: dict[str, Column] = {
    "eager": Column(),
    "inductor": Column("inductor", cold=True),
    "inductor+reduce-overhead": Column("inductor", mode="reduce-overhead"),
    "inductor+max-autotune": Column("inductor", mode="max-autotune", cold=True),
    "inductor+reduce-overhead+freeze": Column(
        "inductor", {"freezing": True, **torch._inductor.list_mode_options("reduce-overhead")}, freezing=True, models=INFERENCE
    ),
    "layerzero": Column("layerzero"),
    "layerzero+reduce-overhead": Column("layerzero", mode="reduce-overhead"),
    "layerzero+reduce-overhead+freeze": Column("layerzero", FROZEN, models=INFERENCE),
    "layerzero+reduce-overhead+freeze+budget": Column(
        "layerzero", {**FROZEN, "error_budget": 2e-2}, models=("prefill_4x2048", "decode_1x4096")
    ),
}

SUITE = Suite(
    models={name: partial(make, name) for name, make in MODELS.items()},
    columns=COLUMNS,
    baselines=tuple(COLUMNS)[:5],
    dtype=torch.bfloat16,
    exact=torch.float32,
    warmup=60,
    cold=("layerzero+reduce-overhead+freeze", "layerzero+reduce-overhead", "layerzero"),
)
