"""Recipes: an ordered list of passes with options, a target and bounds.

A recipe is plain data, in YAML, JSON or Python. Nothing in it is guessed: every unknown key is an
error that names the nearest known one, with the line it stands on. Options of a pass are the fields
of its class, so this module knows no pass by name.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from kvxform.errors import RecipeError, nearest_hint
from kvxform.recipe_parts import RecipePart, source_of
from kvxform.recipe_steps import PassStep, as_recipe_error, build_pass, parse_step
from kvxform.recipe_target import Target
from kvxform.recipe_text import KeyPath, SourceMap, format_yaml, read_recipe_file

__all__ = [
    "PassStep",
    "Recipe",
    "RecipeLike",
    "Target",
    "build_pass",
    "bundled_recipes",
    "for_package",
    "load_recipe",
    "retarget",
]

RECIPE_VERSION = 1


class Bounds(RecipePart):
    """Limits that the finished model must keep; a broken one is an error."""

    place: ClassVar[KeyPath] = ("bounds",)
    max_kl: float | None = Field(
        default=None, ge=0, description="Largest mean KL(source || optimised) on probes, in nats."
    )
    min_top1: float | None = Field(
        default=None, ge=0, le=1, description="Smallest share of equal greedy tokens on probes."
    )
    bits_per_value: float | None = Field(
        default=None, gt=0, description="Most true bits per cached value, metadata included."
    )


class CalibrationText(RecipePart):
    """How much text statistics are collected on, where a pass needs any."""

    place: ClassVar[KeyPath] = ("calibration",)
    tokens: int = Field(default=8192, ge=2, description="Tokens to read.")
    window: int | None = Field(
        default=None, ge=2, description="Tokens of a sequence; by default 1024 or the context."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of samples.")


class Recipe(RecipePart):
    """What to do to the cache of a model, in order."""

    version: Literal[1]
    name: str = Field(min_length=1)
    about: str = ""
    passes: tuple[PassStep, ...]
    target: Target = Field(default_factory=Target)
    bounds: Bounds = Field(default_factory=Bounds)
    calibration: CalibrationText = Field(default_factory=CalibrationText)
    auto_order: bool = Field(
        default=False, description="Move passes to a legal place instead of refusing."
    )

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, version: Any, info: ValidationInfo) -> Any:
        if version != RECIPE_VERSION or isinstance(version, bool):
            at = source_of(info).at(("version",))
            rule = f"recipe version must be {RECIPE_VERSION}"
            raise RecipeError("KVX106", rule, got=repr(version), at=at)
        return version

    @field_validator("passes", mode="plain", json_schema_input_type=list[Any])
    @classmethod
    def _parse_passes(cls, steps: Any, info: ValidationInfo) -> tuple[PassStep, ...]:
        source = source_of(info)
        if not isinstance(steps, list | tuple) or not steps:
            rule = "passes must be a list of at least one pass"
            raise RecipeError("KVX107", rule, got=repr(steps), at=source.at(("passes",)))
        return tuple(parse_step(step, ("passes", i), source) for i, step in enumerate(steps))

    def to_data(self) -> dict[str, Any]:
        """Return plain data without defaults; `load_recipe` is the inverse."""
        data: dict[str, Any] = {"version": self.version, "name": self.name}
        if self.about:
            data["about"] = self.about
        data["passes"] = [step.to_data() for step in self.passes]
        rest = self.model_dump(exclude={*data}, exclude_defaults=True)
        return {**data, **rest}

    def to_yaml(self) -> str:
        """Return the recipe as canonical YAML."""
        return format_yaml(self.to_data())


RecipeLike = str | Path | Mapping[str, Any] | Recipe


def load_recipe(recipe: RecipeLike) -> Recipe:
    """Load and check a recipe.

    Args:
        recipe: Bundled name, path of a .yaml, .yml or .json file, plain data, or a Recipe.

    Raises:
        RecipeError: KVX101 unknown recipe, KVX102 unknown key or option, KVX103 unknown codec,
            KVX104 unknown pass, KVX106 unknown version, KVX107 a value of the wrong kind.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _validate(recipe, SourceMap())
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _validate(*read_recipe_file(path))
    if str(recipe) not in bundled_recipes():
        raise RecipeError(
            "KVX101",
            "recipe must be a bundled name or a .yaml or .json file",
            got=repr(str(recipe)),
            hint=nearest_hint(str(recipe), bundled_recipes()),
        )
    with importlib.resources.as_file(_recipe_folder() / f"{recipe}.yaml") as bundled:
        return _validate(*read_recipe_file(bundled))


def retarget(recipe: Recipe, lowering: str) -> Recipe:
    """Return the recipe with another lowering; its other options of the target are dropped.

    Raises:
        RecipeError: KVX107 if there is no such lowering.
    """
    if lowering == recipe.target.lowering:
        return recipe
    return load_recipe({**recipe.to_data(), "target": {"lowering": lowering}})


def for_package(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with ONNX as its target, and `options` in the place of its own.

    Args:
        recipe: Any recipe.
        options: Keys of `target` that say what the package is to be.
    """
    data = retarget(recipe, "onnx").to_data()
    return load_recipe({**data, "target": {**data["target"], **options}})


def bundled_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with kvxform."""
    files = (entry.name for entry in _recipe_folder().iterdir())
    return tuple(sorted(f.removesuffix(".yaml") for f in files if f.endswith(".yaml")))


def _recipe_folder() -> Traversable:
    return importlib.resources.files("kvxform.recipes")


def _validate(data: Any, source: SourceMap) -> Recipe:
    if not isinstance(data, Mapping):
        raise RecipeError("KVX107", "a recipe must be a mapping of keys to values", at=source.file)
    try:
        return Recipe.model_validate(data, context=source)
    except ValidationError as error:
        raise as_recipe_error(error, (), source, "recipe") from error
