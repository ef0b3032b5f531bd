"""A transformers decoder with its static key-value cache inside, as `lz.solve` and `lz.bake` need it: state in buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError

STATE = ("keys", "values", "cumulative_length")  # of a layer of transformers' StaticCache


class StaticCacheDecoder(nn.Module):
    """`forward(input_ids)` appends (batch, length) tokens to the cache and returns the last position's logits (batch, 1, vocabulary).

    `model`: a transformers causal language model whose layers all attend to everything before (no sliding window). `length`: tokens
    that the cache holds; what is beyond is out of bounds: an error in eager, the end of the process in compiled code on a CPU.
    `reset()` forgets them. The buffers are not saved with the model.

    OptionError for what is no such model, a layer that caches in another way, and a wrong number.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        from transformers import PreTrainedModel, StaticCache

        if not isinstance(model, PreTrainedModel):
            raise OptionError(f"StaticCacheDecoder takes a causal language model of transformers; given: {type(model).__name__}.")
        for name, value in (("batch", batch), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}. Give a whole number above 0.")
        super().__init__()
        self.model, config = model, model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(batch, config.num_key_value_heads, head, model.dtype, model.device)
        for i, layer in enumerate(self.cache.layers):
            if type(layer).__name__ != "StaticLayer":
                raise OptionError(f"layer {i} caches in a {type(layer).__name__}; only a plain StaticLayer is supported.")
            for name in STATE:
                self.register_buffer(f"{name}_{i}", getattr(layer, name), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = [(layer, name, f"{name}_{i}") for i, layer in enumerate(self.cache.layers) for name in STATE]
        before = [getattr(layer, name) for layer, name, _ in places]
        for layer, name, buffer in places:
            setattr(layer, name, getattr(self, buffer))
        logits: Tensor = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        for (layer, name, _), value in zip(places, before, strict=True):
            setattr(layer, name, value)  # under tracing the buffers are fake tensors, which must not stay
        return logits

    @torch.no_grad()
    def reset(self) -> None:
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
