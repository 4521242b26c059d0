"""Opening a saved model: program, report, recipe and tokenizer of one folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from kvxform.codegen.triton.files import check_kernels
from kvxform.errors import ArtifactError, KvxformError
from kvxform.ir.artifact import load_artifact
from kvxform.ir.program import Program
from kvxform.recipe import Recipe, load_recipe, retarget
from kvxform.report import Report
from kvxform.runtime.executables import default_device
from kvxform.runtime.model import OptimizedModel


def load_model(
    folder: Path, device: str | torch.device | None = None, target: str | None = None
) -> OptimizedModel:
    """Open a folder that `OptimizedModel.save` wrote. No code in it is run.

    Args:
        folder: The folder; its tokenizer is in `tokenizer/` or beside the other files.
        device: Where weights live; by default the CPU, or for target triton a CUDA device.
        target: Lowering instead of that of the recipe.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
        CodegenError: KVX401 if the lowering cannot run the plan, or cannot run on this machine.
    """
    program = load_artifact(folder)
    check_kernels(program, folder)
    for place in (folder / "tokenizer", folder):
        if (place / "tokenizer_config.json").is_file():
            info = dataclasses.replace(program.info, tokenizer_path=str(place))
            program = dataclasses.replace(program, info=info)
            break
    report, recipe = folder / "report.json", saved_recipe(folder)
    if recipe is not None and target is not None:
        recipe = retarget(recipe, target)
    where = None if device is None else parse_device(device)
    if where is None and recipe is not None:
        where = default_device(recipe.target)
    return OptimizedModel(
        program if where is None else move_program(program, where),
        report=Report.from_json(report.read_text("utf-8")) if report.is_file() else None,
        recipe=recipe,
    )


def parse_device(device: str | torch.device) -> torch.device:
    """Return `device` as torch has it.

    Raises:
        KvxformError: KVX704 if torch does not know it.
    """
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise KvxformError("KVX704", "device must be one that torch knows", got=device) from error


def move_program(program: Program, device: torch.device) -> Program:
    """Return the program with its weights on `device`."""
    weights = {name: weight.to(device) for name, weight in program.weights.items()}
    return dataclasses.replace(program, weights=weights)


def saved_recipe(folder: Path) -> Recipe | None:
    """Return the recipe of an artifact, or None if it has none.

    Raises:
        ArtifactError: KVX602 if it is damaged.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        return load_recipe(path)
    except KvxformError as error:
        is_missing = error.code == "KVX104"
        raise ArtifactError(
            "KVX602",
            f"recipe.yaml must be a recipe ({error.rule})",
            got=error.got,
            at=error.at,
            hint="install the package that has this pass" if is_missing else "",
        ) from error
