"""The formats that a stream can take: its codec with other options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvxform.codecs.base import Codec, make_codec
from kvxform.errors import PassError
from kvxform.ir.fitting import check_codec, codec_samples
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import ReadForm, StreamPlan


@dataclass(frozen=True)
class Format:
    """One way to store a stream.

    Attributes:
        codec: The codec, fitted if it has constants and there are statistics.
        stream: The plan of the stream with it.
        size: Bytes per token of all KV heads, metadata included.
    """

    codec: Codec
    stream: StreamPlan
    size: float


def stream_formats(
    program: Program, site: SitePlan, name: str, options: Sequence[Mapping[str, Any]], where: str
) -> tuple[Format, ...]:
    """Return the formats of one stream, in the order of `options`.

    Args:
        program: A program with a cache; with a calibration, codecs are fitted.
        site: Plan of the layer that owns the stream.
        name: `key` or `value`.
        options: Options that differ from those of the present codec, see `changed_options`.
        where: Pass that asks, for the error text.

    Raises:
        RecipeError: KVX102 if the codec has no such option.
        PassError: KVX203 if a codec cannot take head_dim, KVX205 if one encodes another number of
            tokens together, lost its constants, or ranks tokens by attention.
    """
    present, calibration = site.streams[name], program.calibration
    at = program.site(site.layer).module
    if present.score_bytes:
        rule = "codecs that rank tokens by attention cannot be measured on their own"
        raise PassError("KVX205", rule, where=where, at=at)
    formats = []
    for changes in options:
        codec = _make(present, changes, where)
        check_codec(codec, site.num_kv_heads, present.head_dim, where, at)
        if codec.tokens_per_group != present.tokens_per_group:
            raise PassError(
                "KVX205",
                f"formats must encode {present.tokens_per_group} tokens together, as {name}s do",
                where=where,
                got=f"{codec.tokens_per_group} with {dict(changes)}",
                at=program.site(site.layer).module,
            )
        is_fitted = codec.needs_calibration and calibration is not None
        if is_fitted:
            codec = codec.fit(codec_samples(program, site.layer, name, present))
        planes = codec.planes(present.head_dim)
        stream = dataclasses.replace(present, codec=codec.to_dict(), planes=planes, read=ReadForm())
        formats.append(Format(codec, stream, stream.body_bytes_per_token(site.num_kv_heads)))
    return tuple(formats)


def _make(present: StreamPlan, changes: Mapping[str, Any], where: str) -> Codec:
    try:
        return make_codec(changed_options(present.codec, changes))
    except TypeError as error:  # an option without default was a constant
        raise PassError(
            "KVX205",
            "a codec that its own pass has fitted must keep its options",
            where=where,
            got=f"{dict(changes)} for codec {present.codec['codec']}",
        ) from error


def changed_options(codec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a codec with other options; fitted constants are left out.

    Args:
        codec: Plain data of the base codec.
        changes: Options to set. An option that the codec does not have itself is set on the codec
            that it wraps. With `codec` among them they are a codec of their own.
    """
    if "codec" in changes:
        return dict(changes)
    base = {key: value for key, value in codec.items() if not is_constant(value)}
    inner = base.get("inner")
    if isinstance(inner, Mapping):
        own = {key: value for key, value in changes.items() if key in base}
        rest = {key: value for key, value in changes.items() if key not in base}
        return {**base, **own, "inner": changed_options(inner, rest)}
    return {**base, **changes}


def is_constant(value: object) -> bool:
    """Return whether an option of a codec was fitted: constants are nested sequences of floats."""
    if not isinstance(value, list | tuple):
        return False
    return all(isinstance(part, float) or is_constant(part) for part in value)
