"""The files of an ONNX package, all of them the same for equal input.

- `model.onnx`, `model.onnx.data`: graph, and weights as external data
- `genai_config.json`: what ONNX Runtime GenAI wants to know
- `kvxform.json`: model, recipe, plan, passes, form, seeds, and the hashes of the other files
- `kv_cache_scales.json`: static scales of K and V, if there are some
- tokenizer files, copied from the source; `report.json` if there is a report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvxform.codegen.onnx.description import describe
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.genai import genai_config
from kvxform.codegen.onnx.metadata import label_model
from kvxform.codegen.onnx.writing import GENAI, write_description, write_json, write_model
from kvxform.ir.kv_scales import FILE_NAME, scales_of
from kvxform.ir.program import Program
from kvxform.tokenizer import tokenizer_files


def write_package(
    model: ir.Model,
    program: Program,
    folder: Path,
    tokenizer_path: str | Path | None,
    recipe: Any,
    report: Any,
    form: Form,
) -> None:
    """Write all files of a package into an empty folder.

    Args:
        model: The graph.
        program: What it was made from.
        folder: An empty folder.
        tokenizer_path: Folder with tokenizer files, GGUF file, or None.
        recipe: A `kvxform.recipe.Recipe`, or None.
        report: A `kvxform.report.Report`, or None.
        form: What the package is.
    """
    assert program.plan is not None, "checked"
    label_model(model, program.plan, recipe, form)
    write_model(model, program, folder)
    write_json(folder / GENAI, genai_config(program, model, form))
    scales = scales_of(program.plan)
    if scales is not None:
        write_json(folder / FILE_NAME, scales.to_data())
    if report is not None:
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    for name, content in tokenizer_files(tokenizer_path).items():
        (folder / name).write_bytes(content)
    write_description(folder, describe(model, program, recipe, form))
