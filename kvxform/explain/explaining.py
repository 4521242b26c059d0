"""The whole explanation: of a captured program, or of a model in which nothing could be raised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from kvxform.errors import CaptureError, KvxformError, RecipeError, nearest_hint
from kvxform.explain.passes import explain_passes, need_options, required_options
from kvxform.explain.records import Explanation, PassFinding
from kvxform.explain.sites import describe_sites
from kvxform.ir.program import Program
from kvxform.order import PlannedPass, plan_passes
from kvxform.pass_base import PASSES
from kvxform.recipe import Recipe
from kvxform.recipe_steps import build_pass, parse_step
from kvxform.recipe_text import SourceMap

StepLike = str | Mapping[str, Any]


def explain_program(
    program: Program,
    *,
    step: StepLike | None = None,
    recipe: Recipe | None = None,
    layer: int | str | None = None,
) -> Explanation:
    """Explain a captured program.

    Args:
        program: As capture made it; weights may be shapes alone.
        step: Pass to explain, as recipes write it: a name, or `{name: options}`, or that as text.
        recipe: Explain the pass where it stands in this recipe; without `step`, every pass of it.
        layer: Only this layer: its index, or the path of its module.

    Raises:
        RecipeError: KVX102, KVX103, KVX104 or KVX107 for a bad step, KVX213 or KVX214 if the
            recipe is in the wrong order.
        KvxformError: KVX801 if there is no such layer.
    """
    explanation = Explanation(
        model=program.info.name,
        family=program.info.family,
        dtype=program.info.dtype,
        sites=describe_sites(program),
        rejected=program.rejected,
        passes=_explain_passes(program, step, recipe),
    )
    return explanation if layer is None else select_layer(explanation, str(layer))


def explain_failure(error: CaptureError, model: str) -> Explanation:
    """Explain a model without a single attention that could be raised.

    Args:
        error: KVX303 of capture, which carries the candidates.
        model: What the user called it.
    """
    return Explanation(model=model, rejected=error.rejected, failure=str(error))


def select_layer(explanation: Explanation, layer: str) -> Explanation:
    """Return what an explanation says about one layer.

    Args:
        explanation: Of a whole model.
        layer: Index of a raised site, or the path of a module, or the end of one.

    Raises:
        KvxformError: KVX801 if nothing was found there.
    """

    def fits(index: int | None, module: str) -> bool:
        if layer.isdigit():
            return index == int(layer)
        return f".{module}.".endswith(f".{layer}.")

    sites = tuple(s for s in explanation.sites if fits(s.layer, s.module))
    rejected = tuple(r for r in explanation.rejected if fits(None, r.module))
    if not sites and not rejected:
        known = [s.module for s in explanation.sites] + [r.module for r in explanation.rejected]
        raise KvxformError(
            "KVX801",
            "a layer must be the index of an attention, or the path of its module",
            got=repr(layer),
            hint=f"there are {len(explanation.sites)} attentions, counted from 0"
            if layer.lstrip("-").isdigit()
            else nearest_hint(layer, known),
        )
    layers, modules = {s.layer for s in sites}, {r.module for r in rejected}
    passes = tuple(
        dataclasses.replace(
            p,
            places=tuple(
                x
                for x in p.places
                if x.layer in layers or (x.layer is None and x.module in modules)
            ),
        )
        for p in explanation.passes
    )
    return dataclasses.replace(explanation, sites=sites, rejected=rejected, passes=passes)


def _explain_passes(
    program: Program, step: StepLike | None, recipe: Recipe | None
) -> tuple[PassFinding, ...]:
    parsed = yaml.safe_load(step) if isinstance(step, str) else step
    if recipe is not None:
        name = None if parsed is None else _name_in(recipe, parsed)
        passes = plan_passes(recipe.passes, program.facts, auto_order=recipe.auto_order)
        return explain_passes(program, passes, name)
    if parsed is None:
        return ()
    if parsed in PASSES and required_options(PASSES[parsed]):
        return (need_options(PASSES[parsed]),)
    checked = parse_step(parsed, (), SourceMap())
    return explain_passes(program, [PlannedPass(checked, build_pass(checked))], None)


def _name_in(recipe: Recipe, step: Any) -> str:
    """Return the name of a pass of `recipe`, which has its options there."""
    names = [s.name for s in recipe.passes]
    if step in names:
        return str(step)
    raise RecipeError(
        "KVX104",
        f"a pass that is explained within a recipe must be one of {recipe.name}",
        got=repr(step),
        hint=nearest_hint(str(step), names),
    )
