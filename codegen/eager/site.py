"""Storage of K and V of one owner layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.codecs.base import make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.eager.flush import FlushRule
from kvxform.codegen.eager.probes import probe_scores
from kvxform.codegen.eager.reads import StreamRead
from kvxform.codegen.eager.step import Step
from kvxform.codegen.eager.store import Appended, StreamStore
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan


class SiteStore:
    """K and V of one owner layer, in one store of 2 Hk heads where both are kept alike, by heads.

    One store means half the work in every step; heads of K come first, then those of V. Where
    values are a view of the keys, only K is stored.

    Args:
        site: What to store.
        num_pages: Pages of the pool, the null page included.
        page_size: Tokens a page.
        num_rows: Rows of the session.
        device: Where tensors live.
    """

    def __init__(
        self,
        site: SitePlan,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        device: torch.device,
    ) -> None:
        self._site, self._page_size, self._device = site, page_size, device
        streams = list(site.streams.values())
        self._ranking = _ranking(streams)
        self.is_joint = len(streams) == 2 and _are_alike(*streams) and self._ranking is None
        self._stores = tuple(
            StreamStore(
                stream,
                site.num_kv_heads * (2 if self.is_joint else 1),
                num_pages=num_pages,
                page_size=page_size,
                num_rows=num_rows,
                device=device,
            )
            for stream in (streams[:1] if self.is_joint else streams)
        )

    @property
    def needs_queries(self) -> bool:
        """Whether an append has to wait for the queries of its tokens, which rank them."""
        return self._ranking is not None

    def append(self, k: Tensor, v: Tensor | None, step: Step) -> tuple[Appended, ...]:
        """Store new tokens `[B, Hk, S, D]`; see `StreamStore.append`."""
        given = [k] if v is None else [k, v]
        new = [torch.cat(given, 1)] if self.is_joint else given
        return tuple(store.append(x, step) for store, x in zip(self._stores, new, strict=True))

    def append_ranked(
        self, k: Tensor, v: Tensor | None, step: Step, q: Tensor, scale: float
    ) -> tuple[Appended, ...]:
        """Store new tokens with their queries `[B, H, S, D]`; K and V are ranked alike.

        Attention follows from exact keys, so that K and V have the same tokens at hand.
        """
        assert self._ranking is not None, "asked of sites that need queries"
        store = self._stores[0]
        stage, rule_step = store.stage(k, step), step.rule(store.rule)
        attention = probe_scores(self._ranking, rule_step, stage, q, scale)
        given = [k] if v is None else [k, v]
        return tuple(
            store.append(x, step, attention) for store, x in zip(self._stores, given, strict=True)
        )

    def read(
        self, step: Step, appended: tuple[Appended, ...], dtype: torch.dtype
    ) -> tuple[StreamRead, StreamRead]:
        """Return K and V as the queries of `step` see them; V is all of K where it is a view."""
        reads = [
            store.read(step, new, dtype) for store, new in zip(self._stores, appended, strict=True)
        ]
        if not self.is_joint:
            return reads[0], reads[-1]
        heads = self._site.num_kv_heads
        return reads[0].heads(0, heads), reads[0].heads(heads, 2 * heads)

    def stored(
        self, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row, un-paged and decoded, each `[Hk, length, D]`."""
        step = self._step_of(row, length, pages)
        found = [store.stored(step, row, length, dtype) for store in self._stores]
        if self.is_joint:
            found = list(found[0].chunk(2))
        return found[0], found[-1]

    def planes(self, row: int, length: int, pages: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """Return the planes of one row by stream, each `[heads, rows, width]`."""
        step = self._step_of(row, length, pages)
        found = [store.planes(step, length) for store in self._stores]
        if self.is_joint:
            pairs = {name: plane.chunk(2) for name, plane in found[0].items()}
            found = [{name: halves[i] for name, halves in pairs.items()} for i in range(2)]
        return dict(zip(self._site.streams, found, strict=True))

    def _step_of(self, row: int, length: int, pages: Sequence[int]) -> Step:
        table = torch.tensor([list(pages)], dtype=torch.int32)
        return Step([row], [length - 1], [1], table, self._page_size, self._device)

    def commit(self, step: Step) -> None:
        """Let a finished step take effect."""
        for store in self._stores:
            store.commit(step)

    def abort(self) -> None:
        """Forget a step that failed."""
        for store in self._stores:
            store.abort()

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held."""
        for store in self._stores:
            store.clear(rows, pages)

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        for store in self._stores:
            store.copy_pages(old, new)

    def read_rows(self, rows: Sequence[int]) -> list[list[Tensor]]:
        """Return copies of all buffers of `rows`."""
        return [store.read_rows(rows) for store in self._stores]

    def write_rows(self, rows: Sequence[int], buffers: list[list[Tensor]]) -> None:
        """Set the buffers of `rows` to what `read_rows` returned."""
        for store, own in zip(self._stores, buffers, strict=True):
            store.write_rows(rows, own)

    def copy_from(self, other: SiteStore) -> None:
        """Take over what `other` holds; see `StreamStore.copy_from`."""
        for store, old in zip(self._stores, other._stores, strict=True):
            store.copy_from(old)

    def page_bytes(self) -> int:
        """Return bytes of one page of the real pool tensors."""
        return sum(store.page_bytes() for store in self._stores)

    def row_bytes(self) -> int:
        """Return bytes of the real sink and recent buffers of one row."""
        return sum(store.row_bytes() for store in self._stores)


def _ranking(streams: Sequence[StreamPlan]) -> SaliencyCodec | None:
    """Return the codec that ranks tokens of all streams by queries, if one does."""
    codec = make_codec(streams[0].codec)
    return codec if isinstance(codec, SaliencyCodec) and codec.needs_queries else None


def _are_alike(key: StreamPlan, value: StreamPlan) -> bool:
    return _as_stored(key) == _as_stored(value) and make_codec(key.codec).is_headwise


def _as_stored(stream: StreamPlan) -> tuple[object, ...]:
    """Return what decides how a stream is kept; rotations and RoPE lie outside the store."""
    rule = FlushRule.of(stream)
    dtype = stream.regions.dtype if rule.sink or rule.capacity else ""
    return (
        dict(stream.codec),
        stream.planes,
        stream.tokens_per_group,
        stream.head_dim,
        stream.read,
        dataclasses.astuple(rule),
        dtype,
    )
