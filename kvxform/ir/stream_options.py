"""Options of `quantize-kv`: the codec and the exact regions that a stream is asked to have.

Options are given for keys and values of the whole model, and may differ at some layers. They are
checked as far as that goes without a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from kvxform.codecs.base import Codec, dtype_from_name, make_codec
from kvxform.errors import RecipeError, nearest_hint
from kvxform.ir.layers import check_layers
from kvxform.ir.stream_plan import Regions

STREAMS = ("key", "value")


@with_config(ConfigDict(extra="allow"))  # unknown names reach `check_options`, which helps better
class RegionOptions(TypedDict, total=False):
    """Options of the exact regions; see `kvxform.ir.stream_plan.Regions`.

    Attributes:
        sink: First tokens that are never encoded; 0 if left out.
        recent: Last tokens that are not encoded yet; 0 if left out.
        flush: How tokens leave the recent region. Left out: `block` for codecs that encode several
            tokens together, `sliding` for the others.
        dtype: Stored dtype of exact tokens. Left out: that of a 16-bit model, else float16.
    """

    sink: int
    recent: int
    flush: Literal["sliding", "block"]
    dtype: str


@with_config(ConfigDict(extra="allow"))
class LayerOptions(TypedDict, total=False):
    """Options at some layers; what is left out is as everywhere else.

    Attributes:
        key: Codec of keys, or None to leave them as they are.
        value: The same for values.
        regions: Options of the regions of both streams.
        key_regions: Those of keys alone.
        value_regions: Those of values alone.
    """

    key: Mapping[str, Any] | None
    value: Mapping[str, Any] | None
    regions: RegionOptions
    key_regions: RegionOptions
    value_regions: RegionOptions


@dataclass(frozen=True)
class StreamOptions:
    """What one stream is asked to be.

    Attributes:
        codec: Its codec, or None to leave it as it is.
        regions: Options of its exact regions.
    """

    codec: Codec | None
    regions: RegionOptions

    def planned_regions(self, half: str) -> Regions:
        """Return the regions of the plan; `half` is the dtype of exact tokens if none is given."""
        assert self.codec is not None, "a stream without codec is left as it is"
        given = self.regions
        return Regions(
            given.get("sink", 0),
            given.get("recent", 0),
            given.get("flush") or _default_flush(self.codec),
            given.get("dtype", half),
        )


def stream_options(stream: str, *given: Mapping[str, Any]) -> StreamOptions:
    """Return the options of `stream` from mappings in the form of `LayerOptions`; later ones win.

    Regions of one stream win over those of both streams, wherever they are given.

    Raises:
        RecipeError: KVX103 or KVX102 if the codec is not known or does not take an option.
    """
    codec = None
    for options in given:
        codec = options.get(stream, codec)
    regions: RegionOptions = {}
    for name in ("regions", f"{stream}_regions"):
        for options in given:
            regions = {**regions, **(options.get(name) or {})}
    return StreamOptions(None if codec is None else make_codec(codec), regions)


def check_options(
    base: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    """Check options of the whole model and of its layers.

    Raises:
        RecipeError: KVX102, KVX103, KVX105 or KVX107.
    """
    for name, own in layers.items():
        check_layers(name, where)
        _check_names(own, LayerOptions.__annotations__, f"option of layers {name}", where)
    found = [found for own in ({}, *layers.values()) for found in _streams(base, own)]
    if all(options.codec is None for _, options in found):
        raise RecipeError("KVX107", "a codec must be given for key, value or both", where=where)
    for stream, options in found:
        _check_regions(stream, options, where)


def _streams(
    base: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[tuple[str, StreamOptions]]:
    for stream in STREAMS:
        yield stream, stream_options(stream, base, own)


def _check_names(
    options: Mapping[str, Any], known: Mapping[str, Any], what: str, where: str
) -> None:
    for name in options:
        if name not in known:
            hint = nearest_hint(name, known)
            raise RecipeError("KVX102", f"unknown {what} '{name}'", where=where, hint=hint)


def _default_flush(codec: Codec) -> Literal["sliding", "block"]:
    return "block" if codec.tokens_per_group > 1 else "sliding"


def _check_regions(stream: str, asked: StreamOptions, where: str) -> None:
    options, codec = asked.regions, asked.codec
    _check_names(options, RegionOptions.__annotations__, "region option", where)
    for name in ("sink", "recent"):
        tokens = options.get(name, 0)
        if not isinstance(tokens, int) or tokens < 0:
            rule = f"{name} of {stream} must be a number of tokens, 0 or more"
            raise RecipeError("KVX107", rule, where=where, got=repr(tokens))
    if "dtype" in options:
        dtype_from_name(options["dtype"])
    if options.get("flush") not in (None, "sliding", "block"):
        rule = f"flush of {stream} must be sliding or block"
        raise RecipeError("KVX107", rule, where=where, got=repr(options["flush"]))
    if codec is None:
        return
    recent, group = options.get("recent", 0), codec.tokens_per_group
    if (options.get("flush") or _default_flush(codec)) == "block" and recent % group:
        raise RecipeError(
            "KVX107",
            f"recent of {stream} must be a multiple of the {group} tokens of a group",
            where=where,
            got=recent,
            hint=f"use recent: {-(-recent // group) * group}, or flush: sliding",
        )
