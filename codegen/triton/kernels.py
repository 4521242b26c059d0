"""The kernels of all sites of a program, and what every launch of them needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvxform.codegen.triton.autotune import Bucket
from kvxform.codegen.triton.modules import Configs, SiteModules, unfolded
from kvxform.codegen.triton.prefill_hopper import is_hopper
from kvxform.codegen.triton.sites import for_any_device, kernel_specs, page_tokens
from kvxform.codegen.triton.spec import SiteSpec
from kvxform.codegen.triton.step import KernelStep
from kvxform.codegen.triton.store import SiteStorage
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring

LEAST_BUCKET = 1024  # tokens; shorter sequences are not told apart when kernels are tuned


class Kernels:
    """The kernels of all sites of a program, shared by all its caches.

    Args:
        program: A program with a cache that `capability` has accepted.
        device: Where it runs.
        interpret: Run the twins of the kernels in Triton's interpreter.

    Attributes:
        page_size: Tokens a page.
        configs: Launch parameters.
    """

    def __init__(self, program: Program, device: torch.device, *, interpret: bool) -> None:
        assert program.plan is not None, "checked by `capability`"
        self.device, self.page_size = device, page_tokens(program.plan)
        self.configs = Configs(device)
        weights, specs = program.weights, kernel_specs(program)
        if not is_hopper(device):
            specs = {layer: for_any_device(site) for layer, site in specs.items()}
        self._folded = {
            layer: SiteModules(site, weights, interpret=interpret) for layer, site in specs.items()
        }
        self._unfolded = {
            layer: SiteModules(unfolded(site), weights, interpret=interpret)
            for layer, site in specs.items()
        }

    @property
    def folded_nodes(self) -> frozenset[str]:
        """Names of the rotations in the graph that kernels do."""
        rotations = (
            rotation
            for site in self._folded.values()
            for rotation in (site.specs.key_hadamard, site.specs.query_hadamard)
        )
        return frozenset(rotation.node for rotation in rotations if rotation is not None)

    def site_spec(self, layer: int) -> SiteSpec:
        """Return how the cache of `layer` is stored."""
        return self._folded[layer].specs.gather.site

    def sites(self, is_folded: bool) -> dict[int, SiteModules]:
        """Return the kernels by layer: those that rotate K and q, or those that do not."""
        return self._folded if is_folded else self._unfolded

    def append(
        self, modules: SiteModules, storage: SiteStorage, k: Tensor, v: Tensor, step: KernelStep
    ) -> None:
        """Store new tokens k and v `[B, Hk, S, D]`."""
        module = modules.append
        cache = cache_of(module, storage)
        options = buffer_rows(storage, step)
        if modules.key_signs is not None:
            options["signs"] = modules.key_signs

        def run(config: Any) -> None:
            module.append(
                k, v, cache, step.block_table, step.starts, step.counts, **options, config=config
            )

        # One token has nothing to choose. With rings, the second of two equal launches would read
        # what the first has written.
        if step.num_new == 1 or storage.rings:
            run(module.CONFIGS[0])
        else:
            run(self.configs.find(module, bucket_of(storage, step, step.num_new), run))


def cache_of(module: Any, storage: SiteStorage) -> Any:
    """Return the `Cache` of an emitted module."""
    tensors = storage.tensors
    return module.Cache(**{name: tensors[name] for name in module.Cache._fields})


def buffer_rows(storage: SiteStorage, step: KernelStep) -> dict[str, Tensor]:
    """Return the argument of launches that use buffers of exact tokens."""
    return {"rows": step.rows} if storage.buffers else {}


def score_options(scoring: Scoring) -> dict[str, Tensor]:
    """Return the tensors that go into scores, as arguments of launches."""
    options = {"sink_logits": scoring.sink_logits, "alibi_slopes": scoring.alibi_slopes}
    return {name: value for name, value in options.items() if value is not None}


def bucket_of(storage: SiteStorage, step: KernelStep, tokens: int) -> Bucket:
    """Return the shapes that share a choice of launch parameters with a launch."""
    return Bucket.of(step.batch_size, storage.spec.num_kv_heads, max(tokens, LEAST_BUCKET))
