"""How the K or the V half of one attention site is stored: a codec, its planes, its regions.

Pure data with the arithmetic of its cost; `kvxform.ir.plan` puts streams together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvxform.codecs.base import PlaneSpec, dtype_from_name
from kvxform.codecs.basis import Basis


@dataclass(frozen=True)
class Regions:
    """Parts of a sequence with their own precision: first tokens, body, last tokens.

    Attributes:
        sink: First tokens kept unencoded for ever.
        recent: Last tokens kept unencoded. With flush `sliding` at least so many; with `block`
            the buffer fills up to `recent` tokens, which are then all encoded at once.
        flush: `sliding` (each new token pushes the oldest one out) or `block` (KIVI keys).
        dtype: Stored dtype of unencoded tokens. If a stream keeps exact tokens after the sink,
            every token is rounded to it on arrival, so codes do not depend on when they are made.
    """

    sink: int = 0
    recent: int = 0
    flush: Literal["sliding", "block"] = "sliding"
    dtype: str = "float16"


@dataclass(frozen=True)
class ReadForm:
    """Where scale and zero point are applied when the stream is read.

    `element`: every cached value is decoded first. `folded`: scales are applied to the query, the
    score column, the probability or the output, and zero points as one rank-1 correction.
    """

    form: Literal["element", "folded"] = "element"


@dataclass(frozen=True)
class StreamPlan:
    """How the K or the V half of one site is stored.

    Attributes:
        codec: Plain data of the codec, for instance `{"codec": "int", "bits": 4, ...}`.
        planes: Stored planes of the body, as the codec declares them.
        tokens_per_group: Tokens that are encoded together.
        head_dim: Channels of one head.
        rope: Keys are stored after (`post`) or before (`pre`) RoPE; `none` for values.
        basis: Rotation of the channel axis that stored values are expressed in.
        regions: Unencoded parts.
        read: Where scales are applied on reading.
        calibration: Name of the statistics the codec was fitted on, or None.
        score_bytes: Bytes of the score that a token of one head collects until it is encoded, for
            codecs that rank tokens by attention.
        makes_heads: What is stored of a token is one vector that all heads are made from.
    """

    codec: Mapping[str, Any]
    planes: tuple[PlaneSpec, ...]
    tokens_per_group: int
    head_dim: int
    rope: Literal["pre", "post", "none"] = "none"
    basis: Basis = field(default_factory=Basis)
    regions: Regions = field(default_factory=Regions)
    read: ReadForm = field(default_factory=ReadForm)
    calibration: str | None = None
    score_bytes: int = 0
    makes_heads: bool = False

    @property
    def is_turned_at_read(self) -> bool:
        """Whether stored vectors must be turned as a whole to be used; then they are decoded."""
        return self.rope == "pre" or self.basis.inverse is not None or self.makes_heads

    @property
    def keep_and_chunk(self) -> tuple[int, int]:
        """Return (tokens always kept exact at the end, tokens encoded at a time)."""
        if self.regions.flush == "block":
            return 0, max(self.regions.recent, self.tokens_per_group)
        return self.regions.recent, self.tokens_per_group

    @property
    def recent_capacity(self) -> int:
        """Largest number of exact tokens after the sink once an append has ended."""
        keep, chunk = self.keep_and_chunk
        return keep + chunk - 1

    def body_tokens(self, cached_tokens: int) -> int:
        """Return how many of `cached_tokens` are encoded; the step rule of every lowering."""
        keep, chunk = self.keep_and_chunk
        free = cached_tokens - self.regions.sink - keep
        return max(0, free // chunk * chunk)

    def body_bytes_per_token(self, num_heads: int) -> float:
        """Return bytes of one encoded token of `num_heads` KV heads, metadata included."""
        return sum(p.bytes_per_token(num_heads) for p in self.planes)

    def page_bytes(self, page_size: int, num_heads: int) -> int:
        """Return bytes of one page of `num_heads` KV heads."""
        rows = ((p, page_size // p.tokens_per_row) for p in self.planes)
        return sum(p.heads(num_heads) * p.row_bytes * count for p, count in rows)

    def exact_bytes(self) -> int:
        """Return bytes of the sink and recent buffers of one head of one sequence."""
        rows = self.regions.sink + self.recent_capacity
        values = rows * self.head_dim * dtype_from_name(self.regions.dtype).itemsize
        return values + self.recent_capacity * self.score_bytes


@dataclass(frozen=True)
class KeyView:
    """Values that are the first `head_dim` channels of the stored keys: nothing is stored for them.

    Attributes:
        head_dim: Channels of a value.
    """

    head_dim: int
