"""Models that the bundled recipes are locked on, beside those of the examples."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def half_width() -> LlamaForCausalLM:
    """Return a two-layer Llama in float16, for recipes that run on CUDA alone."""
    return LlamaForCausalLM(_config(2)).half()


def alike_layers() -> LlamaForCausalLM:
    """Return a four-layer Llama whose layers are alike, so that recipes find some to share."""
    model = LlamaForCausalLM(_config(4))
    first = model.model.layers[0].state_dict()
    for layer in model.model.layers:
        layer.load_state_dict({k: v + 0.002 * torch.randn_like(v) for k, v in first.items()})
    return model


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
