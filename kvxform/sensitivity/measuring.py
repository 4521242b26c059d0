"""Measures what codecs at some layers do to a model, from the first changed layer on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.base import Codec
from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.sensitivity.caches import Stream, TrialCache

_ROWS = 256  # positions whose distributions exist at the same time


class Bench:
    """A program with a cache and a text; knows what the model gives with an exact cache.

    What goes into the cache of each layer is remembered, so that a trial runs only what comes
    after the first layer that it changes.

    Args:
        program: A program with a cache.
        token_ids: The text, int64 `[windows, window]`; all windows run side by side.
    """

    def __init__(self, program: Program, token_ids: Tensor) -> None:
        assert program.plan is not None, "there is a cache"
        cache = TrialCache({site.layer: site for site in program.plan.sites})
        device = next(iter(program.weights.values())).device
        self._runner = _Runner(program.to_module(), token_ids.to(device), cache)
        self._exact: Tensor = self._runner.proceed()
        cache.keep()
        self._outputs: dict[int, Tensor] = {}

    def divergence(self, codecs: Mapping[Stream, Codec]) -> float:
        """Return the mean KL(exact cache || `codecs`) of next tokens, in nats."""
        if not codecs:
            return 0.0
        first = min(layer for layer, _ in codecs)
        self._runner.resume(first, codecs)
        logits = self._runner.proceed()
        total = 0.0
        rows = (x.flatten(0, 1).split(_ROWS) for x in (self._exact, logits))
        for exact, changed in zip(*rows, strict=True):
            source, trial = exact.float().log_softmax(-1), changed.float().log_softmax(-1)
            total += float((source.exp() * (source - trial)).sum(dtype=torch.float64))
        return total / (logits.shape[0] * logits.shape[1])

    def attention_error(self, layer: int, codecs: Mapping[Stream, Codec]) -> float:
        """Return |o - o'| / |o| of the outputs of attention at `layer`, alone.

        Source: KVTuner, arXiv 2502.04420, section 4 (relative attention output error).
        """
        if layer not in self._outputs:
            self._outputs[layer] = self._attention(layer, {})
        exact = self._outputs[layer]
        return float((self._attention(layer, codecs) - exact).norm() / exact.norm())

    def _attention(self, layer: int, codecs: Mapping[Stream, Codec]) -> Tensor:
        self._runner.resume(layer, codecs)
        return self._runner.proceed(stop=layer).double()


class _Runner(fx.Interpreter):
    """Runs a program with a cache: once from the start, then from the append of any layer."""

    def __init__(self, module: fx.GraphModule, token_ids: Tensor, cache: TrialCache) -> None:
        super().__init__(module)
        self._cache = cache
        self._nodes = list(module.graph.nodes)
        self._appends = {
            int(node.kwargs["layer"]): index
            for index, node in enumerate(self._nodes)
            if node.target is kvx.CACHE_APPEND
        }
        values = {
            "input_ids": token_ids,
            "position_ids": default_positions(token_ids),
            "cache": make_handle(cache),
        }
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self.env = {node: values[str(node.target)] for node in inputs}
        self._next = len(inputs)
        self._kept: dict[int, dict[fx.Node, Any]] = {}  # what is live right before an append

    def resume(self, layer: int, codecs: Mapping[Stream, Codec]) -> None:
        """Go back to right before what `layer` appends, and pass streams through `codecs`."""
        self._cache.begin(codecs)
        self._next = self._appends[layer]
        self.env = dict(self._kept[self._next])

    def proceed(self, *, stop: int | None = None) -> Tensor:
        """Run on, to the output of the attention of layer `stop` or to the logits."""
        value = None
        with torch.no_grad():
            for index in range(self._next, len(self._nodes)):
                node = self._nodes[index]
                if node.target is kvx.CACHE_APPEND and index not in self._kept:
                    self._kept[index] = dict(self.env)
                value = self.run_node(node)
                if node.op == "output" or (
                    node.target is kvx.CACHED_ATTENTION and node.kwargs["layer"] == stop
                ):
                    break
                self.env[node] = value
                for read in self.user_to_last_uses.get(node, ()):
                    del self.env[read]
        self.env = {}
        assert isinstance(value, Tensor), "attention and logits are tensors"
        return value
