"""What two caches that were fed the same show: plain data, which `diagnose` turns into causes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # records hold symptoms
    from kvxform.diffing.records import LayerDiff

SymptomKind = Literal[
    "positions",
    "inputs",
    "scoring",
    "owner",
    "page-order",
    "token-order",
    "rewritten",
    "sink",
    "recent",
    "plane-shifted",
    "plane-scaled",
    "plane",
    "codes",
    "decoded",
    "state",
    "reads",
]
"""Kinds of symptoms.

- `positions`: new tokens have other positions.
- `inputs`: what the model hands to its cache differs, though earlier layers read the same.
- `scoring`: an option of the attention differs: its window, its scale, ...
- `owner`: the layer holds what another layer should hold.
- `page-order`: whole pages have changed places.
- `token-order`: the same tokens are in other places.
- `rewritten`: codes changed after they were stored; one side alone shows it.
- `sink`: only first tokens that were to stay exact differ.
- `recent`: only last tokens that are not encoded yet differ.
- `plane-shifted`, `plane-scaled`: a plane differs by a constant, or by a factor.
- `plane`: a plane differs otherwise.
- `codes`: codes differ, and so does nothing that goes with them.
- `decoded`: equal planes are read back as other values.
- `state`: the stored tokens differ in no way that is known.
- `reads`: attention over equal tokens gives other outputs.
"""


@dataclass(frozen=True)
class Symptom:
    """One thing that differs between two caches which were handed the same K and V.

    Attributes:
        kind: See `SymptomKind`.
        layer: Layer of A; its partner in B shows the symptom.
        stream: `key`, `value`, or empty for both or neither.
        plane: Plane of the codec, or empty.
        what: More in words, for instance `window 9 -> 8` or `pages 1 and 2 of row 0`.
        value: The shift, the factor, the share of codes, the owner, or the relative error.
        rows: Rows of the session that show it; empty if all do.
        padded_only: Whether these are the rows that were padded, and no others.
        side: `a` or `b` if one side alone shows it, without the other.
    """

    kind: SymptomKind
    layer: int
    stream: str = ""
    plane: str = ""
    what: str = ""
    value: float = 0.0
    rows: tuple[int, ...] = ()
    padded_only: bool = False
    side: Literal["", "a", "b"] = ""


@dataclass(frozen=True)
class CacheDiff:
    """Two caches after the same schedule.

    Attributes:
        layers: Every pair of layers with a cache, each run by its own side; `hidden` is None.
        complaints: Lengths or bytes that differ, as sentences.
        schedules: What was run.
        symptoms: What differs in a layer once all that comes before it is the same, by layer.
    """

    layers: tuple[LayerDiff, ...] = ()
    complaints: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    symptoms: tuple[Symptom, ...] = ()
