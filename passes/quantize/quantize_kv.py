"""quantize-kv: keys and values are stored through a codec, with exact regions at both ends.

Legal once there is a cache, on streams that are still stored as they are. Only the plan changes:
the runtime encodes what is appended and decodes, or folds, what is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from kvxform.codecs.base import Codec, dtype_from_name, make_codec
from kvxform.errors import PassError, RecipeError, nearest_hint
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.plan import ReadForm, Regions, SitePlan, StreamPlan
from kvxform.ir.program import Program
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx, register_pass

WHERE = "quantize-kv"
STREAMS = ("key", "value")
SHORT = {"key": "k", "value": "v"}


@with_config(ConfigDict(extra="allow"))  # unknown names reach `_check_regions`, which helps better
class RegionOptions(TypedDict, total=False):
    """Options of the exact regions; see `kvxform.ir.plan.Regions`.

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


@register_pass
@dataclass(frozen=True)
class QuantizeKv(GraphPass):
    """Store keys and values through codecs.

    A cached latent is one stream, the key; its values are a view of it, so that options of values
    do not apply there.

    Attributes:
        key: Codec of keys and its options, `{"codec": "int", "bits": 4, ...}`; None leaves them.
        value: The same for values.
        regions: Exact regions of both streams.
        key_regions: Options that differ for keys.
        value_regions: Options that differ for values.
    """

    key: Mapping[str, Any] | None
    value: Mapping[str, Any] | None
    regions: RegionOptions | None = None
    key_regions: RegionOptions | None = None
    value_regions: RegionOptions | None = None
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no cache to quantise yet"),
    )
    invalidates: ClassVar[tuple[str, ...]] = ("read.simplified",)
    source: ClassVar[str] = (
        "KIVI, arXiv 2402.02750, section 3 (axes and residual); "
        "QuaRot, arXiv 2404.00456, section 4 (token axis)"
    )

    def __post_init__(self) -> None:
        """Check codecs and regions as far as that goes without a model."""
        if self.key is None and self.value is None:
            raise RecipeError("KVX107", "a codec must be given for key, value or both", where=WHERE)
        for stream in STREAMS:
            codec = self._codec(stream)
            if codec is not None:
                _check_regions(self._region_options(stream), codec, stream)

    def ensures(self) -> Mapping[str, FactValue]:
        """State which codec each stream has."""
        codecs = {SHORT[stream]: self._codec(stream) for stream in STREAMS}
        return {f"{short}.codec": codec.name for short, codec in codecs.items() if codec}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site; sites that share a cache change alike.

        Raises:
            PassError: KVX203 if a codec cannot take a head_dim, KVX205 if its groups of tokens
                would cross a page.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        found: list[Match | NoMatch] = []
        for site in program.plan.sites:
            streams = {
                stream: self._planned(stream, site.streams[stream], program)
                for stream in site.streams
                if self._codec(stream) is not None
            }
            found.append(self._check(program, site, streams))
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Put the new streams into the plan of one site."""
        assert match.layer is not None, "every match is at a site"
        rewriter.update_site_plan(match.layer, **match.data)

    def _check(
        self, program: Program, site: SitePlan, streams: Mapping[str, StreamPlan]
    ) -> Match | NoMatch:
        assert program.plan is not None, "match found a plan"
        if not streams:  # only a codec for values, which are a view of the keys here
            reason = "values are part of the latent, which takes the codec of keys"
            return NoMatch(reason, site.layer, hint="give key a codec")
        if all(site.streams[name] == stream for name, stream in streams.items()):
            return NoMatch("already stored so", site.layer, done=True)
        at = program.site(site.layer).module
        for name, stream in streams.items():
            present = site.streams[name].codec["codec"]
            if present != "none":
                reason = f"{name}s are already stored by codec {present}"
                return NoMatch(reason, site.layer, hint="keep one quantize-kv in the recipe")
            _check_codec(make_codec(stream.codec), stream.head_dim, at)
            _check_pages(program.plan.layout.page_size, stream, at)
        return Match(site.layer, data=streams)

    def _planned(self, stream: str, present: StreamPlan, program: Program) -> StreamPlan:
        codec = self._codec(stream)
        assert codec is not None, "called for streams that have a codec"
        options = self._region_options(stream)
        flush = options.get("flush") or _default_flush(codec)
        half = program.info.dtype if program.dtype.itemsize == 2 else "float16"
        return dataclasses.replace(
            present,
            codec=codec.to_dict(),
            planes=codec.planes(present.head_dim),
            tokens_per_group=codec.tokens_per_group,
            regions=Regions(
                options.get("sink", 0),
                options.get("recent", 0),
                flush,
                options.get("dtype", half),
            ),
            read=ReadForm(),
        )

    def _codec(self, stream: str) -> Codec | None:
        options = self.key if stream == "key" else self.value
        return None if options is None else make_codec(options)

    def _region_options(self, stream: str) -> RegionOptions:
        own = self.key_regions if stream == "key" else self.value_regions
        return {**(self.regions or {}), **(own or {})}


def _default_flush(codec: Codec) -> Literal["sliding", "block"]:
    return "block" if codec.tokens_per_group > 1 else "sliding"


def _check_regions(options: RegionOptions, codec: Codec, stream: str) -> None:
    known = RegionOptions.__annotations__
    for name in options:
        if name not in known:
            hint = nearest_hint(name, known)
            raise RecipeError("KVX102", f"unknown region option '{name}'", where=WHERE, hint=hint)
    for name in ("sink", "recent"):
        tokens = options.get(name, 0)
        if not isinstance(tokens, int) or tokens < 0:
            rule = f"{name} of {stream} must be a number of tokens, 0 or more"
            raise RecipeError("KVX107", rule, where=WHERE, got=repr(tokens))
    if "dtype" in options:
        dtype_from_name(options["dtype"])
    flush = options.get("flush") or _default_flush(codec)
    if flush not in ("sliding", "block"):
        rule = f"flush of {stream} must be sliding or block"
        raise RecipeError("KVX107", rule, where=WHERE, got=repr(flush))
    recent, group = options.get("recent", 0), codec.tokens_per_group
    if flush == "block" and recent % group:
        raise RecipeError(
            "KVX107",
            f"recent of {stream} must be a multiple of the {group} tokens of a group",
            where=WHERE,
            got=recent,
            hint=f"use recent: {-(-recent // group) * group}, or flush: sliding",
        )


def _check_codec(codec: Codec, head_dim: int, at: str) -> None:
    try:
        codec.check(head_dim)
    except PassError as error:
        raise PassError(
            error.code, error.rule, where=WHERE, got=error.got, at=at, hint=error.hint
        ) from error


def _check_pages(page_size: int, stream: StreamPlan, at: str) -> None:
    if page_size % stream.tokens_per_group:
        raise PassError(
            "KVX205",
            f"the group of tokens must divide page_size {page_size}",
            where=WHERE,
            got=stream.tokens_per_group,
            at=at,
            hint="use larger pages in page-cache, or a smaller group",
        )
