"""The same small program under two lowerings, and how far their results lie apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from programs import llama_program, token_ids
from torch import Tensor

from kvxform.ir.program import Program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.runtime.loading import move_program
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session import Session

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL_KIVI = {  # as recipe kivi2, with a quarter of the exact tokens
    "version": 1,
    "name": "small-kivi",
    "passes": [
        "insert-cache",
        {"page-cache": {"page_size": 32}},
        {
            "quantize-kv": {
                "key": {"codec": "int", "bits": 2, "axis": "channel", "group": 32, "zero": "float"},
                "value": {"codec": "int", "bits": 2, "group": 32, "zero": "float"},
                "key_regions": {"recent": 32, "flush": "block"},
                "value_regions": {"recent": 32},
            }
        },
    ],
}


def recipe_for(recipe: str | dict[str, Any], *, compile: bool = False) -> Recipe:
    """Return a recipe with target triton."""
    data = load_recipe(recipe).to_data()
    data.pop("bounds", None)  # these models are too small for them
    return load_recipe({**data, "target": {"lowering": "triton", "compile": compile}})


def lowered_program(
    recipe: str | dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    source: Program | None = None,
    **model: Any,
) -> Program:
    """Return a program after a recipe, on `DEVICE`, without a limit of its context.

    It is Llama-like unless `source` is given.
    """
    program = source or llama_program(**{"dtype": dtype, "head_dim": 64, **model})
    program.info = dataclasses.replace(program.info, context_length=None)
    data = {**recipe_for(recipe).to_data(), "target": {"lowering": "eager"}}
    program, _ = run_pipeline(program, load_recipe(data), executor=OptimizedModel, verify="none")
    return move_program(program, DEVICE)


def both(program: Program, *, compile: bool = False) -> tuple[OptimizedModel, OptimizedModel]:
    """Return the eager and the Triton lowering of a program."""
    target = recipe_for("exact", compile=compile)
    return OptimizedModel(program), OptimizedModel(program, recipe=target)


def prompts(program: Program, rows: int, tokens: int) -> Tensor:
    """Return seeded ids `[rows, tokens]` on `DEVICE`."""
    return token_ids(program, rows, tokens).to(DEVICE)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    assert got.shape == expected.shape
    worst = (got.double() - expected.double()).abs().max()
    return float(worst / expected.double().abs().max())


def divergence(got: Tensor, expected: Tensor) -> float:
    """Return the mean KL divergence of logits `[..., vocab]`, in nats."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_same_cache(got: Session, expected: Session, bound: float) -> None:
    """Compare lengths, bytes and the logical caches of all layers.

    Rounding moves single codes by whole steps, so `bound` is that of the root mean square error.
    """
    assert got.sequence_lengths() == expected.sequence_lengths()
    assert got.cache_bytes() == expected.cache_bytes()
    for site in expected.plan.sites:
        a, b = got.logical_cache(site.layer), expected.logical_cache(site.layer)
        for x, y in zip((*a.k, *a.v), (*b.k, *b.v), strict=True):
            assert x.shape == y.shape
            error = (x.double() - y.double()).square().mean() / y.double().square().mean()
            assert float(error) ** 0.5 <= bound, f"layer {site.layer}"
