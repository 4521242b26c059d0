"""quantize-kv: keys and values are stored through a codec, with exact regions at both ends.

Legal once there is a cache, on streams that are still stored as they are. Only the plan changes:
the runtime encodes what is appended and decodes, or folds, what is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvxform.codecs.base import Codec, make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.errors import PassError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.fitting import check_codec, codec_samples
from kvxform.ir.layers import named_layers
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_options import (
    STREAMS,
    LayerOptions,
    RegionOptions,
    StreamOptions,
    check_options,
    stream_options,
)
from kvxform.ir.stream_plan import ReadForm, StreamPlan
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx, register_pass

WHERE = "quantize-kv"
SCORE_BYTES = 4  # float32
SHORT = {"key": "k", "value": "v"}


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
        layers: Options that differ at some layers, by their names: `{"0-1,-1": {"key": None}}`
            leaves keys of the first two layers and of the last one as they are. Of two entries
            that name a layer the later one wins.
    """

    key: Mapping[str, Any] | None
    value: Mapping[str, Any] | None
    regions: RegionOptions | None = None
    key_regions: RegionOptions | None = None
    value_regions: RegionOptions | None = None
    layers: Mapping[str, LayerOptions] | None = None
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
        """Check codecs, regions and layers as far as that goes without a model."""
        check_options(self._base, self.layers or {}, WHERE)

    def ensures(self) -> Mapping[str, FactValue]:
        """State which codec each stream has, at any layer."""
        codecs = {SHORT[stream]: self._codecs(stream) for stream in STREAMS}
        return {f"{short}.codec": _name_of(found) for short, found in codecs.items() if found}

    @property
    def needs_calibration(self) -> bool:
        """Whether a codec has constants that are to be fitted."""
        return any(codec.needs_calibration for name in STREAMS for codec in self._codecs(name))

    @property
    def needs_fisher(self) -> bool:
        """Whether a codec weighs errors with gradients when it is fitted."""
        return any(codec.needs_fisher for name in STREAMS for codec in self._codecs(name))

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site; sites that share a cache change alike.

        Raises:
            PassError: KVX203 if a codec cannot take a head_dim, KVX205 if its groups of tokens
                would cross a page, a layer is named that the model does not have, every layer
                is an exception, or a codec cannot be fitted.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        own = self._options_of_layers(program)
        asked = {
            site.layer: {
                name: stream_options(name, self._base, *own[site.owner]) for name in site.streams
            }
            for site in program.plan.sites
        }
        self._check_exceptions(list(asked.values()))
        found: list[Match | NoMatch] = []
        for site in program.plan.sites:
            streams = {
                name: _planned(program, site, name, options)
                for name, options in asked[site.layer].items()
                if options.codec is not None
            }
            found.append(self._check(program, site, streams))
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Put the new streams into the plan of one site."""
        assert match.layer is not None, "every match is at a site"
        rewriter.update_site_plan(match.layer, **match.data)

    def _check_exceptions(self, asked: Sequence[Mapping[str, StreamOptions]]) -> None:
        """Refuse a codec that no layer of the model is left with."""
        for name in STREAMS:
            wanted = _name_of(self._codecs(name))
            codecs = [options[name].codec for options in asked if name in options]
            if codecs and wanted != "none" and _name_of(codecs) == "none":
                rule = f"a codec of {name}s must be left to a layer of the model"
                hint = f"name fewer layers, or give {name} no codec"
                raise PassError("KVX205", rule, where=WHERE, got=wanted, hint=hint)

    def _check(
        self, program: Program, site: SitePlan, streams: Mapping[str, StreamPlan]
    ) -> Match | NoMatch:
        assert program.plan is not None, "match found a plan"
        if not streams:
            return self._left_alone(site)
        if all(site.streams[name] == stream for name, stream in streams.items()):
            return NoMatch("already stored so", site.layer, done=True)
        at = program.site(site.layer).module
        for name, stream in streams.items():
            present = site.streams[name].codec["codec"]
            if present != "none":
                reason = f"{name}s are already stored by codec {present}"
                return NoMatch(reason, site.layer, hint="keep one quantize-kv in the recipe")
            codec = make_codec(stream.codec)
            check_codec(codec, site.num_kv_heads, stream.head_dim, WHERE, at)
            _check_pages(program.plan.layout.page_size, stream, at)
        _check_ranking({**site.streams, **streams}, at)
        return Match(site.layer, data=streams)

    def _left_alone(self, site: SitePlan) -> NoMatch:
        if "value" not in site.streams and self.key is None:
            reason = "values are part of the latent, which takes the codec of keys"
            return NoMatch(reason, site.layer, hint="give key a codec")
        return NoMatch("the options of this layer give it no codec", site.layer)

    def _options_of_layers(self, program: Program) -> dict[int, list[LayerOptions]]:
        """Return what `layers` says of each layer, in order."""
        layers = sorted(site.layer for site in program.sites)
        found: dict[int, list[LayerOptions]] = {layer: [] for layer in layers}
        for name, options in (self.layers or {}).items():
            for layer in named_layers(name, layers, WHERE):
                found[layer].append(options)
        return found

    def _codecs(self, stream: str) -> list[Codec]:
        """Return the codecs of one stream: that of most layers first, if it has one."""
        everywhere = ({}, *(self.layers or {}).values())
        asked = [stream_options(stream, self._base, own).codec for own in everywhere]
        return [codec for codec in asked if codec is not None]

    @property
    def _base(self) -> Mapping[str, Any]:
        """The options of all layers, in the form of `LayerOptions`."""
        return {
            "key": self.key,
            "value": self.value,
            "regions": self.regions,
            "key_regions": self.key_regions,
            "value_regions": self.value_regions,
        }


def _planned(program: Program, site: SitePlan, name: str, options: StreamOptions) -> StreamPlan:
    """Return the new plan of a stream; its codec is fitted unless this is a dry run."""
    codec, present = options.codec, site.streams[name]
    assert codec is not None, "called for streams that have a codec"
    calibration = None
    if codec.needs_calibration and program.calibration is not None:
        codec = codec.fit(codec_samples(program, site.owner, name, present))
        calibration = program.calibration.name
    half = program.info.dtype if program.dtype.itemsize == 2 else "float16"
    return dataclasses.replace(
        present,
        codec=codec.to_dict(),
        planes=codec.planes(present.head_dim),
        tokens_per_group=codec.tokens_per_group,
        regions=options.planned_regions(half),
        read=ReadForm(),
        calibration=calibration,
        score_bytes=SCORE_BYTES if _is_ranked(codec) else 0,
    )


def _name_of(codecs: Sequence[Codec | None]) -> str:
    """Return the name of the first codec that encodes, or `none`."""
    return next((c.name for c in codecs if c is not None and c.name != "none"), "none")


def _is_ranked(codec: Codec) -> bool:
    """Whether tokens are ranked by the attention that they get."""
    return isinstance(codec, SaliencyCodec) and codec.needs_queries


def _check_ranking(streams: Mapping[str, StreamPlan], at: str) -> None:
    """K and V are ranked alike, by exact keys and queries in one basis."""
    ranked = [stream for stream in streams.values() if stream.score_bytes]
    if not ranked:
        return
    codecs = [make_codec(stream.codec) for stream in streams.values()]
    asked = {
        (c.chunk, c.share, c.score, c.probes, stream.regions)
        for c, stream in zip(codecs, streams.values(), strict=True)
        if isinstance(c, SaliencyCodec)
    }
    if len(ranked) < len(streams) or len(asked) > 1:
        rule = "keys and values that are ranked by attention need equal chunks, probes and regions"
        hint = "give both codec saliency with the same options, or use score: spread"
        raise PassError("KVX205", rule, where=WHERE, got=[c.name for c in codecs], at=at, hint=hint)
    if any(stream.rope == "pre" for stream in ranked):
        rule = "tokens are ranked by attention to keys after RoPE"
        hint = "cache keys after RoPE, or use score: spread"
        raise PassError("KVX205", rule, where=WHERE, got="pre", at=at, hint=hint)


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
