"""Launches the kernels of all sites, for every cache of an executable.

A step of one new token a row is one `decode` per layer. With more, the past is gathered into dense
K and V, which all layers share, and `prefill` attends over these.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.triton.autotune import Bucket
from kvxform.codegen.triton.modules import Configs, SiteModules, unfolded
from kvxform.codegen.triton.rotate import rotate
from kvxform.codegen.triton.sites import kernel_specs, page_tokens
from kvxform.codegen.triton.spec import SiteSpec
from kvxform.codegen.triton.step import KernelStep
from kvxform.codegen.triton.store import SiteStorage
from kvxform.ir.execution import CacheSizes, StepInputs
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring

DENSE_BYTES = 1 << 30  # of dense K and V at a time; larger batches are attended in slices of rows
LEAST_BUCKET = 1024  # tokens; shorter sequences are not told apart when kernels are tuned


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


class Attention:
    """The kernels of all sites of a program.

    Args:
        program: A program with a cache that `capability` has accepted.
        device: Where it runs.
        interpret: Run the twins of the kernels in Triton's interpreter.
    """

    def __init__(self, program: Program, device: torch.device, *, interpret: bool) -> None:
        assert program.plan is not None, "checked by `capability`"
        specs = kernel_specs(program)
        self.page_size = page_tokens(program.plan)
        self._device = device
        weights = program.weights
        self._folded = {
            layer: SiteModules(site, weights, interpret=interpret) for layer, site in specs.items()
        }
        self._unfolded = {
            layer: SiteModules(unfolded(site), weights, interpret=interpret)
            for layer, site in specs.items()
        }
        self._configs = Configs(device)
        self._workspaces: dict[tuple[str, int, int], Any] = {}
        self._dense: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def site_spec(self, layer: int) -> SiteSpec:
        """Return how the cache of `layer` is stored."""
        return self._folded[layer].specs.gather.site

    @property
    def folded_nodes(self) -> frozenset[str]:
        """Names of the rotations in the graph that kernels do."""
        rotations = (
            rotation
            for site in self._folded.values()
            for rotation in (site.specs.key_hadamard, site.specs.query_hadamard)
        )
        return frozenset(rotation.node for rotation in rotations if rotation is not None)

    def modules(self, layer: int, step: KernelStep) -> SiteModules:
        """Return the kernels of `layer` for a step."""
        return (self._folded if step.is_folded else self._unfolded)[layer]

    def end_step(self) -> None:
        """Give back what lives as long as a step."""
        self._dense.clear()

    def append(
        self, modules: SiteModules, storage: SiteStorage, k: Tensor, v: Tensor, step: KernelStep
    ) -> None:
        """Store new tokens k and v `[B, Hk, S, D]`."""
        module = modules.append
        cache = _cache(module, storage)
        options = _buffer_rows(storage, step)
        if modules.key_signs is not None:
            options["signs"] = modules.key_signs

        def run(config: Any) -> None:
            module.append(
                k, v, cache, step.block_table, step.starts, step.counts, **options, config=config
            )

        if storage.rings:  # the second of two equal launches would read what the first has written
            run(module.CONFIGS[0])
        else:
            run(self._configs.find(module, _bucket(storage, step, step.num_new), run))

    def decode(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        q: Tensor,
        step: KernelStep,
        scoring: Scoring,
        sizes: CacheSizes,
    ) -> Tensor:
        """Attend from q `[B, H, D]`, the newest token of each row; returns `[B, H, Dv]`."""
        module, spec = modules.decode, modules.specs.decode
        cache = _cache(module, storage)
        work = self._workspace(module, step.batch_size, sizes.max_seq_len)
        out = q.new_empty(*q.shape[:2], spec.site.value.head_dim)
        options = {**_buffer_rows(storage, step), **_score_options(scoring)}
        if modules.query_signs is not None:
            options["signs"] = modules.query_signs

        def run(config: Any) -> None:
            module.decode(
                q,
                cache,
                step.block_table,
                step.lengths,
                work,
                out,
                scale=scoring.scale,
                **options,
                config=config,
            )

        run(self._configs.find(module, _bucket(storage, step, step.total), run))
        return out

    def prefill(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        q: Tensor,
        step: KernelStep,
        scoring: Scoring,
        staged: Staged | None,
    ) -> Tensor:
        """Attend from new tokens q `[B, H, S, D]`; returns `[B, H, S, Dv]`."""
        rotation = modules.specs.query_hadamard
        if rotation is not None:
            q = rotate(q, rotation.block, modules.query_signs)
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
        options = _score_options(scoring)
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
        run(self._configs.find(module, bucket, run))

    def _gather(
        self, modules: SiteModules, storage: SiteStorage, step: KernelStep
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of the rows of a step, dense and decoded, each `[B, Hk, T, D]`."""
        module, spec = modules.gather, storage.spec
        keys, values = self._dense_tensors(spec, step)
        cache = _cache(module, storage)
        options = _buffer_rows(storage, step)

        def run(config: Any) -> None:
            module.gather(
                cache, step.block_table, step.lengths, keys, values, **options, config=config
            )

        run(self._configs.find(module, _bucket(storage, step, step.total), run))
        return keys, values

    def _dense_tensors(self, spec: SiteSpec, step: KernelStep) -> tuple[Tensor, Tensor]:
        """Return the workspace of dense K and V that sites of one geometry share."""
        common = (step.batch_size, spec.num_kv_heads, step.total)
        key = (*common, spec.key.head_dim, spec.value.head_dim)
        if key not in self._dense:
            dtype = dtype_from_name(spec.dtype)
            keys, values = (
                torch.empty(*common, stream.head_dim, dtype=dtype, device=self._device)
                for stream in (spec.key, spec.value)
            )
            self._dense[key] = keys, values
        return self._dense[key]

    def _rows_at_once(self, spec: SiteSpec, total: int) -> int:
        item = dtype_from_name(spec.dtype).itemsize
        per_row = spec.num_kv_heads * total * (spec.key.head_dim + spec.value.head_dim) * item
        return max(1, DENSE_BYTES // per_row)

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
        positions = start[:, None] + torch.arange(width, device=self._device)
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

    def plan_decode(
        self, inputs: StepInputs, table: Tensor, sizes: CacheSizes, folded: bool
    ) -> None:
        """Do what the host plans for a step of one new token a row, before its launches.

        Args:
            inputs: The step.
            table: Its pages as kernels count them, on the CPU.
            sizes: Of the cache.
            folded: See `KernelStep.is_folded`.
        """
        batch_size, ends = len(inputs.rows), inputs.ends
        for module in self._decode_modules[folded].values():
            if hasattr(module, "prepare"):
                work = self._workspace(module, batch_size, sizes.max_seq_len)
                module.prepare(work, ends, table)

    @functools.cached_property
    def _decode_modules(self) -> tuple[dict[str, ModuleType], dict[str, ModuleType]]:
        """Different decode kernels by name: of rotated q, and of q that the kernel rotates."""
        found = [
            {site.decode.__name__: site.decode for site in sites.values()}
            for sites in (self._unfolded, self._folded)
        ]
        return found[0], found[1]

    def _workspace(self, module: ModuleType, batch_size: int, max_seq_len: int) -> Any:
        """Return the scratch tensors of a decode kernel, which layers share."""
        key = (module.__name__, batch_size, max_seq_len)
        if key not in self._workspaces:
            self._workspaces[key] = module.make_workspace(
                batch_size, max_seq_len, self._num_sms, self._device
            )
        return self._workspaces[key]

    @functools.cached_property
    def _num_sms(self) -> int:
        if self._device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self._device).multi_processor_count


def _cache(module: ModuleType, storage: SiteStorage) -> Any:
    """Return the `Cache` of an emitted module."""
    tensors = storage.tensors
    return module.Cache(**{name: tensors[name] for name in module.Cache._fields})


def _buffer_rows(storage: SiteStorage, step: KernelStep) -> dict[str, Tensor]:
    return {"rows": step.rows} if storage.buffers else {}


def _score_options(scoring: Scoring) -> dict[str, Tensor]:
    options = {"sink_logits": scoring.sink_logits, "alibi_slopes": scoring.alibi_slopes}
    return {name: value for name, value in options.items() if value is not None}


def _bucket(storage: SiteStorage, step: KernelStep, tokens: int) -> Bucket:
    return Bucket.of(step.batch_size, storage.spec.num_kv_heads, max(tokens, LEAST_BUCKET))
