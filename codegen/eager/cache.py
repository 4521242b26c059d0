"""PagedCache: the live cache behind the cached ops, for any CachePlan that this lowering runs.

Rule of every lowering: the query at position t sees the cache as it stands once token t has been
appended. So a prompt in one piece, in chunks, and token by token give the same result.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.codecs.base import CODECS
from kvxform.codegen.eager.attend import attend_step
from kvxform.codegen.eager.flush import FlushRule
from kvxform.codegen.eager.pairs import PairStore
from kvxform.codegen.eager.reads import StreamRead
from kvxform.codegen.eager.site import SiteStore
from kvxform.codegen.eager.step import Step
from kvxform.codegen.eager.store import Appended
from kvxform.errors import CodegenError
from kvxform.ir.cache import make_handle
from kvxform.ir.execution import CacheSizes
from kvxform.ir.plan import CachePlan
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import KeyView, StreamPlan

PAYLOADS = ("kv", "k", "latent", "residual", "pair")


class PagedCache:
    """Storage of all layers; implements `kvxform.ir.cache.CacheState`.

    The caller owns the page table: it makes a `Step`, runs the graph between `begin` and `commit`,
    and calls `abort` if the graph failed. Layers that share a cache read that of their owner.

    Args:
        plan: What is cached.
        num_pages: Pages of the pool; page 0 is the null page, never written.
        page_size: Tokens a page.
        num_rows: Sequences held at most.
        device: Where tensors live.
    """

    def __init__(
        self,
        plan: CachePlan,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        check_plan(plan, page_size)
        self.plan, self.page_size = plan, page_size
        self.device = torch.device(device)
        self._owner = {site.layer: site.owner for site in plan.sites}
        self._readers = Counter(self._owner.values())
        self._views = {
            s.layer: s.value.head_dim
            for s in plan.sites
            if isinstance(s.value, KeyView) and s.payload != "pair"
        }
        self._stores = {
            site.layer: SiteStore(
                site,
                num_pages=num_pages,
                page_size=page_size,
                num_rows=num_rows,
                device=self.device,
            )
            for site in plan.owners
        }
        self._pairs = {
            s.layer: PairStore(self._stores[s.layer], s) for s in plan.owners if s.payload == "pair"
        }
        self._step: Step | None = None
        self._appended: dict[int, tuple[Appended, ...]] = {}
        self._waiting: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._reads: dict[int, tuple[int, tuple[StreamRead, StreamRead]]] = {}

    @functools.cached_property
    def handle(self) -> Tensor:
        """The value of the graph's `cache` input."""
        return make_handle(self)

    def begin(self, step: Step) -> None:
        """Start a step; pages for its tokens must be in its block table."""
        self.abort()
        self._step = step

    def commit(self) -> None:
        """End a step that went well."""
        assert self._step is not None, "begin comes first"
        for store in self._stores.values():
            store.commit(self._step)
        self.abort()

    def abort(self) -> None:
        """Forget the step; the cache is as it was before `begin`."""
        self._step = None
        self._appended.clear()
        self._waiting.clear()
        self._reads.clear()
        for store in self._stores.values():
            store.abort()

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Store the new tokens of one layer; k and v are `[B, Hk, S, D]`, padded on the right."""
        step, owner = self._current(layer), self._owner[layer]
        if owner in self._pairs:
            assert v is not None, "both layers of a pair have values"
            self._appended[owner] = self._pairs[owner].append(layer == owner, k, v, step)
        elif self._stores[layer].needs_queries:  # which come with the attention of this layer
            self._waiting[layer] = (k, v)
        else:
            self._appended[layer] = self._stores[layer].append(k, v, step)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """Attend from q `[B, H, S, D]` to the cache of the layer's owner; `[B, H, S, Dv]`.

        Masks follow the slots of the step. While positions are dense, these are `positions`.
        """
        step = self._current(layer)
        if layer in self._waiting:
            k, v = self._waiting.pop(layer)
            store = self._stores[layer]
            self._appended[layer] = store.append_ranked(k, v, step, q, scoring.scale)
        key, value = self._read(layer, step, q.dtype, scoring)
        out = attend_step(q, key, value, step, scoring)
        view = self._views.get(layer)  # weights times all of K; the value is the first channels
        return out if view is None else out[..., :view]

    def _read(
        self, layer: int, step: Step, dtype: torch.dtype, scoring: Scoring
    ) -> tuple[StreamRead, StreamRead]:
        """Return K and V of the owner, decoded once per step for all layers that read them."""
        owner = self._owner[layer]
        if owner in self._pairs:
            return self._pairs[owner].read(
                self.plan.site(layer), step, self._appended[owner], dtype
            )
        if owner in self._reads:
            left, reads = self._reads.pop(owner)
        else:
            left, appended = self._readers[owner], self._appended.pop(owner)
            key, value = self._stores[owner].read(step, appended, dtype)
            reads = _as_used(key, value, scoring, step, dtype)
        if left > 1:
            self._reads[owner] = (left - 1, reads)
        return reads

    def stored(
        self, layer: int, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row in the stored basis, un-paged and decoded; V may be all of K.

        Each is `[Hk, length, D]`.
        """
        owner = self._owner[layer]
        k, v = self._stores[owner].stored(row, length, pages, dtype)
        if owner in self._pairs:
            key, value = self.plan.site(layer).pair_channels
            return k[..., key], k[..., value]
        return k, v

    def planes(
        self, layer: int, row: int, length: int, pages: Sequence[int]
    ) -> dict[str, dict[str, Tensor]]:
        """Return what is stored of the encoded tokens of one row; see `LiveCache.planes`."""
        return self._stores[self._owner[layer]].planes(row, length, pages)

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held."""
        for store in self._stores.values():
            store.clear(rows, pages)

    def crop(self, row: int, length: int) -> None:
        """Do nothing: tokens live in pages, and buffers only where nothing can be cropped."""

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        for store in self._stores.values():
            store.copy_pages(old, new)

    def move_rows(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Let the buffers of each of `rows` become what those of its source were before."""
        found = {layer: store.read_rows(sources) for layer, store in self._stores.items()}
        for layer, buffers in found.items():
            self._stores[layer].write_rows(rows, buffers)

    def copy(self, sizes: CacheSizes) -> PagedCache:
        """Return another cache of the same or larger sizes that holds the same."""
        cache = PagedCache(
            self.plan,
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            num_rows=sizes.num_rows,
            device=self.device,
        )
        for layer, store in self._stores.items():
            cache._stores[layer].copy_from(store)
        return cache

    def bytes_held(self, num_pages: int, num_rows: int) -> int:
        """Return bytes of real storage behind so many pages and rows."""
        per_page = sum(store.page_bytes() for store in self._stores.values())
        per_row = sum(store.row_bytes() for store in self._stores.values())
        return num_pages * per_page + num_rows * per_row

    def _current(self, layer: int) -> Step:
        if self._step is None:
            raise CodegenError(
                "KVX401", "cached ops run inside a step of a session", where="eager", at=str(layer)
            )
        return self._step


