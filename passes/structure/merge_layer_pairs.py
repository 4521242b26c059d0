"""merge-layer-pairs: two neighbouring layers keep one direction a token and two norms.

Keys of neighbouring layers in the deeper half of a model point the same way, and so do their
values. The recent tokens of both layers stay exact. When a chunk of tokens leaves that region, its
keys and values are merged by codec `slerp-pair`; the tokens that differ most stay as they are.

The lower layer of a pair is read before the upper one has its new keys. So a chunk is merged from
what both layers had before the step, which holds as long as no step has more tokens than the recent
region; `CachePlan.max_step_tokens` says so, and sessions cut prompts accordingly. Legal where the
two layers agree about what is cached, and have unencoded caches of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kvxform.codecs.slerp_pair import SlerpPairCodec
from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import KeyView, Regions, StreamPlan
from kvxform.pass_base import (
    GraphPass,
    Loss,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    approx,
    register_pass,
)
from kvxform.structure.owner_map import disagreement

WHERE = "merge-layer-pairs"


@register_pass
@dataclass(frozen=True)
class MergeLayerPairs(GraphPass):
    """Store the keys and values of two neighbouring layers as one direction and two norms.

    Attributes:
        start: First layer that may be merged; the middle of the model by default.
        t: Where between two layers their direction lies: 0 is the lower one, 1 the upper one.
        keep: Share of the tokens of a chunk and head that stay as they are; one at least unless 0.
        chunk: Tokens that are merged at a time.
        recent: Last tokens that stay exact, and the most new tokens of a step.
        sink: First tokens that stay exact.
        dtype: Stored dtype of everything; that of a 16-bit model, or float16.
    """

    start: int | None = None
    t: float = 0.6
    keep: float = 0.05
    chunk: int = 64
    recent: int = 64
    sink: int = 0
    dtype: str | None = None
    numerics: ClassVar[Numerics] = approx("kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no caches to merge yet"),
        Requirement("k.rope", ("post",), because="keys would have to be turned before merging"),
    )
    invalidates: ClassVar[tuple[str, ...]] = ("read.simplified",)
    source: ClassVar[str] = "MiniCache, arXiv 2405.14366, section 4"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        for is_fine, rule, got in (
            (self.recent >= 1, "recent must be at least 1", self.recent),
            (self.sink >= 0, "sink must be a number of tokens", self.sink),
            (0 <= self.keep <= 1, "keep must be from 0 to 1", self.keep),
        ):
            if not is_fine:
                raise RecipeError("KVX107", rule, where=WHERE, got=got)
        self._codec(1, "float16")

    def ensures(self) -> Mapping[str, FactValue]:
        """State the codec of the merged streams."""
        return {"k.codec": SlerpPairCodec.name}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every second layer from `start` on, with the one below it.

        Raises:
            PassError: KVX205 if a page does not hold whole chunks.
        """
        if program.plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        if program.plan.layout.kind == "checkpoint":
            return [NoMatch("tokens are computed anew", hint="leave out cache-residual")]
        size = program.plan.layout.page_size
        if size % self.chunk:
            rule = f"a page must hold whole chunks of {self.chunk} tokens"
            raise PassError("KVX205", rule, where=WHERE, got=f"{size} tokens")
        layers = [site.layer for site in program.sites]
        first = len(layers) // 2 if self.start is None else self.start
        late = [layer for layer in layers if layer >= first]
        pairs = list(zip(late[::2], late[1::2], strict=False))
        if not pairs:
            hint = "let start name an earlier layer"
            return [NoMatch(f"there are no two layers from layer {first} on", hint=hint)]
        alone = [layer for layer in layers if layer not in {x for pair in pairs for x in pair}]
        skipped: list[Match | NoMatch] = [
            NoMatch("it has no partner", layer, done=True) for layer in alone
        ]
        return [*skipped, *(self._check(program, *pair) for pair in pairs)]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Give two layers one stream; the append of the upper one follows that of the lower one."""
        lower, upper = match.data["lower"], match.data["upper"]
        for layer in (lower, upper):
            rewriter.update_site_plan(
                layer,
                owner=lower,
                payload="pair",
                key=match.data["stream"],
                value=KeyView(program.site(layer).v_head_dim),
            )
        first, second = (program.append_node(layer) for layer in (lower, upper))
        assert first is not None, "match found both"
        assert second is not None
        rewriter.set_args(second, (*second.args[:2], first))

    def _check(self, program: Program, lower: int, upper: int) -> Match | NoMatch:
        assert program.plan is not None, "checked before"
        plans = [program.plan.site(layer) for layer in (lower, upper)]
        if all(plan.payload == "pair" for plan in plans):
            return NoMatch("already merged", upper, done=True)
        problem = _against(program, *plans) or disagreement(program, lower, upper)
        if problem:
            return NoMatch(problem, upper, hint="let start name the first layer of other pairs")
        stream = self._stream(program, plans[0])
        data: dict[str, Any] = {"lower": lower, "upper": upper, "stream": stream}
        note = f"layers {lower} and {upper} are merged"
        return Match(upper, data=data, losses=self._losses(program, lower, upper), note=note)

    def _codec(self, key_dim: int, dtype: str) -> SlerpPairCodec:
        kept = max(1, round(self.keep * self.chunk)) if self.keep else 0
        return SlerpPairCodec(key_dim, self.chunk, kept, self.t, dtype)

    def _stream(self, program: Program, lower: SitePlan) -> StreamPlan:
        is_narrow = program.dtype.itemsize == 2
        dtype = self.dtype or (program.info.dtype if is_narrow else "float16")
        codec = self._codec(lower.key.head_dim, dtype)
        width = 2 * (lower.key.head_dim + lower.value.head_dim)
        return replace(
            lower.key,
            codec=codec.to_dict(),
            planes=codec.planes(width),
            tokens_per_group=codec.tokens_per_group,
            head_dim=width,
            regions=Regions(self.sink, self.recent, "sliding", dtype),
        )

    def _losses(self, program: Program, lower: int, upper: int) -> tuple[Loss, ...]:
        """Return what merging gives up of each layer, where there are samples."""
        if program.calibration is None:
            return ()
        streams = [
            (layer, name, getattr(program.calibration.layers[layer], field).samples)
            for layer in (lower, upper)
            for name, field in (("key", "k_post"), ("value", "v"))
        ]
        whole = torch.cat([samples for _, _, samples in streams], -1)
        codec = self._codec(streams[0][2].shape[-1], "float32")
        whole = whole[:, : whole.shape[1] // codec.chunk * codec.chunk]
        if not whole.numel():
            return ()
        widths = [samples.shape[-1] for _, _, samples in streams]
        lost = codec.decode(codec.encode(whole), whole.dtype) - whole
        return tuple(
            Loss(layer, name, float(difference.norm() / own.norm()))
            for (layer, name, _), difference, own in zip(
                streams, lost.split(widths, -1), whole.split(widths, -1), strict=True
            )
        )


def _against(program: Program, lower: SitePlan, upper: SitePlan) -> str:
    """Return why two layers cannot be merged whatever they hold, or an empty text."""
    for plan in (lower, upper):
        readers = program.readers(plan.layer)
        if plan.payload != "kv" or not isinstance(plan.value, StreamPlan):
            return f"layer {plan.layer} does not cache keys and values"
        if plan.owner != plan.layer or len(readers) > 1:
            return f"layer {plan.layer} shares a cache with other layers"
        if any(stream.codec["codec"] != "none" for stream in plan.streams.values()):
            return f"keys or values of layer {plan.layer} are already encoded"
        if any(stream.is_turned_at_read for stream in plan.streams.values()):
            return f"keys or values of layer {plan.layer} are turned when they are read"
    return ""
