"""Optimise a tiny Llama from a config, decode with its quantised cache, save it and load it again.

Run: python examples/optimize_tiny_llama.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvxform


def make_model() -> LlamaForCausalLM:
    """Return a two-layer Llama with random weights."""
    torch.manual_seed(0)
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
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Run the example."""
    optimized = kvxform.optimize(make_model(), "kv4", progress=False)
    report = optimized.report
    print(
        f"{report.kv_bytes_per_token:.0f} bytes per token, {report.bits_per_value} bits per value"
    )
    for record in report.passes:
        print(
            f"  {record.name:13} {record.exactness:12} KL to the source {record.vs_source.kl:.1e}"
        )

    prompts = torch.tensor([[0, 17, 42, 99], [2, 0, 5, 6]])  # the second one is padded on the left
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    session = optimized.new_session(max_batch_size=2, max_seq_len=64)
    logits = session.prefill(prompts, mask)
    for _ in range(8):
        logits = session.decode(logits.argmax(-1))
    print(f"lengths {session.sequence_lengths()}, {session.cache_bytes()} bytes of cache")

    with tempfile.TemporaryDirectory() as folder:
        optimized.save(Path(folder) / "artifact")
        again = kvxform.load(Path(folder) / "artifact")
        same = torch.equal(again(prompts, mask), optimized(prompts, mask))
        print(f"the loaded artifact gives the same logits: {same}")


if __name__ == "__main__":
    main()
