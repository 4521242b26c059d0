"""The JSON files of an artifact: their fields, how they are written, how they are checked.

Reading is strict: an unknown field, a missing one or one of another type is an ArtifactError, so
that the rest of the code never meets half a program.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from kvxform.errors import ArtifactError
from kvxform.ir.facts import FactValue
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import AttentionSite, ModelInfo, RejectedSite

VERSION = 1  # of the format of all files; a reader takes no other


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightEntry(_File):
    """One weight of a program.

    Attributes:
        dtype: By torch name.
        shape: Sizes.
        stored: Name of the tensor in `weights.safetensors`; tied weights name the same one.
    """

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    stored: str


class ProgramFile(_File):
    """`program.json`: a program without its plan and without the values of its weights.

    Folders from before there were structure passes have no `touched`.
    """

    version: int
    info: ModelInfo
    sites: tuple[AttentionSite, ...]
    rejected: tuple[RejectedSite, ...]
    facts: dict[str, FactValue]
    passes: tuple[str, ...]
    touched: dict[str, str] = {}
    graph: tuple[str, ...]
    weights: dict[str, WeightEntry]


class PlanFile(_File):
    """`plan.json`: the CachePlan, null before `insert-cache`."""

    version: int
    plan: CachePlan | None


class ChecksumsFile(_File):
    """`checksums.json`: what the artifact was made with, and the SHA-256 of every file."""

    version: int
    made_with: dict[str, str]
    files: dict[str, str]


class _Version(BaseModel):
    model_config = ConfigDict(strict=True)
    version: int


F = TypeVar("F", bound=_File)


def canonical_json(data: Any) -> bytes:
    """Return `data` as UTF-8 JSON with sorted keys; equal data gives equal bytes."""
    return (json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def parse_file(model: type[F], data: bytes, name: str) -> F:
    """Parse and check the bytes of one JSON file.

    Args:
        model: What the file must be.
        data: Its content.
        name: Its name, for the message.

    Raises:
        ArtifactError: KVX602 if it is damaged, KVX604 if another version of kvxform wrote it.
    """
    try:
        version = _Version.model_validate_json(data).version
        if version == VERSION:
            return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            "KVX602",
            "a file of an artifact must have the fields it was saved with",
            where=name,
            got=first["msg"],
            at=place or "the top",
        ) from None
    raise ArtifactError(
        "KVX604",
        f"the artifact must have format version {VERSION}",
        where=name,
        got=version,
        hint="save it again with this version of kvxform",
    )
