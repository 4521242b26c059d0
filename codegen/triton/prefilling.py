"""Attention of many new tokens: the past is gathered into dense K and V, which all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.triton.autotune import Bucket
from kvxform.codegen.triton.kernels import (
    LEAST_BUCKET,
    Kernels,
    bucket_of,
    buffer_rows,
    cache_of,
    score_options,
)
from kvxform.codegen.triton.modules import SiteModules
from kvxform.codegen.triton.spec import SiteSpec
from kvxform.codegen.triton.step import KernelStep
from kvxform.codegen.triton.store import SiteStorage
from kvxform.ir.scoring import Scoring

DENSE_BYTES = 1 << 30  # of dense K and V at a time; larger batches are attended in slices of rows


@dataclass(frozen=True, eq=False)
class Staged:
    """Exact copies of tokens that a step may overwrite before all its queries have read them.

    Attributes:
        keys: `[B, Hk, n, D]`, or None if keys are encoded at once; likewise `values`.
        start: Position of the first of them, int32 `[B]`; below 0 in short sequences.
    """

    keys: Tensor | None
    values: Tensor | None
    start: Tensor

    def entries(self, first: int, last: int) -> Staged:
        """Return batch entries `first` to `last` - 1 alone."""
        own = slice(first, last)
        keys = None if self.keys is None else self.keys[own]
        values = None if self.values is None else self.values[own]
        return Staged(keys, values, self.start[own])


class Prefilling:
    """Attention of steps with several new tokens a row, for every cache of an executable.

    Args:
        kernels: The kernels.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._dense: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def end_step(self) -> None:
        """Give back the dense K and V of a step."""
        self._dense.clear()

    def stage(self, storage: SiteStorage, k: Tensor, v: Tensor, step: KernelStep) -> Staged:
        """Copy what rings hold and what a step adds, in order of position.

        Args:
            storage: Where the step will append to.
            k: New keys as they are stored, `[B, Hk, S, D]`.
            v: New values.
            step: The step.
        """
        streams = storage.spec.streams
        width = max(stream.capacity for stream in streams.values())
        start = step.starts - width
        positions = start[:, None] + torch.arange(width, device=self._kernels.device)
        copies: list[Tensor | None] = []
        for (name, stream), new in zip(streams.items(), (k, v), strict=True):
            if not stream.capacity:
                copies.append(None)
                continue
            ring = storage.buffers[f"{name}_recent"]
            slots = (positions - stream.sink) % stream.capacity  # [B, width]
            old = ring[step.rows.long()[:, None], :, slots.long()].transpose(1, 2)
            exact = torch.cat([old, new.to(ring.dtype)], 2)  # [B, Hk, width + S, D]
            copies.append(exact.to(new.dtype))
        return Staged(copies[0], copies[1], start)

    def attend(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        q: Tensor,
        step: KernelStep,
        scoring: Scoring,
        staged: Staged | None,
    ) -> Tensor:
        """Attend from new tokens q `[B, H, S, D]`; returns `[B, H, S, Dv]`."""
        out = q.new_empty(*q.shape[:3], modules.specs.prefill.value_dim)
        width = self._rows_at_once(storage.spec, step.total)
        for first in range(0, step.batch_size, width):
            last = min(first + width, step.batch_size)
            part = step if last - first == step.batch_size else step.entries(first, last)
            copies = None if staged is None else staged.entries(first, last)
            keys, values = self._gather(modules, storage, part)
            self._prefill_rows(
                modules, (q[first:last], keys, values, out[first:last]), part, scoring, copies
            )
        return out

    def _prefill_rows(
        self,
        modules: SiteModules,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        step: KernelStep,
        scoring: Scoring,
        staged: Staged | None,
    ) -> None:
        """Launch `prefill` on q, dense keys and values, and the output, of some rows."""
        q, keys, values, out = tensors
        module = modules.prefill
        options = score_options(scoring)
        if modules.query_signs is not None:
            options["signs"] = modules.query_signs
        if staged is not None:
            options["exact_start"] = staged.start
            if staged.keys is not None:
                options["exact_keys"] = staged.keys
            if staged.values is not None:
                options["exact_values"] = staged.values

        def run(config: Any) -> None:
            module.prefill(
                q,
                keys,
                values,
                step.starts,
                step.counts,
                out,
                scale=scoring.scale,
                **options,
                config=config,
            )

        heads = modules.specs.prefill.num_kv_heads
        bucket = Bucket.of(step.batch_size, heads, max(step.total, LEAST_BUCKET))
        run(self._kernels.configs.find(module, bucket, run))

    def _gather(
        self, modules: SiteModules, storage: SiteStorage, step: KernelStep
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of the rows of a step, dense and decoded, each `[B, Hk, T, D]`."""
        module, spec = modules.gather, storage.spec
        keys, values = self._dense_tensors(spec, step)
        cache = cache_of(module, storage)
        options = buffer_rows(storage, step)

        def run(config: Any) -> None:
            module.gather(
                cache, step.block_table, step.lengths, keys, values, **options, config=config
            )

        run(self._kernels.configs.find(module, bucket_of(storage, step, step.total), run))
        return keys, values

    def _dense_tensors(self, spec: SiteSpec, step: KernelStep) -> tuple[Tensor, Tensor]:
        """Return the workspace of dense K and V that sites of one geometry share."""
        common = (step.batch_size, spec.num_kv_heads, step.total)
        key = (*common, spec.key.head_dim, spec.value.head_dim)
        if key not in self._dense:
            dtype = dtype_from_name(spec.dtype)
            keys, values = (
                torch.empty(*common, stream.head_dim, dtype=dtype, device=self._kernels.device)
                for stream in (spec.key, spec.value)
            )
            self._dense[key] = keys, values
        return self._dense[key]

    def _rows_at_once(self, spec: SiteSpec, total: int) -> int:
        item = dtype_from_name(spec.dtype).itemsize
        per_row = spec.num_kv_heads * total * (spec.key.head_dim + spec.value.head_dim) * item
        return max(1, DENSE_BYTES // per_row)
