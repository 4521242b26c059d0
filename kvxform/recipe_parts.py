"""What the parts of a recipe have in common: they are immutable and refuse unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from kvxform.recipe_steps import check_keys
from kvxform.recipe_text import KeyPath, SourceMap


class RecipePart(BaseModel):
    """Base of the parts of a recipe: immutable, and unknown keys are refused.

    Attributes:
        place: Keys that lead to the part.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    place: ClassVar[KeyPath] = ()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, Mapping):
            check_keys(data, cls.model_fields, cls.place, source_of(info), "recipe")
        return data


def source_of(info: ValidationInfo) -> SourceMap:
    """Return where the recipe that is validated came from."""
    return info.context if isinstance(info.context, SourceMap) else SourceMap()
