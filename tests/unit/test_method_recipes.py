"""Recipes of published methods: legal as written, with the bits that their pages state."""

from __future__ import annotations

import pytest

from kvxform.codecs.base import make_codec
from kvxform.ir.facts import Facts
from kvxform.order import plan_passes
from kvxform.recipe import Recipe, load_recipe

BITS = {  # of both streams together, at head_dim 64 with 3 KV heads, and at 128 with 8
    "quarot-kv4": (4.5, 4.25),
    "saw-int4": (4.5, 4.25),
    "oscar-omni2": (3 + 8 / 192, 3 + 8 / 1024),
    "turboquant-2": (2.25, 2.125),
    "turboquant-3": (3.25, 3.125),
    "turboquant-4": (4.25, 4.125),
    "polarquant": (3.875, 3.875),
    "fibquant-1.5": (1.75, 1.625),
    "fibquant-2": (2.25, 2.125),
    "fibquant-3": (3.25, 3.125),
    "fibquant-4": (4.25, 4.125),
    "octopus-2": (2.75, 2.5625),
    "octopus-3": (3.75, 3.5),
    "octopus-4": (4.875, 4.5625),
    "onnx-int8": (8, 8),
    "onnx-int4": (4, 4),
    "onnx-paged-int8": (8, 8),
}


def bits(recipe: Recipe, head_dim: int, heads: int) -> float:
    (options,) = (step.options for step in recipe.passes if step.name == "quantize-kv")
    codecs = [make_codec(options[stream]) for stream in ("key", "value")]
    for codec in codecs:
        codec.check(head_dim)
    return sum(codec.bits_per_value(head_dim, heads) for codec in codecs) / 2


@pytest.mark.parametrize("name", BITS)
def test_bits_are_those_of_the_method_page_and_within_the_bound(name):
    recipe = load_recipe(name)
    found = bits(recipe, 64, 3), bits(recipe, 128, 8)
    assert found == pytest.approx(BITS[name])
    assert max(found) <= recipe.bounds.bits_per_value


@pytest.mark.parametrize("name", BITS)
def test_passes_are_legal_as_written(name):
    steps = list(load_recipe(name).passes)
    for auto in (False, True):
        planned = plan_passes(steps, Facts(), auto_order=auto)
        assert [p.name for p in planned] == [s.name for s in steps]
