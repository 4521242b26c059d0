"""Write a recipe as plain data: 2-bit values, 4-bit keys, the first and last tokens kept exact.

Run: python examples/custom_recipe.py
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kvxform

RECIPE = {
    "version": 1,
    "name": "k4v2-sinks",
    "about": "int4 keys in a Hadamard basis, int2 values, 4 first and 16 last tokens exact.",
    "passes": [
        "rotate-v",
        "insert-cache",
        {"page-cache": {"page_size": 32}},
        "rotate-qk",
        {
            "quantize-kv": {
                "key": {"codec": "int", "bits": 4, "axis": "token"},
                "value": {"codec": "int", "bits": 2, "axis": "token"},
                "regions": {"sink": 4, "recent": 16},
            }
        },
        "simplify",
    ],
}


def make_model() -> GPT2LMHeadModel:
    """Return a two-layer GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=256,
        n_embd=128,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    """Run the example."""
    model = make_model()
    optimized = kvxform.optimize(model, RECIPE, progress=False)
    stream = optimized.plan.site(0).value
    print(f"values of layer 0: {[(p.name, p.dtype, p.width) for p in stream.planes]}")
    print(f"{optimized.plan.bits_per_value:.2f} bits per value in a long sequence")
    final = optimized.report.final
    print(f"KL to the source {final.kl:.1e} nats, same likeliest token {final.top1:.0%}")

    wrong = {**RECIPE, "passes": [*RECIPE["passes"][:-2], {"quantise-kv": {}}]}
    try:
        kvxform.optimize(model, wrong, progress=False)
    except kvxform.RecipeError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
