"""The whole explanation: of a captured program, or of a model in which nothing could be raised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kvxform.errors import CaptureError, RecipeError, nearest_hint
from kvxform.explain.layers import select_layer
from kvxform.explain.pass_records import PassFinding
from kvxform.explain.passes import explain_passes, need_options, required_options
from kvxform.explain.records import Explanation
from kvxform.explain.sites import describe_sites
from kvxform.ir.facts import Facts
from kvxform.ir.program import Program
from kvxform.order import PlannedPass, plan_passes
from kvxform.pass_lookup import find_pass, known_names
from kvxform.recipe import Recipe
from kvxform.recipe_steps import build_pass, parse_step
from kvxform.recipe_text import SourceMap

StepLike = str | Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """Which passes are to be explained, checked before the model is captured.

    Attributes:
        passes: Passes to play, in order.
        name: Explain only those of this name, or None for all.
        contract: A pass that cannot be played, since it lacks options.
    """

    passes: tuple[PlannedPass, ...] = ()
    name: str | None = None
    contract: PassFinding | None = None


def make_question(step: StepLike | None, recipe: Recipe | None) -> Question:
    """Return the question after checking it.

    Args:
        step: Pass to explain, as recipes write it: a name, or `{name: options}`, or that as text.
        recipe: Explain the pass where it stands in this recipe; without `step`, every pass of it.

    Raises:
        RecipeError: KVX102, KVX103, KVX104 or KVX107 for a bad step, KVX213 or KVX214 if the
            recipe is in the wrong order.
    """
    parsed = _parse(step)
    if recipe is not None:
        name = None if parsed is None else _name_in(recipe, parsed)
        passes = plan_passes(recipe.passes, Facts(), auto_order=recipe.auto_order)
        return Question(tuple(passes), name)
    if parsed is None:
        return Question()
    if isinstance(parsed, str) and parsed in known_names():
        cls = find_pass(parsed)
        if required_options(cls):
            return Question(contract=need_options(cls))
    checked = parse_step(parsed, (), SourceMap())
    return Question((PlannedPass(checked, build_pass(checked)),))


def explain_program(
    program: Program, question: Question | None = None, *, layer: int | str | None = None
) -> Explanation:
    """Explain a captured program.

    Args:
        program: As capture made it; weights may be shapes alone.
        question: Passes to explain, or None.
        layer: Only this layer: its index, or the path of its module.

    Raises:
        KvxformError: KVX801 if there is no such layer.
    """
    asked = question or Question()
    findings = explain_passes(program, asked.passes, asked.name)
    explanation = Explanation(
        model=program.info.name,
        family=program.info.family,
        dtype=program.info.dtype,
        sites=describe_sites(program),
        rejected=program.rejected,
        passes=findings if asked.contract is None else (asked.contract,),
    )
    return explanation if layer is None else select_layer(explanation, str(layer))


def explain_failure(error: CaptureError, model: str) -> Explanation:
    """Explain a model without a single attention that could be raised.

    Args:
        error: KVX303 of capture, which carries the candidates.
        model: What the user called it.
    """
    line = CaptureError(error.code, error.rule, where=error.where, got=error.got)  # no hint
    return Explanation(model=model, rejected=error.rejected, failure=str(line))


def _parse(step: StepLike | None) -> Any:
    """Return a step as plain data."""
    if not isinstance(step, str):
        return step
    try:
        return yaml.safe_load(step)
    except yaml.YAMLError as error:
        rule = "a pass must be a name, or one name with its options as in recipes"
        raise RecipeError("KVX107", rule, got=repr(step)) from error


def _name_in(recipe: Recipe, step: Any) -> str:
    """Return the name of a pass of `recipe`, which has its options there."""
    names = [s.name for s in recipe.passes]
    if step in names:
        return str(step)
    raise RecipeError(
        "KVX104",
        f"a pass that is explained within {recipe.name} must be the name of one of its passes",
        got=repr(step),
        hint=nearest_hint(str(step), names),
    )
