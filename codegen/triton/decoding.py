"""Attention of one new token a row: one launch a layer, planned by the host before the step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.triton.kernels import (
    Kernels,
    bucket_of,
    buffer_rows,
    cache_of,
    score_options,
)
from kvxform.codegen.triton.modules import SiteModules
from kvxform.codegen.triton.step import KernelStep
from kvxform.codegen.triton.store import SiteStorage
from kvxform.ir.execution import CacheSizes, StepInputs
from kvxform.ir.scoring import Scoring


class Decoding:
    """Attention of steps with one new token a row, for every cache of an executable.

    Args:
        kernels: The kernels.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._workspaces: dict[tuple[str, int, int], Any] = {}
        self._configs: dict[str, Any] = {}  # of the step that runs, by kernel

    def plan(
        self,
        step: KernelStep,
        inputs: StepInputs,
        table: Tensor,
        storages: Mapping[int, SiteStorage],
        sizes: CacheSizes,
    ) -> None:
        """Choose launch parameters, and do what the host plans for a step, before its launches.

        Args:
            step: The step.
            inputs: The same as the host knows it.
            table: Its pages as kernels count them, on the CPU.
            storages: What is cached, by owner.
            sizes: Of the cache.
        """
        for modules in self._planned[step.is_folded]:
            module, storage = modules.decode, storages[modules.specs.owner]
            work = self._workspace(module, step.batch_size, sizes.max_seq_len)
            prepare = None
            if hasattr(module, "prepare"):
                prepare = functools.partial(_prepare, module, work, inputs.ends, table)
            run = functools.partial(self._try, modules, storage, step, sizes)
            bucket = bucket_of(storage, step, step.total)
            config = self._kernels.configs.find(module, bucket, run, prepare)
            self._configs[module.__name__] = config
            if prepare is not None:
                prepare(config)

    def attend(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        q: Tensor,
        step: KernelStep,
        scoring: Scoring,
        sizes: CacheSizes,
    ) -> Tensor:
        """Attend from q `[B, H, D]`, the newest token of each row; returns `[B, H, Dv]`.

        `plan` comes first.
        """
        config = self._configs[modules.decode.__name__]
        return self._launch(modules, storage, q, step, scoring, sizes, config)

    def _launch(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        q: Tensor,
        step: KernelStep,
        scoring: Scoring,
        sizes: CacheSizes,
        config: Any,
    ) -> Tensor:
        module = modules.decode
        options = {**buffer_rows(storage, step), **score_options(scoring)}
        if modules.query_signs is not None:
            options["signs"] = modules.query_signs
        out = q.new_empty(*q.shape[:2], storage.spec.value.head_dim)
        module.decode(
            q,
            cache_of(module, storage),
            step.block_table,
            step.lengths,
            self._workspace(module, step.batch_size, sizes.max_seq_len),
            out,
            scale=scoring.scale,
            **options,
            config=config,
        )
        return out

    def _try(
        self,
        modules: SiteModules,
        storage: SiteStorage,
        step: KernelStep,
        sizes: CacheSizes,
        config: Any,
    ) -> None:
        """Launch `decode` with a config on a query of zeros, to see how long it takes."""
        spec = modules.specs.decode
        heads = torch.zeros(
            spec.site.num_q_heads,
            dtype=dtype_from_name(spec.site.dtype),
            device=self._kernels.device,
        )
        q = heads[None, :, None].repeat(step.batch_size, 1, spec.site.key.head_dim)
        scoring = Scoring(
            1.0,
            sink_logits=heads if spec.has_sink_logits else None,
            alibi_slopes=heads if spec.has_alibi else None,
        )
        self._launch(modules, storage, q, step, scoring, sizes, config)

    @functools.cached_property
    def _planned(self) -> tuple[list[SiteModules], list[SiteModules]]:
        """One site of each decode kernel: of rotated q, and of q that the kernel rotates."""
        found = [
            list({s.decode.__name__: s for s in self._kernels.sites(folded).values()}.values())
            for folded in (False, True)
        ]
        return found[0], found[1]

    def _workspace(self, module: ModuleType, batch_size: int, max_seq_len: int) -> Any:
        """Return the scratch tensors of a decode kernel, which layers share."""
        tokens = 1 << (max_seq_len - 1).bit_length()  # so that sessions of most lengths share one
        key = (module.__name__, batch_size, tokens)
        if key not in self._workspaces:
            self._workspaces[key] = module.make_workspace(
                batch_size, tokens, self._num_sms, self._kernels.device
            )
        return self._workspaces[key]

    @functools.cached_property
    def _num_sms(self) -> int:
        device = self._kernels.device
        if device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(device).multi_processor_count


def _prepare(
    module: ModuleType, work: Any, lengths: Sequence[int], table: Tensor, config: Any
) -> None:
    module.prepare(work, lengths, table, config=config)
