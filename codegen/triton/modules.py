"""Kernels of one site as they are launched: emitted, loaded and tuned when they are first used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvxform.codegen.triton.autotune import Bucket, tune
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.sites import SiteKernels
from kvxform.codegen.triton.spec import KernelSpec


class SiteModules:
    """The kernels of one site.

    Args:
        specs: What they are emitted from.
        weights: Weights of the program, for signs of rotations.
        interpret: Load the twins that Triton's interpreter runs.
    """

    def __init__(
        self, specs: SiteKernels, weights: Mapping[str, Tensor], *, interpret: bool
    ) -> None:
        self.specs, self._interpret = specs, interpret
        self.key_signs = _signs(specs.key_hadamard, weights)
        self.query_signs = _signs(specs.query_hadamard, weights)

    @functools.cached_property
    def append(self) -> ModuleType:
        """The module that writes new K and V."""
        assert self.specs.append is not None, "only owners append"
        return self._load(self.specs.append)

    @functools.cached_property
    def decode(self) -> ModuleType:
        """The module for one new query a sequence."""
        return self._load(self.specs.decode)

    @functools.cached_property
    def gather(self) -> ModuleType:
        """The module that makes dense K and V."""
        return self._load(self.specs.gather)

    @functools.cached_property
    def prefill(self) -> ModuleType:
        """The module for many new queries."""
        return self._load(self.specs.prefill)

    def _load(self, spec: KernelSpec) -> ModuleType:
        return load(emit(spec, interpret=self._interpret))


def _signs(hadamard: Any, weights: Mapping[str, Tensor]) -> Tensor | None:
    return None if hadamard is None or hadamard.signs is None else weights[hadamard.signs]


def unfolded(specs: SiteKernels) -> SiteKernels:
    """Return the kernels of a site whose rotations stay in the graph."""
    append = specs.append
    if append is not None:
        append = dataclasses.replace(append, key_block=0, has_signs=False)
    return dataclasses.replace(
        specs,
        append=append,
        decode=dataclasses.replace(specs.decode, query_block=0, has_signs=False),
        prefill=dataclasses.replace(specs.prefill, query_block=0, has_signs=False),
        key_hadamard=None,
        query_hadamard=None,
    )


class Configs:
    """Launch parameters by kernel and shape.

    Kernels are timed on the first shape of a bucket, on the tensors of that very launch; hence
    only launches that may be repeated are tuned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[tuple[str, Bucket], Any] = {}

    def find(
        self,
        module: ModuleType,
        bucket: Bucket,
        run: Callable[[Any], None],
        prepare: Callable[[Any], None] | None = None,
    ) -> Any:
        """Return the config of `module` for shapes of `bucket`.

        Args:
            module: What is launched.
            bucket: Shapes of the launch.
            run: Launches it once with a config.
            prepare: What the host does before launches with a config.
        """
        key = (module.__name__, bucket)
        if key not in self._found:
            self._found[key] = tune(module, bucket, run, device=self._device, prepare=prepare)
        return self._found[key]
