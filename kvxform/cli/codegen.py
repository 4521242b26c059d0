"""`kvxform codegen`: write the Triton kernels of an artifact or a planned model, to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.atomic import is_artifact
from kvxform.cli.options import Exportable, Json, OptionalRecipe, Out
from kvxform.cli.output import format_bytes, print_data, print_json
from kvxform.cli.targets import need_recipe, refuse_recipe

if TYPE_CHECKING:
    from kvxform.ir.program import Program

Interpret = Annotated[
    bool,
    typer.Option("--interpret", help="Write the twins that Triton's interpreter can run."),
]


def run(
    target: Exportable,
    out: Out,
    recipe: OptionalRecipe = None,
    interpret: Interpret = False,
    json: Json = False,
) -> None:
    """Write the Triton kernels of a plan to a folder; needs no GPU and no weights."""
    from kvxform.codegen.triton.files import write_kernels

    program = _planned(target, recipe)
    files = write_kernels(program, out, interpret=interpret)
    assert program.plan is not None, "write_kernels has used it"
    stored = program.plan.bytes_per_token
    if json:
        names = [file.name for file in files]
        print_json({"kernels": str(out), "files": names, "bytes_per_token": stored})
    else:
        print_data("\n".join(str(file) for file in files))
        print_data(f"cache: {format_bytes(stored)} per token")


def _planned(target: str, recipe: str | None) -> Program:
    """Return a program with its plan; weights of a model may be shapes alone."""
    if is_artifact(target):
        from kvxform.ir.artifact import load_artifact

        refuse_recipe(target, recipe)
        return load_artifact(Path(target))
    from kvxform.cli.plan import captured_shapes
    from kvxform.pipeline import plan_pipeline
    from kvxform.recipe import load_recipe

    loaded = load_recipe(need_recipe(target, recipe))
    program, _ = plan_pipeline(captured_shapes(target), loaded)
    return program