def _as_used(
    key: StreamRead, value: StreamRead, scoring: Scoring, step: Step, dtype: torch.dtype
) -> tuple[StreamRead, StreamRead]:
    """Return K and V as attention uses them: in their own basis, and keys after RoPE."""
    read = scoring.key_read
    if read is not None:
        table = step.rotary_table(read, dtype)
        key = key.turned(lambda stored, first: read.apply(stored, first, table))
    if scoring.value_basis is not None:
        value = value.turned(lambda stored, _: scoring.read_values(stored))
    return key, value


def check_plan(plan: CachePlan, page_size: int) -> None:
    """Refuse what this lowering cannot run.

    Raises:
        CodegenError: KVX401 with the layer and the nearest plan that is supported.
    """
    for site in plan.sites:
        if site.payload not in PAYLOADS:
            rule = f"payload must be {' or '.join(PAYLOADS)}"
            _refuse(rule, site.payload, site.layer, "cache K and V")
        for stream in site.streams.values():
            _check_stream(stream, site.layer, page_size)


def _check_stream(stream: StreamPlan, layer: int, page_size: int) -> None:
    group, codec = stream.tokens_per_group, CODECS.get(stream.codec["codec"])
    if stream.read.form == "folded" and stream.is_turned_at_read:
        _refuse("what is turned when it is read must be decoded", "folded", layer, "")
    if stream.read.form == "folded" and not (codec is not None and codec.is_affine):
        _refuse("only affine codecs can be read folded", stream.codec["codec"], layer, "")
    rows = max((p.tokens_per_row for p in stream.planes), default=1)
    if page_size % group or page_size % rows:
        _refuse(
            f"a page must hold whole groups of {max(group, rows)} tokens",
            page_size,
            layer,
            f"use page_size: {-(-page_size // group) * group}",
        )
    if FlushRule.of(stream).chunk % group:
        _refuse(
            f"a block flush must be a multiple of the codec's group of {group} tokens",
            stream.regions.recent,
            layer,
            f"use recent: {-(-stream.regions.recent // group) * group}",
        )


def _refuse(rule: str, got: object, layer: int, hint: str) -> None:
    raise CodegenError("KVX401", rule, where="eager", got=got, at=f"layer {layer}", hint=hint)
