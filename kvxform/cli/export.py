"""`kvxform export`: write an ONNX package from an artifact or a model."""

from __future__ import annotations

from kvxform.cli.options import Exportable, Json, OptionalRecipe, Out, Verify, VerifyLevel
from kvxform.cli.output import print_data, print_json
from kvxform.cli.targets import open_model


def run(
    target: Exportable,
    out: Out,
    recipe: OptionalRecipe = None,
    verify: VerifyLevel = Verify.probe,
    json: Json = False,
) -> None:
    """Write an ONNX package that stock ONNX Runtime runs."""
    folder = open_model(target, recipe, verify=verify.value).export_onnx(out)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    if json:
        print_json({"onnx": str(folder), "files": files})
    else:
        print_data("\n".join(str(folder / name) for name in files))
