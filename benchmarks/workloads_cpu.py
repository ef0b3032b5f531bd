"""Five small models for a CPU, in float32."""

from __future__ import annotations

import torch
from workloads import Column, Suite, Workload

COLUMNS: dict[str, Column] = {
    "eager": Column(),
    "inductor": Column("inductor"),
    "inductor+freeze": Column("inductor", {"freezing": True}, freezing=True),
    "inductor+freeze+max-autotune": Column("inductor", {"freezing": True, "max_autotune": True}, freezing=True),
    "layerzero": Column("layerzero"),
    "layerzero+freeze": Column("layerzero", {"freeze": True}),
    "layerzero+freeze+budget": Column("layerzero", {"freeze": True, "error_budget": 1e-2}),
}


def llama(device: str) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        vocab_size=8000,
        use_cache=False,
    )
    return Workload(LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(8000, (1, 256))})


def bert(device: str) -> Workload:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
    lengths = torch.tensor([128, 96, 64, 32])
    mask = (torch.arange(128) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(config.vocab_size, (4, 128)), "attention_mask": mask}
    return Workload(BertModel(config).eval(), inputs)


def vit(device: str) -> Workload:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return Workload(ViTModel(config).eval(), image())


def resnet50(device: str) -> Workload:
    from transformers import ResNetConfig, ResNetModel

    return Workload(ResNetModel(ResNetConfig()).eval(), image())


def convnext(device: str) -> Workload:
    from transformers import ConvNextConfig, ConvNextModel

    return Workload(ConvNextModel(ConvNextConfig()).eval(), image())


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, 224, 224)}


SUITE = Suite(
    models={"llama": llama, "bert": bert, "vit": vit, "resnet50": resnet50, "convnext": convnext},
    columns=COLUMNS,
    baselines=tuple(COLUMNS)[:4],
    dtype=torch.float32,
    exact=torch.float64,
    warmup=40,
)
