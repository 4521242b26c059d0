"""`kvxform export`: write an ONNX package from an artifact or a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.atomic import check_replaceable, is_artifact
from kvxform.cli.options import (
    CalibrationFile,
    Exportable,
    Json,
    OptionalRecipe,
    Verify,
    VerifyLevel,
)
from kvxform.cli.output import print_data, print_json, print_table
from kvxform.cli.packages import (
    LevelName,
    Levels,
    Logits,
    Opset,
    Provider,
    Runtime,
    Weights,
    asked_for,
    level_rows,
    level_table,
    say_step,
)
from kvxform.cli.targets import need_recipe, open_model, refuse_recipe
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.ir.program import Program
    from kvxform.onnx_options import OnnxOptions
    from kvxform.runtime.model import OptimizedModel

OptionalOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to write; required without --levels."),
]


def run(
    target: Exportable,
    out: OptionalOut = None,
    recipe: OptionalRecipe = None,
    level: LevelName = None,
    opset: Opset = None,
    provider: Provider = None,
    runtime: Runtime = None,
    logits: Logits = None,
    weights: Weights = None,
    calibration: CalibrationFile = None,
    levels: Levels = False,
    verify: VerifyLevel = Verify.probe,
    json: Json = False,
) -> None:
    """Write an ONNX package that stock ONNX Runtime runs."""
    given = asked_for(level, opset, provider, runtime, logits, weights)
    if levels:
        show_levels(target, recipe, given, json)
    elif out is None:
        raise KvxformError("KVX801", "an export needs --out", hint="or --levels to look first")
    else:
        from kvxform.recipe import for_package, load_recipe

        check_replaceable(out)  # before the work, not after it
        wanted = None if recipe is None else for_package(load_recipe(recipe), given)
        model = open_model(target, wanted, verify=verify.value, calibration=calibration)
        write(model, out, given, verify, json)


def show_levels(target: str, recipe: str | None, given: dict[str, Any], json: bool) -> None:
    """Print the table of levels of a target."""
    program, options = planned(target, recipe)
    table = level_table(program, options.changed(**given))
    if json:
        print_json(table)
    else:
        print_table(("level", "what is emitted", "legal"), level_rows(table))


def planned(target: str, recipe: str | None) -> tuple[Program, OnnxOptions]:
    """Return a target as it would be exported, of a model by its shapes alone."""
    from kvxform.onnx_options import OnnxOptions

    if is_artifact(target):
        import kvxform

        refuse_recipe(target, recipe)
        model = kvxform.load(target)
        asked = OnnxOptions() if model.recipe is None else model.recipe.target.onnx_options
        return model.program, asked
    from kvxform.cli.plan import captured_shapes
    from kvxform.pipeline import plan_pipeline
    from kvxform.recipe import load_recipe, retarget

    loaded = load_recipe(need_recipe(target, recipe))
    program, _ = plan_pipeline(captured_shapes(target), retarget(loaded, "eager"))
    return program, loaded.target.onnx_options


def write(
    model: OptimizedModel, out: Path, given: dict[str, Any], verify: Verify, json: bool
) -> None:
    """Write the package; print its files, its form and whether it was run."""
    from kvxform.runtime.exporting import ExportCheck, Verdict, recipe_options, written_form

    options = recipe_options(model).changed(**given)
    check: ExportCheck = "none" if verify is Verify.none else "probe"
    folder = model.export_onnx(out, options, verify=check, progress=say_step)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    form, verdict = written_form(folder), Verdict.of(folder)
    if json:
        data = {"onnx": str(folder), "files": files, "form": form}
        print_json({**data, "verification": verdict.to_data()})
        return
    made = (
        f"{form['level']}, opset {form['opset']}, cache {form['cache']}, logits {form['logits']}, "
        f"for {form['provider']}, ONNX Runtime {form['runtime']} or newer"
    )
    print_data("\n".join([*(str(folder / name) for name in files), made, str(verdict)]))
