"""Run parts of a graph on chosen inputs, and compare.

A `Setting` fixes batch, length and positions. Whatever depends on nothing else (masks, rotary
tables) is computed once per setting and shared by all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.capture.structure import ancestors, find_content, reads_content

# Largest error of a replacement, relative to the largest value of what it replaces.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


@dataclass(frozen=True)
class Setting:
    """Batch size and positions of one probe; the length is the number of positions."""

    batch: int
    positions: tuple[int, ...]

    @staticmethod
    def first(length: int, batch: int = 1) -> Setting:
        """Return the setting with positions 0..length-1."""
        return Setting(batch, tuple(range(length)))

    @property
    def length(self) -> int:
        """Number of tokens, S."""
        return len(self.positions)

    def position_ids(self, device: torch.device | None = None) -> Tensor:
        """Return positions, int64 `[B, S]`."""
        return torch.tensor(self.positions, device=device).expand(self.batch, -1)


class Prober:
    """Evaluates nodes of one graph."""

    def __init__(self, graph: fx.Graph, weights: MutableMapping[str, Tensor]) -> None:
        self.graph = graph
        self.weights = weights
        self.content = find_content(graph)
        self.device = next((w.device for w in weights.values()), torch.device("cpu"))
        self._known: dict[tuple[Setting, fx.Node], Any] = {}
        self._random = torch.Generator().manual_seed(0)

    def refresh(self) -> None:
        """Find content anew after the graph has changed."""
        self.content = find_content(self.graph)

    def learn(self, node: fx.Node) -> None:
        """Find content among nodes that were written for `node`, without reading the graph."""
        stack, unknown = [node], set[fx.Node]()
        while stack:
            new = stack.pop()
            if new not in self.content and new not in unknown and new.op == "call_function":
                unknown.add(new)
                stack.extend(new.all_input_nodes)
        for new in sorted(unknown):
            if reads_content(new, self.content):
                self.content.add(new)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return normal random values of any dtype; the sequence of calls is reproducible."""
        values = torch.randn(shape, generator=self._random, dtype=torch.float64)
        return values.to(dtype).to(self.device)

    def run(
        self,
        outputs: Sequence[fx.Node],
        setting: Setting,
        bound: Mapping[fx.Node, Any] | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> list[Any]:
        """Return the values of `outputs` when the nodes in `bound` have the given values.

        Integers among the arguments of nodes that are keys of `numbers` are replaced.
        """
        bound = bound or {}
        known = {} if numbers else self._known
        values: dict[fx.Node, Any] = dict(bound)
        with torch.no_grad():
            for node in self._needed(outputs, setting, bound, known):
                if (setting, node) in known and node not in bound:
                    values[node] = known[setting, node]
                elif node not in values:
                    values[node] = self._evaluate(node, setting, values, numbers or {})
        return [values[node] for node in outputs]

    def value(self, node: fx.Node, setting: Setting) -> Any:
        """Return the value of a node that is not content, and remember it."""
        if (setting, node) not in self._known:
            self._known[setting, node] = self.run([node], setting)[0]
        return self._known[setting, node]

    def leaves(self, region: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the inputs of `region` that are not content."""
        inside = {n for node in region for n in node.all_input_nodes}
        return sorted(inside - self.content)

    def remember(self, region: Sequence[fx.Node], setting: Setting) -> None:
        """Compute the non-content inputs of `region` once, so that later runs only look them up."""
        for leaf in self.leaves(region):
            self.value(leaf, setting)

    def _needed(
        self,
        outputs: Sequence[fx.Node],
        setting: Setting,
        bound: Mapping[fx.Node, Any],
        known: Mapping[tuple[Setting, fx.Node], Any],
    ) -> list[fx.Node]:
        if not known:
            return ancestors(outputs, bound)
        return ancestors(outputs, is_end=lambda n: n in bound or (setting, n) in known)

    def _evaluate(
        self,
        node: fx.Node,
        setting: Setting,
        values: Mapping[fx.Node, Any],
        numbers: Mapping[int, int],
    ) -> Any:
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node.op == "placeholder":
            positions = setting.position_ids(self.device)
            return positions if node.target == "position_ids" else torch.zeros_like(positions)

        def resolve(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return values[value]
            is_number = type(value) is int and value in numbers
            return numbers[value] if is_number else value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), resolve)
        assert callable(node.target)
        return node.target(*args, **kwargs)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: probes are so small that waiting for others costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `want`.

    Infinite for NaN, infinity and different shapes.
    """
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    wide = torch.promote_types(want.dtype, torch.float64)
    difference = (got.to(wide) - want.to(wide)).abs().max()
    if not bool(torch.isfinite(difference)):
        return float("inf")
    return float(difference / want.to(wide).abs().max().clamp_min(1e-30))


def is_close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether two tensors are equal to the rounding of `dtype` (default: that of `want`)."""
    return error(got, want) <= TOLERANCE.get(dtype or want.dtype, TOLERANCE[torch.float32])
