"""TritonCache: the live cache behind the cached ops, read and written by generated kernels.

Rule of every lowering: the query at position t sees the cache as it stands once token t has been
appended. So a prompt in one piece, in chunks, and token by token give the same result.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvxform.codegen.triton.decoding import Decoding
from kvxform.codegen.triton.kernels import Kernels
from kvxform.codegen.triton.modules import SiteModules
from kvxform.codegen.triton.prefilling import Prefilling, Staged
from kvxform.codegen.triton.rotate import rotate
from kvxform.codegen.triton.step import KernelStep
from kvxform.codegen.triton.store import SiteStorage
from kvxform.errors import CodegenError
from kvxform.ir.cache import make_handle
from kvxform.ir.execution import CacheSizes
from kvxform.ir.plan import CachePlan
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import KeyView


@dataclass(frozen=True, eq=False)
class Launchers:
    """What runs the kernels of a program.

    Attributes:
        kernels: The kernels.
        decoding: Attention of one new token a row.
        prefilling: Attention of more.
    """

    kernels: Kernels
    decoding: Decoding
    prefilling: Prefilling

    @classmethod
    def of(cls, kernels: Kernels) -> Launchers:
        """Return what runs `kernels`."""
        return cls(kernels, Decoding(kernels), Prefilling(kernels))


class TritonCache:
    """Storage of all layers; implements `CacheState` and `LiveCache`.

    The executable makes a `KernelStep`, runs the graph between `begin` and `commit`, and the owner
    of the cache calls `abort` if the graph failed. Layers that share a cache read their owner's.

    Args:
        plan: What is cached.
        launchers: What runs the kernels; shared by all caches of an executable.
        sizes: How much to hold.
        device: Where tensors live.
    """

    def __init__(
        self, plan: CachePlan, launchers: Launchers, sizes: CacheSizes, device: torch.device
    ) -> None:
        self.plan, self.sizes, self.device = plan, sizes, device
        self._launchers, self._kernels = launchers, launchers.kernels
        self._owner = {site.layer: site.owner for site in plan.sites}
        self._readers = Counter(self._owner.values())
        self._kernel_page = self._kernels.page_size
        self._split = -(-sizes.page_size // self._kernel_page)
        self.storages = {
            site.layer: SiteStorage(
                site,
                self._kernels.site_spec(site.layer),
                num_pages=1 + (sizes.num_pages - 1) * self._split,
                num_rows=sizes.num_rows,
                device=device,
            )
            for site in plan.owners
        }
        self.recordings: dict[tuple[int, int], Any] = {}  # decode steps by shape; see `graphs`
        # Memory that its recordings share, for they run one at a time. It is gone with the last of
        # them, so another cache must not record into it.
        self.graph_pool: Any = None
        self._step: KernelStep | None = None
        self._staged: dict[int, Staged] = {}
        self._left: dict[int, int] = {}
        self._overwritten: dict[int, dict[str, Tensor]] = {}

    @functools.cached_property
    def handle(self) -> Tensor:
        """The value of the graph's `cache` input."""
        return make_handle(self)

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence, as kernels count them."""
        return max(1, -(-self.sizes.max_seq_len // self.sizes.page_size) * self._split)

    def kernel_table(self, block_table: Tensor) -> Tensor:
        """Return a block table of session pages as one of kernel pages, at least one column.

        A session page of a contiguous cache is several pages of the kernels, side by side.
        """
        table = block_table
        if self._split > 1:
            inside = torch.arange(self._split, dtype=torch.int32)
            pages = (table[:, :, None] - 1) * self._split + 1 + inside
            table = torch.where(table[:, :, None] > 0, pages, 0).flatten(1)
        return table if table.shape[1] else table.new_zeros(table.shape[0], 1)

    def begin(self, step: KernelStep) -> None:
        """Start a step; pages for its tokens must be in its block table."""
        self.abort()
        self._step = step

    def commit(self) -> None:
        """End a step that went well."""
        assert self._step is not None, "begin comes first"
        self._forget()

    def abort(self) -> None:
        """Forget the step; the cache is as it was before `begin`.

        Pages and sinks were written past the committed length, where nobody looks; what rings held
        is put back.
        """
        if self._step is not None and self._step.host is not None:
            for layer, copies in self._overwritten.items():
                self.storages[layer].write_rows(self._step.host.rows, copies)
        self._forget()

    def _forget(self) -> None:
        self._step = None
        for held in (self._staged, self._left, self._overwritten):
            held.clear()
        self._launchers.prefilling.end_step()

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Store the new tokens of one layer; k and v are `[B, Hk, S, D]`, padded on the right."""
        step, storage = self._current(layer), self.storages[layer]
        v = k if v is None else v  # a view of the keys
        modules = self._kernels.sites(step.is_folded)[layer]
        if storage.rings and step.host is not None:
            self._overwritten[layer] = storage.read_rows(step.host.rows)
        if storage.rings and step.num_new > 1:
            keys = _as_stored(k, modules)
            self._staged[layer] = self._launchers.prefilling.stage(storage, keys, v, step)
        self._kernels.append(modules, storage, k, v, step)
        self._left[layer] = self._readers[layer]

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """Attend from q `[B, H, S, D]` to the cache of the layer's owner; `[B, H, S, Dv]`.

        Masks follow the slots of the step. While positions are dense, these are `positions`.
        """
        step, owner = self._current(layer), self._owner[layer]
        modules, storage = self._kernels.sites(step.is_folded)[layer], self.storages[owner]
        if step.num_new == 1:
            decoding = self._launchers.decoding
            out = decoding.attend(modules, storage, q[:, :, 0], step, scoring, self.sizes)
            return self._values(owner, out[:, :, None])
        out = self._launchers.prefilling.attend(
            modules, storage, q, step, scoring, self._staged.get(owner)
        )
        self._left[owner] -= 1
        if not self._left[owner]:
            self._staged.pop(owner, None)
        return self._values(owner, out)

    def _values(self, owner: int, out: Tensor) -> Tensor:
        """Return the channels of outputs that are values, where these are a view of the keys."""
        value = self.plan.site(owner).value
        return out[..., : value.head_dim] if isinstance(value, KeyView) else out

    def stored(
        self, layer: int, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row, un-paged and decoded, each `[Hk, length, D]`."""
        storage = self.storages[self._owner[layer]]
        return storage.stored(row, length, self._kernel_pages(pages), dtype)

    def planes(
        self, layer: int, row: int, length: int, pages: Sequence[int]
    ) -> dict[str, dict[str, Tensor]]:
        """Return what is stored of the encoded tokens of one row; see `LiveCache.planes`."""
        return self.storages[self._owner[layer]].planes_of(length, self._kernel_pages(pages))

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held."""
        own = self._kernel_pages(pages)
        for storage in self.storages.values():
            storage.clear(rows, own)

    def crop(self, row: int, length: int) -> None:
        """Do nothing: tokens live in pages, and buffers only where nothing can be cropped."""

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        sources, targets = self._kernel_pages(old), self._kernel_pages(new)
        for storage in self.storages.values():
            storage.copy_pages(sources, targets)

    def move_rows(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Let the buffers of each of `rows` become what those of its source were before."""
        for storage in self.storages.values():
            storage.write_rows(rows, storage.read_rows(sources))

    def copy(self, sizes: CacheSizes) -> TritonCache:
        """Return another cache of the same or larger sizes that holds the same."""
        cache = TritonCache(self.plan, self._launchers, sizes, self.device)
        pages = torch.arange(self.sizes.num_pages - 1, device=self.device)[:, None]
        inside = torch.arange(self._split, device=self.device)
        own = (1 + pages * self._split + inside).flatten()
        new = (1 + pages * cache._split + inside).flatten()
        for layer, storage in self.storages.items():
            cache.storages[layer].copy_from(storage, new, own)
        return cache

    def bytes_held(self, num_pages: int, num_rows: int) -> int:
        """Return bytes of real storage behind so many pages and rows.

        A page of a contiguous cache counts as long as the session's sequences can be, without
        what rounds it up to whole pages of the kernels.
        """
        per_kernel_page = sum(storage.page_bytes() for storage in self.storages.values())
        per_page = per_kernel_page * self.sizes.page_size // self._kernel_page
        per_row = sum(storage.row_bytes() for storage in self.storages.values())
        return num_pages * per_page + num_rows * per_row

    def _kernel_pages(self, pages: Sequence[int]) -> list[int]:
        first = [(page - 1) * self._split + 1 for page in pages]
        return [page + i for page in first for i in range(self._split)]

    def _current(self, layer: int) -> KernelStep:
        if self._step is None:
            raise CodegenError(
                "KVX401", "cached ops run inside a step of a session", where="triton", at=str(layer)
            )
        return self._step


def _as_stored(k: Tensor, modules: SiteModules) -> Tensor:
    """Return new keys as the append kernel stores them: it may be what rotates them."""
    rotation = modules.specs.key_hadamard
    return k if rotation is None else rotate(k, rotation.block, modules.key_signs)
