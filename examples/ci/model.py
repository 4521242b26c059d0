"""The model of this project: small and without downloads, so that every change is built in CI."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM


def make_model() -> LlamaForCausalLM:
    """Return a two-layer Llama; kvxform seeds the random numbers before it calls this."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)
