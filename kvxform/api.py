"""The public API and what the command line calls beside it: models in, results out."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvxform.calibrate import CalibrationLike
from kvxform.capture import Captured, capture
from kvxform.errors import ArtifactError, CaptureError, KvxformError, RecipeError
from kvxform.explain import (
    Explanation,
    StepLike,
    explain_failure,
    explain_program,
    make_question,
)
from kvxform.healing.checks import require_touched
from kvxform.healing.healer import heal_program
from kvxform.healing.options import HealOptions
from kvxform.ir.program import Program
from kvxform.ir.store import watching
from kvxform.pipeline import Progress, Verify, plan_pipeline, run_pipeline
from kvxform.progress import ProgressDisplay
from kvxform.recipe import Recipe, RecipeLike, load_recipe, retarget
from kvxform.report import Report
from kvxform.runtime.executables import check_place, default_device
from kvxform.runtime.loading import load_model, move_program, parse_device, saved_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

ModelSource = nn.Module | torch.export.ExportedProgram | str | Path
VERIFY_LEVELS = ("none", "probe", "full")


def optimize(
    model: ModelSource,
    recipe: RecipeLike = "kv4",
    *,
    calibration: CalibrationLike = None,
    target: str | None = None,
    verify: Verify = "probe",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> OptimizedModel:
    """Rewrite the KV cache of a model by a recipe, and measure every step.

    Warns if a pass has changed the model in a way that asks for training; see `heal`.

    Args:
        model: `nn.Module`, `"smollm2-135m"`, a Hugging Face folder, a .gguf file, an
            `ExportedProgram`, or `"file.py:function"`, which is run; it is not changed.
        recipe: Bundled name, path of a .yaml or .json file, plain data, or a `Recipe`.
        calibration: What statistics are collected on, if a pass needs any: a text file, token ids
            `[n]` or `[windows, window]`, a `Calibration`, or None for text of the standard library.
        target: Lowering instead of that of the recipe: `eager`, `triton` or `onnx`.
        verify: `none`, `probe` (after every pass) or `full` (and all cache schedules at the end).
        device: Where weights live; by default where they are, or for target triton a CUDA device.
        progress: Show progress on stderr.

    Raises:
        KvxformError: One of its subclasses, with a code; `docs/errors.md` lists them.
    """
    wanted = resolve_recipe(recipe, target)
    _check_options(calibration, verify)
    place = default_device(wanted.target) if device is None else parse_device(device)
    check_place(wanted.target, place)  # before the work, not after it
    with ProgressDisplay(progress) as display:
        captured = capture(_source(model), progress=display.talk)
        optimized = optimize_captured(
            captured,
            wanted,
            calibration=calibration,
            verify=verify,
            place=place,
            progress=display.show_stage,
        )
    if optimized.report.needs_training:
        warnings.warn(optimized.report.training_hint(), stacklevel=2)
    return optimized


def optimize_captured(
    captured: Captured,
    recipe: Recipe,
    *,
    calibration: CalibrationLike = None,
    verify: Verify = "probe",
    place: torch.device | None = None,
    progress: Progress | None = None,
) -> OptimizedModel:
    """Rewrite a model that has been captured; it can be used again with another recipe.

    Args:
        captured: The model; it is not changed.
        recipe: What to do.
        calibration: As for `optimize`.
        verify: As for `optimize`.
        place: Where weights live; None for where they are.
        progress: Called before each stage.
    """
    run = functools.partial(OptimizedModel, recipe=recipe)
    with watching(captured.program.store):
        program, report = run_pipeline(
            captured.program if place is None else move_program(captured.program, place),
            recipe,
            executor=OptimizedModel,
            lowered=run if recipe.target.lowering == "triton" else None,
            verify=verify,
            calibration=calibration,
            progress=progress,
        )
    source = dataclasses.replace(report.source, capture_error=captured.max_abs_error)
    return run(program, report=dataclasses.replace(report, source=source))


def plan_model(
    model: ModelSource,
    recipe: RecipeLike,
    *,
    target: str | None = None,
    progress: bool = True,
) -> tuple[Program, Report]:
    """Return the program and report that `optimize` would give, by shapes alone.

    The program has weights without values, and the report no measurements.

    Args:
        model: As for `optimize`.
        recipe: As for `optimize`.
        target: As for `optimize`.
        progress: Show progress on stderr.

    Raises:
        KvxformError: As for `optimize`.
    """
    wanted = resolve_recipe(recipe, target)
    with ProgressDisplay(progress) as display:
        captured = capture(_source(model), progress=display.talk)
    return plan_pipeline(captured.program, wanted)


def explain_model(
    model: ModelSource,
    *,
    step: StepLike | None = None,
    recipe: RecipeLike | None = None,
    layer: int | str | None = None,
    progress: bool = True,
) -> Explanation:
    """Say what was found in a model, what a pass finds in it, and why not more.

    A model in which nothing could be raised is explained too: `failure` says why, `rejected` has
    the candidates.

    Args:
        model: As for `optimize`.
        step: Pass to explain, as recipes write it: `"rotate-v"` or `{"rotate-v": {"block": 32}}`.
        recipe: Explain the pass within this recipe; without `step`, every pass of it.
        layer: Only this layer: its index, or the path of its module.
        progress: Show progress on stderr.

    Raises:
        KvxformError: As for `optimize`, and KVX801 if there is no such layer.
    """
    question = make_question(step, None if recipe is None else load_recipe(recipe))
    with ProgressDisplay(progress) as display:
        try:
            program = capture(_source(model), progress=display.talk).program
        except CaptureError as error:
            if error.code != "KVX303":
                raise
            name = model if isinstance(model, str | Path) else type(model).__name__
            return explain_failure(error, str(name))
    return explain_program(program, question, layer=layer)


def heal(
    artifact: str | Path,
    source: ModelSource,
    *,
    text: str | Path | torch.Tensor | None = None,
    options: HealOptions | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> OptimizedModel:
    """Train what structure passes touched in a saved model, against the model it was made from.

    Args:
        artifact: A folder that `OptimizedModel.save` wrote; it is not changed.
        source: As `model` for `optimize`; the same model.
        text: A UTF-8 file without labels, token ids `[n]`, or None for that of the library.
        options: How to train.
        device: Where to train; by default the CPU.
        checkpoint: File in which the state of the run is kept while it runs, or None.
        resume: Go on from that file if it is there.
        progress: Show progress on stderr.

    Returns:
        The model, run by the eager lowering, with a report of what was gained. Saved and loaded, it
        has the target of its recipe again.

    Raises:
        ArtifactError: KVX605 if there is nothing to heal, KVX606 for another source, KVX607 for a
            checkpoint of another run, and those of `load`.
        KvxformError: KVX704 or KVX801 for a text that cannot be used.
    """
    wanted = HealOptions() if options is None else options
    place = parse_device("cpu" if device is None else device)
    words = "" if isinstance(text, torch.Tensor) else read_text(text)
    opened = load_model(Path(artifact), place, "eager")
    require_touched(opened.program)
    if opened.report is None:
        rule = "an artifact that is healed must have a report"
        raise ArtifactError("KVX601", rule, where="heal", got=str(artifact))
    with ProgressDisplay(progress) as display:
        captured = capture(_source(source), progress=display.talk)
        path = captured.program.info.tokenizer_path
        ids = text if isinstance(text, torch.Tensor) else _encode(opened, path, words)
        program, record = heal_program(
            opened.program,
            move_program(captured.program, place),
            ids,
            wanted,
            text=_text_name(text),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            resume=resume,
            talk=display.talk,
        )
    healed = OptimizedModel(program, report=dataclasses.replace(opened.report, healing=record))
    healed.recipe = saved_recipe(Path(artifact))
    return healed


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    target: str | None = None,
) -> OptimizedModel:
    """Open a folder that `OptimizedModel.save` wrote. No code in it is run.

    Args:
        path: The folder.
        device: Where weights live; by default the CPU, or for target triton a CUDA device.
        target: Lowering instead of that of the recipe: `eager` or `triton`.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
        CodegenError: KVX401 if the lowering cannot run the plan, or cannot run on this machine.
    """
    return load_model(Path(path), device, target)


def _encode(opened: OptimizedModel, tokenizer_path: str | None, text: str) -> torch.Tensor:
    """Return the tokens of a text, by the tokenizer of the artifact or else of the source."""
    tokenizer = opened.tokenizer or load_tokenizer(tokenizer_path)
    if tokenizer is None:
        rule = "text needs a model with a tokenizer"
        raise KvxformError("KVX801", rule, where="heal", hint="give token ids in the Python API")
    return encode_text(tokenizer, text)


def _text_name(text: str | Path | torch.Tensor | None) -> str:
    if isinstance(text, torch.Tensor):
        return "token ids"
    return "Python help topics" if text is None else Path(text).name


def _source(model: ModelSource) -> nn.Module | torch.export.ExportedProgram | str:
    return str(model) if isinstance(model, Path) else model


def resolve_recipe(recipe: RecipeLike, target: str | None) -> Recipe:
    """Load a recipe, and replace its lowering by `target` if that is given."""
    loaded = load_recipe(recipe)
    if target is None:
        return loaded
    return retarget(loaded, target)


def _check_options(calibration: Any, verify: str) -> None:
    if not isinstance(calibration, CalibrationLike):
        raise RecipeError(
            "KVX107",
            "calibration must be a text file, token ids, a Calibration or None",
            where="optimize",
            got=type(calibration).__name__,
        )
    if isinstance(calibration, str | Path):
        read_text(calibration)  # a file that cannot be read is found now, not after the capture
    if verify not in VERIFY_LEVELS:
        rule = f"verify must be one of {', '.join(VERIFY_LEVELS)}"
        raise RecipeError("KVX107", rule, where="optimize", got=repr(verify))
