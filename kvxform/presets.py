"""Presets: recipes that say outright what a search has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvxform.codecs.base import CODECS
from kvxform.errors import RecipeError
from kvxform.ir.plan import CachePlan
from kvxform.recipe import PassStep, Recipe, load_recipe
from kvxform.sensitivity.formats import is_constant

SEARCH, CODERS = "per-layer-bits", "quantize-kv"


def explicit_recipe(recipe: Recipe | None, plan: CachePlan | None) -> Recipe:
    """Return `recipe` with the formats of `plan` in place of the search that found them.

    `per-layer-bits` is left out, and `quantize-kv` names the codecs of each layer. Constants that
    were fitted are not named: they are fitted again.

    Args:
        recipe: What was done, or None if that is not known.
        plan: What came out of it, or None.

    Raises:
        RecipeError: KVX107 if the recipe has no such search.
    """
    names = [step.name for step in recipe.passes] if recipe else []
    if recipe is None or plan is None or SEARCH not in names or CODERS not in names:
        rule = f"a preset is made of a recipe with {CODERS} and {SEARCH}"
        raise RecipeError(
            "KVX107", rule, where="preset", got=recipe.name if recipe else "no recipe"
        )
    steps = [
        _with_layers(step, plan) if step.name == CODERS else step
        for step in recipe.passes
        if step.name != SEARCH
    ]
    data = recipe.to_data()
    return load_recipe(
        {**data, "name": f"{recipe.name}-preset", "passes": [step.to_data() for step in steps]}
    )


def _with_layers(step: PassStep, plan: CachePlan) -> PassStep:
    """Return the step of quantize-kv with the codecs of every layer; layers alike are one entry."""
    alike: list[tuple[dict[str, Any], list[int]]] = []
    for site in plan.owners:
        codecs = {
            name: written_codec(stream.codec)
            for name, stream in site.streams.items()
            if stream.codec["codec"] != "none"
        }
        found = next((layers for options, layers in alike if options == codecs), None)
        if found is None:
            alike.append((codecs, [site.layer]))
        else:
            found.append(site.layer)
    given = dict(step.options.get("layers") or {})  # its regions still hold
    for codecs, layers in alike:
        name = _name_layers(layers)
        given[name] = {**given.pop(name, {}), **codecs}
    return dataclasses.replace(step, options={**step.options, "layers": given})


def written_codec(codec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a codec as one would write it: no defaults and no constants."""
    defaults = {field.name: field.default for field in dataclasses.fields(CODECS[codec["codec"]])}
    written = {"codec": codec["codec"]}
    for name, value in codec.items():
        if isinstance(value, Mapping):
            written[name] = written_codec(value)
        elif name != "codec" and not is_constant(value) and value != defaults[name]:
            written[name] = value
    return written


def _name_layers(layers: list[int]) -> str:
    """Return sorted layers as recipes name them, for instance `0,3-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
