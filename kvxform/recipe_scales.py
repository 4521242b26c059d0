"""Put the scales of a file into a recipe: options of `quantize-kv` layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.errors import RecipeError
from kvxform.ir.kv_scales import STREAMS, KvScales
from kvxform.recipe import Recipe, load_recipe
from kvxform.recipe_steps import PassStep

PASS = "quantize-kv"


def with_kv_scales(recipe: Recipe, scales: KvScales) -> Recipe:
    """Return `recipe` with given scales in place of calibrated ones.

    Args:
        recipe: One with a `quantize-kv` whose codecs are `static-int`, the same at all layers.
        scales: Scales of layers, in the basis that the recipe caches K and V in. Layers without
            scales are not quantised.

    Raises:
        RecipeError: KVX109 if the recipe has no place for them.
    """
    steps = [_filled(step, scales) if step.name == PASS else step for step in recipe.passes]
    if steps == list(recipe.passes):
        raise _no_place(f"no {PASS} in {recipe.name}")
    data = recipe.to_data()
    return load_recipe({**data, "passes": [step.to_data() for step in steps]})


def _filled(step: PassStep, scales: KvScales) -> PassStep:
    if step.options.get("layers"):
        raise _no_place("codecs of single layers")
    codecs = {name: _codec(step.options.get(name)) for name in STREAMS}
    layers = {
        str(layer): {name: scales.options(codec, name, layer) for name, codec in codecs.items()}
        for layer in sorted(scales.scale["key"])
    }
    options = {**step.options, **dict.fromkeys(STREAMS), "layers": layers}
    return dataclasses.replace(step, options=options)


def _codec(options: Mapping[str, Any] | None) -> StaticIntCodec:
    codec = None if options is None else make_codec(options)
    if not isinstance(codec, StaticIntCodec):
        raise _no_place("no codec" if codec is None else f"codec {codec.name}")
    return codec


def _no_place(got: str) -> RecipeError:
    return RecipeError(
        "KVX109",
        f"scales of a file need a {PASS} with codec static-int for K and V",
        where="recipe",
        got=got,
        hint="take recipe onnx-int8, or leave the file out",
    )
