"""`kvxform explain`: what was found in a model, what a pass finds in it, and why not more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.cli.options import Json, Model
from kvxform.cli.output import print_data, print_json

if TYPE_CHECKING:
    from kvxform.explain import Explanation, Question

EXIT_NO = 1

PassStep = Annotated[
    str | None,
    typer.Option("--pass", metavar="PASS", help="Pass to explain, as recipes write it."),
]
InRecipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Explain the pass within this recipe, or all its passes."),
]
Layer = Annotated[
    str | None, typer.Option("--layer", help="Only this layer: its index or its module.")
]


def run(
    model: Model,
    pass_: PassStep = None,
    recipe: InRecipe = None,
    layer: Layer = None,
    json: Json = False,
) -> int:
    """Say what was found in a model, what a pass finds in it, and why not more."""
    from kvxform.explain import make_question
    from kvxform.recipe import load_recipe

    question = make_question(pass_, None if recipe is None else load_recipe(recipe))
    explanation = _explain(model, question, layer)
    if json:
        print_json(explanation.to_data())
    else:
        print_data(explanation.to_text())
    return 0 if explanation.is_fine else EXIT_NO


def _explain(model: str, question: Question, layer: str | None) -> Explanation:
    from kvxform.cli.plan import captured_shapes
    from kvxform.errors import CaptureError
    from kvxform.explain import explain_failure, explain_program

    try:
        program = captured_shapes(model)
    except CaptureError as error:
        if error.code != "KVX303":
            raise
        return explain_failure(error, model)
    return explain_program(program, question, layer=layer)
