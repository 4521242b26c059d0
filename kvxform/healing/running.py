"""A program as a differentiable function of its weights: no cache, full precision (`reads`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

import kvxform.ir.ops as kvx
from kvxform.healing.reads import Stored, attend_stored
from kvxform.ir.program import Program, default_positions
from kvxform.ir.scoring import Scoring


class Differentiable(fx.Interpreter):
    """Runs a graph of a program, with or without cached ops, on weights given at the call.

    Args:
        program: Whose sites and plan are followed.
        graph: The graph to run; that of the program by default.
    """

    def __init__(self, program: Program, graph: fx.Graph | None = None) -> None:
        super().__init__(nn.Module(), graph=program.graph if graph is None else graph)
        self._plan = program.plan
        self._owners = {site.layer: site.owner for site in program.sites}
        self._weights: Mapping[str, Tensor] = {}
        self._stored: dict[int, Stored] = {}

    def __call__(self, weights: Mapping[str, Tensor], input_ids: Tensor, *extra: Tensor) -> Any:
        """Return what the graph returns.

        Args:
            weights: By name, all that the graph reads.
            input_ids: int64 `[B, S]`; positions are 0 to S - 1.
            extra: Values of further inputs, in the order of the graph.
        """
        names = [node.target for node in self.graph.nodes if node.op == "placeholder"]
        known = {
            "input_ids": input_ids,
            "position_ids": default_positions(input_ids),
            "cache": torch.zeros((), dtype=torch.int64),
        }
        rest = iter(extra)
        self._weights = weights
        try:
            return self.run(*(known[n] if n in known else next(rest) for n in names))
        finally:
            self._weights = {}
            self._stored.clear()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight."""
        return self._weights[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one call, in the form that torch differentiates."""
        if target is kvx.CACHE_APPEND:
            k, v, handle = args
            self._stored[kwargs["layer"]] = (k, v)
            return handle
        if target is kvx.CACHED_ATTENTION:
            return self._attend(*args, **kwargs)
        return super().call_function(kvx.DIFFERENTIABLE.get(target, target), args, kwargs)

    def _attend(
        self,
        q: Tensor,
        _handle: Tensor,
        positions: Tensor,
        *,
        layer: int,
        v_head_dim: int,
        **options: Any,
    ) -> Tensor:
        assert self._plan is not None, "cached ops have a plan"
        owner = self._owners[layer]
        stored = self._stored[owner]
        out = attend_stored(q, stored, positions, Scoring(**options), self._plan.site(owner))
        return out[..., :v_head_dim]
