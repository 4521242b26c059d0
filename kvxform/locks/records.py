"""Lock: what a build is, as plain data; `to_text` and `from_text` are inverses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from kvxform.diffing.outline import Outline
from kvxform.errors import ArtifactError
from kvxform.ir.text import format_ranges
from kvxform.locks.compact_json import compact_json
from kvxform.locks.contracts import BoundContract, PassContract
from kvxform.locks.digests import Digest
from kvxform.pipeline import Verify

LOCK_VERSION = 1
LOCK_NAME = "kvxform.lock"


@dataclass(frozen=True)
class Build:
    """How a model was built; paths are relative to the folder of the lock.

    Attributes:
        source: A name such as `smollm2-135m`, a path, or `file.py:function`.
        recipe: Bundled name or path; empty for an artifact.
        lowering: Lowering instead of that of the recipe, or None.
        verify: What was measured: `none`, `probe` or `full`.
        calibration: Path of the text that statistics came from, or None for the default.
    """

    source: str
    recipe: str = ""
    lowering: str | None = None
    verify: Verify = "none"
    calibration: str | None = None


@dataclass(frozen=True)
class Lock:
    """What a build is: the same wherever it is made, until the build changes.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe, or empty.
        outline: Its graph, plan and figures.
        digest: What it computes on fixed tokens; None if that was not asked for.
        passes: What its passes promised and what was measured.
        bounds: Bounds of its recipe.
        build: How it was built, or None if only its maker knows.
    """

    model: str
    recipe: str
    outline: Outline
    digest: Digest | None = None
    passes: tuple[PassContract, ...] = ()
    bounds: tuple[BoundContract, ...] = ()
    build: Build | None = None

    def to_text(self) -> str:
        """Return canonical JSON; equal locks give equal text."""
        data = {
            "kvxform_lock": LOCK_VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "build": _plain(self.build),
            "passes": _plain(self.passes),
            "bounds": _plain(self.bounds),
            "layers": _folded_hashes(self.outline),
            "digest": _plain(self.digest),
            "graph": self.outline.to_data(),
        }
        return compact_json(data)

    @classmethod
    def from_text(cls, text: str, name: str = LOCK_NAME) -> Lock:
        """Build a lock from its text.

        Args:
            text: What `to_text` returned.
            name: What messages call it.

        Raises:
            ArtifactError: KVX611 if it is damaged, KVX612 if it has another version.
        """
        try:
            data = json.loads(text)
            version = data.pop("kvxform_lock")
            if version == LOCK_VERSION:
                return cls._from_data(data, name)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            _damaged(name, _first_line(error))
        raise ArtifactError(
            "KVX612",
            f"a lock must have format version {LOCK_VERSION}",
            where=name,
            got=version,
            hint="make it again: kvxform lock",
        )

    @classmethod
    def _from_data(cls, data: dict[str, Any], name: str) -> Lock:
        outline = Outline.from_data(data.pop("graph"))
        hashes = data.pop("layers")
        if hashes != _folded_hashes(outline):
            _damaged(name, "hashes of layers that are not those of its graph")
        fields = {field.name for field in dataclasses.fields(cls)} - {"outline"}
        if data.keys() != fields:
            _damaged(name, f"other fields: {' '.join(sorted(data.keys() ^ fields))}")
        lock: Lock = TypeAdapter(cls).validate_python({**data, "outline": outline})
        return lock


def is_lock(path: str | Path) -> bool:
    """Return whether `path` is a file that looks like a lock."""
    try:
        with Path(path).open("rb") as file:
            return b'"kvxform_lock"' in file.read(64)
    except OSError:
        return False


def _folded_hashes(outline: Outline) -> dict[str, str]:
    """Return the hash of each layer, equal ones once: `{"0-29": "8c1f...", "other": "77ab..."}`."""
    layers: dict[str, list[int]] = {}
    folded = {}
    for layer, digest in outline.layer_hashes().items():
        if layer is None:
            folded["other"] = digest
        else:
            layers.setdefault(digest, []).append(layer)
    return {format_ranges(found): digest for digest, found in layers.items()} | folded


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if value is None else _as_lists(dataclasses.asdict(value))


def _as_lists(value: Any) -> Any:
    """Return plain data as JSON has it: every sequence a list."""
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _damaged(name: str, got: str) -> NoReturn:
    raise ArtifactError(
        "KVX611",
        "a lock must be as kvxform wrote it",
        where=name,
        got=got,
        hint="make it again: kvxform check --update, or kvxform lock",
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{first['msg']} at {'.'.join(map(str, first['loc']))}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
