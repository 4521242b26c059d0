"""CachePlan: what is stored per site and how, as pure data, with the arithmetic of its cost.

Nothing here runs a model. Every figure comes from plane shapes alone, and the runtime allocates
from the same shapes, so that predicted and measured bytes are the same number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvxform.codecs.base import PlaneSpec, dtype_from_name
from kvxform.codecs.basis import Basis
from kvxform.ir.stream_plan import KeyView, ReadForm, Regions, StreamPlan

BASELINE_BITS = 16  # what "before" means: a bfloat16 or float16 cache of the same geometry
ID_BYTES = 8  # of a token id


@dataclass(frozen=True)
class Layout:
    """Where rows of a plane live.

    `contiguous` per sequence, or pages of `page_size` tokens. With `checkpoint` only the last
    `hot_window` tokens are there; of all others the id alone is kept, and they are computed anew
    in every step.
    """

    kind: Literal["contiguous", "paged", "checkpoint"] = "contiguous"
    page_size: int = 0
    hot_window: int = 0

    def __str__(self) -> str:
        """Return the fact value: `contiguous`, `paged(64)` or `checkpoint(256)`."""
        sizes = {"contiguous": "", "paged": self.page_size, "checkpoint": self.hot_window}
        return f"{self.kind}({sizes[self.kind]})" if sizes[self.kind] != "" else self.kind


@dataclass(frozen=True)
class SitePlan:
    """The cache of one attention site.

    Attributes:
        layer: Layer index of the site.
        owner: Layer whose cache is read; `layer` itself unless layers share.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        key: The K stream.
        value: The V stream, or which part of the keys the values are.
        payload: What is cached: `kv`; where values are a view of the keys, `k` if these are the
            keys of all heads before RoPE, or `latent`; `pair` where the keys and values of two
            layers are one stream of the lower one, their owner, each vector [K | V] of the owner
            and then of the reader.
    """

    layer: int
    owner: int
    num_q_heads: int
    num_kv_heads: int
    key: StreamPlan
    value: StreamPlan | KeyView
    payload: Literal["kv", "k", "latent", "residual", "pair"] = "kv"

    @property
    def streams(self) -> dict[str, StreamPlan]:
        """The stored streams by name: `key`, and `value` unless values are a view of the keys."""
        streams = {"key": self.key}
        if isinstance(self.value, StreamPlan):
            streams["value"] = self.value
        return streams

    @property
    def pair_channels(self) -> tuple[slice, slice]:
        """Where K and V of this layer are in the vectors of a pair."""
        width = self.key.head_dim // 2
        first = 0 if self.owner == self.layer else width
        middle = first + width - self.value.head_dim
        return slice(first, middle), slice(middle, first + width)

    @property
    def values_per_token(self) -> int:
        """Cached elements of one token, over all KV heads and stored streams."""
        return self.num_kv_heads * sum(st.head_dim for st in self.streams.values())


@dataclass(frozen=True)
class CachePlan:
    """What is cached for the whole model; the same data for every lowering."""

    sites: tuple[SitePlan, ...]
    layout: Layout = field(default_factory=Layout)

    def site(self, layer: int) -> SitePlan:
        """Return the plan of `layer`; KeyError if it has no cache."""
        for site in self.sites:
            if site.layer == layer:
                return site
        raise KeyError(layer)

    @property
    def owners(self) -> tuple[SitePlan, ...]:
        """Sites that own storage."""
        return tuple(s for s in self.sites if s.owner == s.layer)

    @property
    def appending(self) -> tuple[SitePlan, ...]:
        """Sites that bring keys and values of their own: owners, and both layers of a pair."""
        return tuple(s for s in self.sites if s.owner == s.layer or s.payload == "pair")

    @property
    def max_step_tokens(self) -> int | None:
        """Most new tokens of one step, or None if there may be any number.

        The lower layer of a pair is read before the upper one has its new keys. So what is merged
        must have been there before the step.
        """
        return min((s.key.regions.recent for s in self.sites if s.payload == "pair"), default=None)

    def replace_site(self, layer: int, **changes: Any) -> CachePlan:
        """Return a plan whose site `layer` has the fields `changes`."""
        sites = tuple(
            dataclasses.replace(s, **changes) if s.layer == layer else s for s in self.sites
        )
        return dataclasses.replace(self, sites=sites)

    @property
    def values_per_token(self) -> int:
        """Cached elements of one token over all owners."""
        return sum(s.values_per_token for s in self.owners)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more encoded token costs in a long sequence, metadata included."""
        return ID_BYTES if self.layout.kind == "checkpoint" else self.stored_bytes_per_token

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes of K and V of one encoded token, metadata included."""
        return sum(
            st.body_bytes_per_token(s.num_kv_heads)
            for s in self.owners
            for st in s.streams.values()
        )

    @property
    def bits_per_value(self) -> float:
        """True bits per cached element of a long sequence, metadata included."""
        return self.bytes_per_token * 8 / self.values_per_token

    def granule(self) -> int:
        """Return the number of tokens that any allocation of the body must be a multiple of."""
        groups = [st.tokens_per_group for s in self.owners for st in s.streams.values()]
        return math.lcm(1, *groups)

    def page_size(self, max_seq_len: int) -> int:
        """Return tokens a page; the contiguous layout is one page that holds `max_seq_len`."""
        if self.layout.kind == "paged":
            return self.layout.page_size
        granule = self.granule()
        return -(-max_seq_len // granule) * granule

    def pages_needed(self, cached_tokens: int, page_size: int) -> int:
        """Return pages of one sequence; every stream uses the same page table."""
        if cached_tokens == 0:
            return 0
        body = max(
            (st.body_tokens(cached_tokens) for s in self.owners for st in s.streams.values()),
            default=0,
        )
        return -(-body // page_size)

    def page_bytes(self, page_size: int) -> int:
        """Return bytes of one page over all layers and heads; 0 if no token lives in a page."""
        if self.layout.kind == "checkpoint":
            return 0
        return sum(
            st.page_bytes(page_size, s.num_kv_heads)
            for s in self.owners
            for st in s.streams.values()
        )

    def exact_bytes_per_sequence(self) -> int:
        """Return bytes of all sink and recent buffers of one sequence."""
        return sum(
            s.num_kv_heads * sum(st.exact_bytes() for st in s.streams.values()) for s in self.owners
        )

    @property
    def has_row_buffers(self) -> bool:
        """Whether a row holds anything beside pages."""
        return self.layout.kind == "checkpoint" or self.exact_bytes_per_sequence() > 0

    def bytes_at(self, lengths: Sequence[int], max_seq_len: int) -> int:
        """Return bytes held by sequences of `lengths` cached tokens, whole pages and buffers.

        Args:
            lengths: Cached tokens of each live sequence.
            max_seq_len: Limit of the session; sets the page of the contiguous layout.
        """
        if self.layout.kind == "checkpoint":
            hot = sum(min(n, self.layout.hot_window) for n in lengths)
            return round(hot * self.stored_bytes_per_token) + ID_BYTES * sum(lengths)
        size = self.page_size(max_seq_len)
        pages = sum(self.pages_needed(n, size) for n in lengths)
        return pages * self.page_bytes(size) + len(lengths) * self.exact_bytes_per_sequence()

    def recomputed_tokens(self, cached_tokens: int) -> int:
        """Return how many of `cached_tokens` a decode step has to compute anew, layer by layer."""
        is_kept = self.layout.kind != "checkpoint"
        return 0 if is_kept else max(0, cached_tokens - self.layout.hot_window)

    def read_bytes_per_step(self, batch_size: int, cached_tokens: int) -> float:
        """Return bytes that one decode step reads for `batch_size` sequences of that length."""
        total = 0.0
        for site in self.sites:  # a site that shares a cache still reads it
            for stream in site.streams.values():
                body = stream.body_tokens(cached_tokens)
                rest = cached_tokens - body
                exact = rest * stream.head_dim * dtype_from_name(stream.regions.dtype).itemsize
                total += body * stream.body_bytes_per_token(site.num_kv_heads)
                total += site.num_kv_heads * exact
        return total * batch_size

    def extra_flops_per_token(self) -> int:
        """Return products and additions spent on online rotations for one new token.

        Inverses that are applied to what is read are not counted; they grow with the cache.
        """
        total = 0
        for site in self.sites:
            own = site.num_kv_heads if site.owner == site.layer else 0
            for name, stream in site.streams.items():
                basis, width = stream.basis, stream.head_dim
                is_undone = basis.inverse is not None
                queries = site.num_q_heads if name == "key" and not is_undone else 0
                if basis.kind == "hadamard" and name == "key":
                    total += (queries + own) * width * int(math.log2(basis.block))
                elif basis.kind == "matrix" and (name == "key" or is_undone):
                    total += (queries + own) * width**2 * basis.heads
        return total

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CachePlan:
        """Build a plan from plain data."""
        return cls(
            sites=tuple(
                SitePlan(
                    **{
                        **s,
                        "key": _stream_from_json(s["key"]),
                        "value": _value_from_json(s["value"]),
                    }
                )
                for s in data["sites"]
            ),
            layout=Layout(**data["layout"]),
        )


def _value_from_json(data: Mapping[str, Any]) -> StreamPlan | KeyView:
    return _stream_from_json(data) if "codec" in data else KeyView(**data)


def _stream_from_json(data: Mapping[str, Any]) -> StreamPlan:
    fields = {
        **data,
        "planes": tuple(PlaneSpec(**p) for p in data["planes"]),
        "basis": Basis(**data["basis"]),
        "regions": Regions(**data["regions"]),
        "read": ReadForm(**data["read"]),
    }
    return StreamPlan(**fields)
