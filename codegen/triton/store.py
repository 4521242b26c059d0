"""Storage of K and V of one owner layer, as tensors under the names that kernels know.

Pools are page-first, then HND within a page: `[num_pages, Hk, rows_per_page, width]`, or one pool
of words in fragment order. Exact tokens are in buffers of one row per sequence: the sink by
position, the others in a ring, position p in slot `(p - sink) % capacity`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.spec import SiteSpec, StreamSpec
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import KeyView, StreamPlan

KEY, VALUE = "key_", "value_"  # how names of tensors begin


class SiteStorage:
    """K and V of one owner layer, for all rows of a session; the same tensors if V is a view of K.

    Args:
        plan: What to store.
        spec: The same as kernels see it.
        num_pages: Pages of the pool, the null page included.
        num_rows: Rows of the session.
        device: Where tensors live.

    Attributes:
        pools: Tensors of pages by name.
        buffers: Tensors of exact tokens by name, one row per sequence.
    """

    def __init__(
        self,
        plan: SitePlan,
        spec: SiteSpec,
        *,
        num_pages: int,
        num_rows: int,
        device: torch.device,
    ) -> None:
        self._plan, self.spec = plan, spec
        self._is_view = isinstance(plan.value, KeyView)
        self.pools = {
            name: torch.zeros(num_pages, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _pool_shapes(spec).items()
            if not (self._is_view and name.startswith(VALUE))
        }
        self.buffers = {
            name: torch.zeros(num_rows, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _buffer_shapes(spec).items()
            if not (self._is_view and name.startswith(VALUE))
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names of the kernels' `Cache`."""
        own = {**self.pools, **self.buffers}
        if not self._is_view:
            return own
        return {**own, **{VALUE + name.removeprefix(KEY): x for name, x in own.items()}}

    @property
    def rings(self) -> dict[str, Tensor]:
        """The buffers that a step overwrites, `[num_rows, Hk, capacity, D]`."""
        return {name: x for name, x in self.buffers.items() if name.endswith("_recent")}

    def stored(
        self, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row, un-paged and decoded, each `[Hk, length, D]`."""
        planes = self._planes(list(pages))
        found = [
            self._stored_stream(name, stream, row, length, planes[name], dtype)
            for name, stream in self._plan.streams.items()
        ]
        return found[0], found[-1]

    def planes_of(self, length: int, pages: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """Return the planes of encoded tokens by stream, each `[heads, rows, width]`."""
        planes, found = self._planes(list(pages)), {}
        for name, stream in self._plan.streams.items():
            body = stream.body_tokens(length)
            found[name] = _cut(self.spec.streams[name], planes[name], body) if body else {}
        return found

    def _planes(self, pages: list[int]) -> dict[str, dict[str, Tensor]]:
        """Return the planes of K and V in these pages, each `[n, Hk, rows_per_page, width]`."""
        if self.spec.layout == "fragment":
            return fragment.to_planes(self.spec, self.pools["pool"][pages])
        return {
            name: {p.name: self.pools[f"{name}_{p.name}"][pages] for p in stream.planes}
            for name, stream in self._plan.streams.items()
        }

    def _stored_stream(
        self,
        name: str,
        stream: StreamPlan,
        row: int,
        length: int,
        planes: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        spec = self.spec.streams[name]
        body = stream.body_tokens(length)
        parts = []
        if spec.sink:
            parts.append(self.buffers[f"{name}_sink"][row, :, :length].to(dtype))
        if body:
            parts.append(make_codec(stream.codec).decode(_cut(spec, planes, body), dtype))
        if spec.capacity:
            first, ring = min(spec.sink, length) + body, self.buffers[f"{name}_recent"][row]
            slots = (torch.arange(first, length, device=ring.device) - spec.sink) % spec.capacity
            parts.append(ring[:, slots].to(dtype))
        empty = (self.spec.num_kv_heads, 0, spec.head_dim)
        first_pool = next(iter(self.pools.values()))
        return torch.cat(parts, 1) if parts else first_pool.new_zeros(empty, dtype=dtype)

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held, so that nothing reaches their next users."""
        for pool in self.pools.values():
            pool[list(pages)] = 0
        for buffer in self.buffers.values():
            buffer[list(rows)] = 0

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        for pool in self.pools.values():
            pool[list(new)] = pool[list(old)]

    def read_rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return copies of the buffers of `rows`."""
        return {name: buffer[list(rows)] for name, buffer in self.buffers.items()}

    def write_rows(self, rows: Sequence[int], copies: dict[str, Tensor]) -> None:
        """Set buffers of `rows` to what `read_rows` returned."""
        for name, copy in copies.items():
            self.buffers[name][list(rows)] = copy

    def copy_from(self, other: SiteStorage, pages: Tensor, other_pages: Tensor) -> None:
        """Take over what `other` holds, a storage of the same spec and of no more rows.

        Args:
            other: The other storage.
            pages: Pages to write, `[n]`.
            other_pages: The pages of `other` that they become copies of, `[n]`.
        """
        for name, pool in self.pools.items():
            pool[pages] = other.pools[name][other_pages]
        for name, buffer in other.buffers.items():
            self.buffers[name][: buffer.shape[0]] = buffer

    def page_bytes(self) -> int:
        """Return bytes of one page of the real pool tensors."""
        return sum(pool[0].nbytes for pool in self.pools.values())

    def row_bytes(self) -> int:
        """Return bytes of the real buffers of one row."""
        return sum(buffer[0].nbytes for buffer in self.buffers.values())


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _pool_shapes(spec: SiteSpec) -> Shapes:
    """Return shape, without the axis of pages, and dtype of every pool."""
    if spec.layout == "fragment":
        return {"pool": ((spec.num_kv_heads, fragment.chunk_words(spec)), torch.int32)}
    return {
        f"{name}_{p.name}": (
            (p.heads(spec.num_kv_heads), spec.page_size // p.tokens_per_row, p.width),
            p.torch_dtype,
        )
        for name, stream in spec.streams.items()
        for p in stream.planes
    }


def _buffer_shapes(spec: SiteSpec) -> Shapes:
    """Return shape, without the axis of rows, and dtype of every buffer that exists."""
    return {
        f"{name}_{part}": (
            (spec.num_kv_heads, tokens, stream.head_dim),
            dtype_from_name(stream.exact_dtype),
        )
        for name, stream in spec.streams.items()
        for part, tokens in (("sink", stream.sink), ("recent", stream.capacity))
        if tokens
    }


def _cut(spec: StreamSpec, planes: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Return the first `tokens` tokens of planes `[n, Hk, rows, width]` as `[Hk, rows, width]`."""
    found = {}
    for p in spec.planes:
        rows = planes[p.name].transpose(0, 1).flatten(1, 2)  # [n, Hk, r, w] -> [Hk, n * r, w]
        found[p.name] = rows[:, : -(-tokens // p.tokens_per_row)]
    return found
