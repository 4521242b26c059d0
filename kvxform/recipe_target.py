"""What a recipe says about the lowering of the finished model."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from kvxform.errors import RecipeError
from kvxform.onnx_options import Level, LogitsKind, OnnxOptions, Provider, WeightKind
from kvxform.recipe_parts import RecipePart, source_of
from kvxform.recipe_text import KeyPath

OWNERS = {  # keys that only one lowering knows
    "compile": "triton",
    **dict.fromkeys(("level", "opset", "provider", "runtime", "logits", "weights"), "onnx"),
}


class Target(RecipePart):
    """What the optimised model is lowered to."""

    place: ClassVar[KeyPath] = ("target",)
    lowering: Literal["eager", "onnx", "triton"] = "eager"
    compile: bool = Field(
        default=False,
        description="Run the rest of a decode step through torch.compile (triton only).",
    )
    level: Level | None = Field(
        default=None,
        description="Emission level of a package (onnx only); the best legal one by default.",
    )
    opset: int | None = Field(
        default=None, ge=18, le=25, description="Opset of a package (onnx only)."
    )
    provider: Provider = Field(
        default="cpu", description="Execution provider that a package is made for (onnx only)."
    )
    runtime: str = Field(
        default="1.31",
        pattern=r"^[0-9]+\.[0-9]+$",
        description="Version of ONNX Runtime that a package must run in (onnx only).",
    )
    logits: LogitsKind = Field(
        default="all",
        description="Logits of all new tokens, or of the last one of each row (onnx only).",
    )
    weights: WeightKind = Field(
        default="source", description="Matrices as in the model, or of 4 bits (onnx only)."
    )

    @model_validator(mode="after")
    def _check_owners(self, info: ValidationInfo) -> Self:
        for key in sorted(self.model_fields_set & OWNERS.keys()):
            is_default = getattr(self, key) == type(self).model_fields[key].default
            if not is_default and self.lowering != OWNERS[key]:
                raise RecipeError(
                    "KVX107",
                    f"{key} belongs to lowering: {OWNERS[key]}",
                    where="recipe",
                    got=f"lowering: {self.lowering}",
                    at=source_of(info).at(("target", key)),
                )
        return self

    @property
    def onnx_options(self) -> OnnxOptions:
        """What is asked of a package."""
        return OnnxOptions(
            self.level, self.opset, self.provider, self.runtime, self.logits, self.weights
        )
