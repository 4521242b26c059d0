"""Scales of codec `static-int` as the JSON that GenAI's model builder calls `kv_cache_scale_file`.

    {"scales": {"k_scales": [...], "v_scales": [...]}, "layer_ids": [...], "qmax": 128.0}

An entry of a layer is one number, or a list with one for each channel of each KV head, head by
head. `layer_ids` names the layers of the entries; without it there is one for each layer. `qmax` is
what thresholds were divided by, 128 for 8 and 8 for 4 bits; without it the scales are as they are
to be used. What the builder does not know, and passes over: `offsets`, means of channels in the
form of `scales`, and `basis`, what keys and values are expressed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.errors import RecipeError
from kvxform.ir.plan import CachePlan

FILE_NAME = "kv_cache_scales.json"
STREAMS = ("key", "value")
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class KvScales:
    """Scales of the layers that have a cache.

    Attributes:
        scale: By stream (`key`, `value`) and layer: one number, or one for each channel.
        offset: Means likewise, where they are taken away.
        half: What thresholds were divided by, or None if the scales are to be used as they are.
        basis: By stream, what it is expressed in.
    """

    scale: Mapping[str, Mapping[int, Numbers]]
    offset: Mapping[str, Mapping[int, Numbers]] = field(default_factory=dict)
    half: float | None = None
    basis: Mapping[str, str] = field(default_factory=dict)

    def options(self, codec: StaticIntCodec, stream: str, layer: int) -> dict[str, Any]:
        """Return plain data of `codec` with the constants of one stream of a layer."""
        factor = 1.0 if self.half is None else self.half / codec.half
        scale = [s * factor for s in self.scale[stream][layer]]
        axis = "tensor" if len(scale) == 1 else "channel"
        offset = self.offset.get(stream, {}).get(layer)
        return {
            **codec.to_dict(),
            "axis": axis,
            "scale": scale,
            "center": offset is not None,
            "offset": None if offset is None else list(offset),
        }

    def to_data(self) -> dict[str, Any]:
        """Return the content of the file."""
        layers = sorted(self.scale["key"])
        data: dict[str, Any] = {"scales": _entries("scales", self.scale, layers)}
        data["layer_ids"] = layers
        if self.half is not None:
            data["qmax"] = float(self.half)
        if self.offset:
            data["offsets"] = _entries("offsets", self.offset, layers)
        return {**data, "basis": {name[0]: basis for name, basis in self.basis.items()}}


def scales_of(plan: CachePlan) -> KvScales | None:
    """Return the scales of a plan, or None unless codecs of all layers have some and equal bits."""
    scale: dict[str, dict[int, Numbers]] = {name: {} for name in STREAMS}
    offset: dict[str, dict[int, Numbers]] = {}
    halves, basis = set(), {}
    for site in plan.owners:
        for name in STREAMS:
            stream = site.streams.get(name)
            codec = None if stream is None else make_codec(stream.codec)
            if stream is None or not isinstance(codec, StaticIntCodec) or codec.scale is None:
                return None
            scale[name][site.layer] = codec.scale
            if codec.offset is not None:
                offset.setdefault(name, {})[site.layer] = codec.offset
            halves.add(codec.half)
            basis[name] = str(stream.basis)
    return KvScales(scale, offset, halves.pop(), basis) if len(halves) == 1 else None


def read_kv_scales(path: str | Path) -> KvScales:
    """Read a scale file, of GenAI's calibrator or of a package.

    Raises:
        RecipeError: KVX109 if it cannot be read as one.
    """
    name = Path(path).name
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "no JSON" if isinstance(error, ValueError) else str(error.strerror)
        _refuse("a scale file must be JSON", reason, name)
    scales = data.get("scales") if isinstance(data, dict) else None
    if not isinstance(scales, dict) or not all(f"{s}_scales" in scales for s in "kv"):
        _refuse("a scale file must have scales: {k_scales: [...], v_scales: [...]}", None, name)
    found = {s: _read_list(scales[f"{s[0]}_scales"], name) for s in STREAMS}
    counts = {len(own) for own in found.values()}
    layers = data.get("layer_ids") or list(range(max(counts)))
    if not _are_layers(layers) or counts != {len(layers)}:
        _refuse("there must be a scale of K and of V for each layer", sorted(counts), name)
    half = data.get("qmax")
    if half is not None and not _is_positive(half):
        _refuse("qmax must be a positive number", half, name)
    if not all(_is_positive(s) for own in found.values() for entry in own for s in entry):
        _refuse("scales must be positive numbers", None, name)
    return KvScales(
        {stream: dict(zip(layers, own, strict=True)) for stream, own in found.items()},
        _read_offsets(data.get("offsets") or {}, layers, name),
        half,
        {s: str(b) for s in STREAMS for b in [data.get("basis", {}).get(s[0])] if b is not None},
    )


def _read_offsets(data: Any, layers: list[int], name: str) -> dict[str, dict[int, Numbers]]:
    found: dict[str, dict[int, Numbers]] = {}
    for stream in STREAMS:
        entries = data.get(f"{stream[0]}_offsets") if isinstance(data, dict) else None
        if entries is None:
            continue
        own = [None if entry is None else _read_numbers(entry, name) for entry in entries]
        if len(own) != len(layers):
            _refuse("there must be an entry of offsets for each layer", len(own), name)
        pairs = zip(layers, own, strict=True)
        found[stream] = {layer: numbers for layer, numbers in pairs if numbers is not None}
    return found


def _entries(
    kind: str, numbers: Mapping[str, Mapping[int, Numbers]], layers: list[int]
) -> dict[str, Any]:
    """Return the entries of all layers; those without numbers are null."""
    return {
        f"{stream[0]}_{kind}": [_plain(own.get(layer)) for layer in layers]
        for stream, own in sorted(numbers.items())
    }


def _plain(numbers: Numbers | None) -> float | list[float] | None:
    if numbers is None:
        return None
    return numbers[0] if len(numbers) == 1 else list(numbers)


def _read_list(entries: Any, name: str) -> list[Numbers]:
    if not isinstance(entries, list) or not entries:
        _refuse("scales must be lists with an entry for each layer", None, name)
    return [_read_numbers(entry, name) for entry in entries]


def _read_numbers(entry: Any, name: str) -> Numbers:
    numbers = entry if isinstance(entry, list) else [entry]
    if not numbers or not all(isinstance(n, int | float) for n in numbers):
        _refuse("an entry must be a number or a list of numbers", repr(entry)[:40], name)
    return tuple(float(n) for n in numbers)


def _are_layers(layers: Any) -> bool:
    is_list = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
    return is_list and len(set(layers)) == len(layers)


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and 0 < number < float("inf")


def _refuse(rule: str, got: object, name: str) -> NoReturn:
    hint = "kvxform export writes such a file, and so does GenAI's kv_cache_calibration"
    raise RecipeError("KVX109", rule, where=name, got=got, hint=hint)
