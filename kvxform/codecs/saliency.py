"""Codec `saliency`: the tokens of a chunk that matter most get a better codec than the others.

Tokens are encoded `chunk` at a time. Each KV head ranks those of a chunk by a score; the first
`share` of them go to codec `high`, the rest to codec `low`, and one bit a token says which. Both
classes have the same number of tokens in every chunk, so the bytes of a chunk are fixed.

The score of token i comes from attention within its chunk. With a[t, i] the softmax, over the
tokens of the chunk up to t, of the scores of query t, summed over the query heads of the KV head:

- `score: mean`   mean of a[t, i] over the probe queries t >= i (ZipCache): the last `last` of the
                  chunk and `random` more at fixed places
- `score: sum`    sum of a[t, i] over them; with `last: 1.0` the accumulated attention of H2O (MiKV)
- `score: spread` none of that: how far out the token lies in its worst channel. Tokens with massive
                  activations then stay out of the ranges of all others

Scores use queries and exact keys of the chunk alone. So neither how a prompt is cut nor what else
is cached changes a code, and a token is encoded once, when its chunk is complete.

With `separable` values are divided by sqrt(max |x|) of their channel over the chunk first.

Source: ZipCache, arXiv 2405.14256, sections 4.1 to 4.3; MiKV, arXiv 2402.18096, section 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import (
    Codec,
    CodecSamples,
    PlaneSpec,
    register_codec,
    require_option,
)
from kvxform.codecs.integer import LARGEST_FLOAT16, SMALLEST_SCALE, IntCodec

CLASSES = ("high", "low")
SEED = 0
ANY_WIDTH = 64
SCORES = ("mean", "sum", "spread")


@register_codec
@dataclass(frozen=True)
class SaliencyCodec(Codec):
    """Two codecs, for tokens that matter more and less.

    Attributes:
        high: Codec of the tokens with the highest scores.
        low: Codec of the others.
        share: Share of the tokens of a chunk that go to `high`, in (0, 1).
        chunk: Tokens that are ranked together, a multiple of 8.
        score: `mean`, `sum` or `spread`.
        last: Share of the chunk, at its end, whose queries are probes.
        random: Share of the chunk that are probes besides, at fixed places before those.
        separable: Normalise channels by the chunk (ZipCache's values).
    """

    name: ClassVar[str] = "saliency"
    high: Codec = field(default_factory=lambda: IntCodec(4))
    low: Codec = field(default_factory=lambda: IntCodec(2))
    share: float = 0.5
    chunk: int = 128
    score: Literal["mean", "sum", "spread"] = "mean"
    last: float = 0.05
    random: float = 0.05
    separable: bool = False

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        for option in CLASSES:
            codec = getattr(self, option)
            self._require(isinstance(codec, Codec), f"{option} must be a codec", codec)
            is_headwise = codec.is_headwise and codec.name != self.name
            rule = f"{option} must encode heads on their own, and not rank tokens itself"
            self._require(is_headwise, rule, codec.name)
        is_chunk = isinstance(self.chunk, int) and self.chunk > 0 and self.chunk % 8 == 0
        self._require(is_chunk, "chunk must be a positive multiple of 8", self.chunk)
        self._require(0 < self.share < 1, "share must lie between 0 and 1", self.share)
        self._require(self.score in SCORES, "score must be mean, sum or spread", self.score)
        shares = 0 < self.last <= 1 and self.random >= 0 and self.last + self.random <= 1
        rule = "last and random must be shares of a chunk, and last more than 0"
        self._require(shares, rule, (self.last, self.random))
        for option, count in self.counts.items():
            group = getattr(self, option).tokens_per_group
            rule = f"the {count} tokens of {option} must be whole groups of {group}"
            self._require(count > 0 and count % group == 0, rule, self.share)

    @property
    def needs_queries(self) -> bool:
        """Whether ranks come from attention, so that an append must know the new queries."""
        return self.score != "spread"

    @property
    def needs_calibration(self) -> bool:
        """Whether one of the codecs is to be fitted."""
        return self.high.needs_calibration or self.low.needs_calibration

    @property
    def needs_fisher(self) -> bool:
        """Whether one of the codecs weighs errors."""
        return self.high.needs_fisher or self.low.needs_fisher

    @property
    def tokens_per_group(self) -> int:
        """Tokens that are ranked together."""
        return self.chunk

    @functools.cached_property
    def probes(self) -> tuple[int, ...]:
        """Places in a chunk whose queries are probes, ascending; the last place is one."""
        last = math.ceil(self.last * self.chunk)
        others = min(math.ceil(self.random * self.chunk), self.chunk - last)
        generator = torch.Generator().manual_seed(SEED)
        order = torch.randperm(self.chunk - last, generator=generator).tolist()
        return tuple(sorted([*order[:others], *range(self.chunk - last, self.chunk)]))

    @property
    def seen_by(self) -> Tensor:
        """Number of probes that see the token at each place of a chunk, int64 `[chunk]`."""
        return (torch.tensor(self.probes) >= torch.arange(self.chunk)[:, None]).sum(-1)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if one of the codecs cannot take `head_dim`."""
        self.high.check(head_dim)
        self.low.check(head_dim)

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of both codecs, one row a chunk, and the class map."""
        found = [
            PlaneSpec(
                f"{option}_{plane.name}",
                plane.dtype,
                count // plane.tokens_per_row * plane.width,
                self.chunk,
            )
            for option, count in self.counts.items()
            for plane in getattr(self, option).planes(head_dim)
        ]
        found.append(PlaneSpec("class", "uint8", self.chunk // 8, self.chunk))
        if self.separable:
            found.append(PlaneSpec("channel", "float16", head_dim, self.chunk))
        return tuple(found)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, by scores that `x` alone decides."""
        assert not self.needs_queries, "scores come with the tokens: use encode_ranked"
        return self.encode_ranked(x, self._spread(x.double()))

    def encode_ranked(self, x: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`.

        Args:
            x: Whole chunks of tokens.
            scores: Sum of the attention that each token got from probes, `[..., Hk, T]`.
        """
        chunks = x.unflatten(-2, (-1, self.chunk))  # [..., Hk, C, chunk, D]
        planes: dict[str, Tensor] = {}
        channel = _channel_scale(chunks) if self.separable else None
        if channel is not None:
            chunks = chunks.float() / channel.float()
        is_high = self._choose(scores.double().unflatten(-1, (-1, self.chunk)))
        for option, index in self._indices(is_high).items():
            tokens = chunks.gather(-2, index.expand(*index.shape[:-1], x.shape[-1]))
            found = getattr(self, option).encode(tokens.flatten(-3, -2))
            chunk_rows = (chunks.shape[-3], -1)
            for name, plane in found.items():
                planes[f"{option}_{name}"] = plane.unflatten(-2, chunk_rows).flatten(-2)
        planes["class"] = _pack_bits(is_high)
        return planes if channel is None else {**planes, "channel": channel.squeeze(-2)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        values = None
        for option, index in self._indices(_unpack_bits(planes["class"])).items():
            part = self._decode_class(option, planes, wide)
            if values is None:
                values = part.new_empty(*part.shape[:-2], self.chunk, part.shape[-1])
            values = values.scatter(-2, index.expand_as(part), part)
        assert values is not None, "there are two classes"
        if self.separable:
            values = values * planes["channel"].to(wide).unsqueeze(-2)
        return values.flatten(-3, -2).to(dtype)

    def fit(self, samples: CodecSamples) -> SaliencyCodec:
        """Return the codec with both codecs fitted, on all tokens alike."""
        if not self.needs_calibration:
            return self
        return dataclasses.replace(self, high=self.high.fit(samples), low=self.low.fit(samples))

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each class in a chunk."""
        high = round(self.share * self.chunk)
        return {"high": high, "low": self.chunk - high}

    def _choose(self, scores: Tensor) -> Tensor:
        """Return which tokens are of the high class, bool as `scores` `[..., chunk]`."""
        if self.score == "mean":
            scores = scores / self.seen_by.to(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        is_high = torch.zeros_like(scores, dtype=torch.bool)
        return is_high.scatter(-1, order[..., : self.counts["high"]], True)

    def _indices(self, is_high: Tensor) -> dict[str, Tensor]:
        """Return the places of the tokens of each class, ascending, `[..., count, 1]`."""
        order = (~is_high).to(torch.uint8).argsort(dim=-1, stable=True).unsqueeze(-1)
        high = self.counts["high"]
        return {"high": order[..., :high, :], "low": order[..., high:, :]}

    def _decode_class(
        self, option: str, planes: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Return the tokens of one class, `[..., C, count, D]`."""
        codec, count = getattr(self, option), self.counts[option]
        own = {}
        for plane in codec.planes(ANY_WIDTH):  # for names and tokens of a row, alike for all
            rows = planes[f"{option}_{plane.name}"]
            split = rows.unflatten(-1, (count // plane.tokens_per_row, -1))
            own[plane.name] = split.flatten(-3, -2)
        tokens: Tensor = codec.decode(own, dtype).unflatten(-2, (-1, count))
        return tokens

    def _spread(self, x: Tensor) -> Tensor:
        """Return how far out each token lies in its chunk, in mean distances; `[..., Hk, T]`."""
        chunks = x.unflatten(-2, (-1, self.chunk))
        distance = (chunks - chunks.median(-2, keepdim=True).values).abs()
        usual = distance.mean(-2, keepdim=True).clamp_min(SMALLEST_SCALE)
        worst: Tensor = (distance / usual).amax(-1)
        return worst.flatten(-2)

    def _require(self, condition: bool, rule: str, got: object) -> None:
        require_option(condition, self.name, rule, got)


def _channel_scale(chunks: Tensor) -> Tensor:
    """Return sqrt(max |x|) of each channel of chunks `[..., chunk, D]`, float16 `[..., 1, D]`."""
    largest = chunks.float().abs().amax(-2, keepdim=True)
    return largest.sqrt().clamp(SMALLEST_SCALE**0.5, LARGEST_FLOAT16).half()


def _pack_bits(bits: Tensor) -> Tensor:
    """Return bool `[..., n]` as uint8 `[..., n / 8]`, lowest bit first."""
    eights: Tensor = bits.unflatten(-1, (-1, 8)).to(torch.int32)
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device)
    return (eights * weights).sum(-1).to(torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    """Return the inverse of `_pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits: Tensor = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    return bits.bool()
