"""KVSharer's search for an owner map: pairs by distance, kept by what they do to the model.

Source: KVSharer, arXiv 2410.18517, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS
from kvxform.ir.program import Program, default_positions
from kvxform.structure.owner_map import owners_of

Order = Literal["dissimilar", "similar"]
Pair = tuple[int, int]  # owner, reader


@dataclass(frozen=True)
class Found:
    """What a search has decided.

    Attributes:
        owners: Owner of every layer.
        accepted: Pairs that were accepted, in order, with the cosine similarity after each.
    """

    owners: Mapping[int, int]
    accepted: tuple[tuple[Pair, float], ...]


def search(
    owners: Mapping[int, int],
    pairs: Iterable[Pair],
    similarity: Callable[[Mapping[int, int]], float],
    *,
    threshold: float,
    readers: int,
) -> Found:
    """Let readers take the caches of owners, pair by pair, while the model stays similar.

    A pair counts for the owner that its first layer has by then, and readers follow their owner.

    Args:
        owners: Owner of every layer to begin with.
        pairs: Pairs in the order in which they are tried.
        similarity: How similar the model is with an owner map.
        threshold: A map is accepted if its similarity is larger.
        readers: Layers without a cache of their own at which the search ends.
    """
    current, accepted = dict(owners), list[tuple[Pair, float]]()
    tried = set[Pair]()
    for first, reader in pairs:
        if sum(layer != owner for layer, owner in current.items()) >= readers:
            break
        pair = (current[first], reader)
        if current[reader] != reader or pair in tried:
            continue
        tried.add(pair)
        trial = {a: pair[0] if owner == reader else owner for a, owner in current.items()}
        found = similarity(trial)
        if found > threshold:
            current = trial
            accepted.append((pair, found))
    return Found(current, tuple(accepted))


class SharingBench:
    """A program without a cache and a text; knows its keys, values and last hidden states.

    Args:
        program: The program.
        token_ids: The text, int64 `[windows, window]`; all windows run side by side.
    """

    def __init__(self, program: Program, token_ids: Tensor) -> None:
        device = next(iter(program.weights.values())).device
        self._ids = token_ids.to(device)
        self._module = _without_head(program)
        self._owners = owners_of(program.sites)
        runner = _SharedRun(self._module, self._owners, averages=True)
        self._exact = runner.read(self._ids)
        self._averages = runner.averages

    def distances(self) -> dict[Pair, float]:
        """Return the distance of all pairs of layers with caches of their own, earlier one first.

        Euclidean, of keys and values averaged over the windows, position by position; only
        pairs with equal shapes.
        """
        return {
            (a, b): float((left - right).norm())
            for (a, left), (b, right) in itertools.combinations(self._averages.items(), 2)
            if left.shape == right.shape
        }

    def similarity(self, owners: Mapping[int, int]) -> float:
        """Return the mean cosine similarity of last hidden states with and without a map."""
        changed = _SharedRun(self._module, owners).read(self._ids)
        return float(F.cosine_similarity(changed, self._exact, dim=-1).double().mean())


def in_order(distances: Mapping[Pair, float], order: Order) -> list[Pair]:
    """Return pairs by distance, the largest first if `order` is `dissimilar`."""
    sign = -1 if order == "dissimilar" else 1
    return sorted(distances, key=lambda pair: (sign * distances[pair], pair))


class _SharedRun(fx.Interpreter):
    """Runs a program without a cache in which layers read the keys and values of others."""

    def __init__(
        self, module: fx.GraphModule, owners: Mapping[int, int], *, averages: bool = False
    ) -> None:
        super().__init__(module)
        self._sharing, self._keeps_averages = owners, averages
        self._readers = {o for layer, o in owners.items() if layer != o}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.averages: dict[int, Tensor] = {}

    def read(self, token_ids: Tensor) -> Tensor:
        """Return last hidden states, float32 `[tokens, width]`."""
        with torch.no_grad():
            hidden: Tensor = self.run(token_ids, default_positions(token_ids))
        return hidden.flatten(0, -2).float()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is kvx.ATTENTION:
            args = self._share(kwargs["layer"], args)
        return super().call_function(target, args, kwargs)

    def _share(self, layer: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = args
        owner = self._sharing[layer]
        if owner != layer:
            key, value = self._kept[owner]
        elif layer in self._readers:
            self._kept[layer] = key, value
        if self._keeps_averages and owner == layer:
            means = [x.float().mean(0).flatten() for x in (key, value)]
            self.averages[layer] = torch.cat(means)
        return (query, key, value, *rest)


def _without_head(program: Program) -> fx.GraphModule:
    """Return the program with the input of its last linear layer, the head, as its output."""
    module = program.to_module()
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    linears = [n for n in module.graph.nodes if n.target in (LINEAR, ADDMM, *PRODUCTS)]
    head = linears[-1]
    output.args = (head.args[1 if head.target is ADDMM else 0],)
    module.graph.eliminate_dead_code()
    return module
