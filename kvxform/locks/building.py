"""Build what a lock locks: paths of a lock are relative to its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvxform.api import load, optimize_captured, resolve_recipe
from kvxform.atomic import is_artifact
from kvxform.capture import Captured, capture
from kvxform.capture.factories import split_factory
from kvxform.errors import ArtifactError, KvxformError
from kvxform.locks.digests import fixed_tokens
from kvxform.locks.records import Build
from kvxform.pipeline import Verify
from kvxform.progress import ProgressDisplay
from kvxform.recipe import Recipe
from kvxform.runtime.executables import check_place, default_device
from kvxform.runtime.model import OptimizedModel

_RECIPE_FILES = (".yaml", ".yml", ".json")


def make_build(
    source: str,
    recipe: str | None,
    folder: Path,
    *,
    lowering: str | None = None,
    verify: Verify = "probe",
    calibration: Path | None = None,
) -> Build:
    """Return how a model is built, with paths relative to the folder of its lock.

    Args:
        source: What the user named, relative to the working directory.
        recipe: Bundled name or path, or None for an artifact.
        folder: Folder of the lock.
        lowering: Lowering instead of that of the recipe.
        verify: What is measured.
        calibration: Text that statistics come from.

    Raises:
        KvxformError: KVX801 if a recipe is missing or makes no sense.
    """
    if is_artifact(source) == (recipe is not None):
        rule = "a lock is of an artifact without --recipe, or of a MODEL with one"
        raise KvxformError("KVX801", rule, where="lock", got=repr(source))
    factory = split_factory(source)
    if factory is not None:
        named = f"{_relative(factory[0], folder)}:{factory[1]}"
    else:
        named = _relative(source, folder) if Path(source).exists() else source
    return Build(
        source=named,
        recipe="" if recipe is None else _recipe_name(recipe, folder),
        lowering=lowering,
        verify=verify if recipe is not None else "none",
        calibration=None if calibration is None else _relative(str(calibration), folder),
    )


@dataclass
class Builder:
    """Builds models of locks; a source that several of them name is captured once.

    Attributes:
        progress: Show progress on stderr.
    """

    progress: bool = True
    _captured: dict[str, Captured] = field(default_factory=dict)

    def build(
        self, build: Build | None, folder: Path, *, source: str | None = None
    ) -> OptimizedModel:
        """Return the model that a lock names.

        Args:
            build: How.
            folder: Folder of the lock.
            source: Model or artifact instead of that of the lock, relative to the working
                directory.

        Raises:
            ArtifactError: KVX613 if the lock does not say how.
            KvxformError: As for `optimize` and `load`.
        """
        if source is not None and is_artifact(source):
            return load(source)
        if build is None:
            raise ArtifactError(
                "KVX613",
                "a lock must say how its model is built",
                where="check",
                hint="name the artifact: --source ARTIFACT",
            )
        named = resolve_source(build.source, folder) if source is None else source
        if not build.recipe:
            return load(named)
        return self._optimize(named, build, folder)

    def _optimize(self, source: str, build: Build, folder: Path) -> OptimizedModel:
        recipe = resolve_recipe(resolve_path(build.recipe, folder), build.lowering)
        place = default_device(recipe.target)
        check_place(recipe.target, place)
        with ProgressDisplay(self.progress) as display:
            if source not in self._captured:
                self._captured[source] = capture(source, progress=display.talk)
            captured = self._captured[source]
            return optimize_captured(
                captured,
                recipe,
                calibration=_calibration(captured, recipe, build, folder),
                verify=build.verify,
                place=place,
                progress=display.show_stage,
            )


def resolve_source(source: str, folder: Path) -> str:
    """Return a source of a lock as seen from the working directory."""
    factory = split_factory(source)
    if factory is not None:
        return f"{_join(folder, factory[0])}:{factory[1]}"
    return resolve_path(source, folder)


def resolve_path(name: str, folder: Path) -> str:
    """Return a path of a lock as seen from the working directory; any other name as it is."""
    path = _join(folder, name)
    return path if Path(name).suffix in _RECIPE_FILES or Path(path).exists() else name


def _join(folder: Path, name: str) -> str:
    """Return a path without `..` in the middle: the folder of a new lock may not exist yet."""
    return os.path.normpath(folder / name)


def _calibration(
    captured: Captured, recipe: Recipe, build: Build, folder: Path
) -> str | torch.Tensor | None:
    """Return what statistics are collected on; fixed tokens for a model without a tokenizer."""
    if build.calibration is not None:
        return _join(folder, build.calibration)
    if captured.tokenizer_path is not None:
        return None
    tokens = max(recipe.calibration.tokens, recipe.calibration.window or 0)
    return fixed_tokens(captured.program.info.vocab_size, (tokens,))[0][0]


def _recipe_name(recipe: str, folder: Path) -> str:
    is_path = Path(recipe).suffix in _RECIPE_FILES
    return _relative(recipe, folder) if is_path else recipe


def _relative(path: str, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
