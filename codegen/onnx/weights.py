"""How weights are stored: equal tensors once, weights of linear layers transposed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.ir.program import Program

COMPARED_BYTES = 1 << 16  # tensors up to here are compared by content, larger ones by storage


@dataclass(frozen=True)
class WeightStore:
    """Where each weight of a Program lies in the exported file.

    Attributes:
        names: Weight name -> name of the initialiser, the same for equal tensors.
        transposed: Initialisers that only linear layers read; they are stored as `W.T`.
    """

    names: dict[str, str]
    transposed: frozenset[str]

    @classmethod
    def of(cls, program: Program) -> WeightStore:
        """Decide for every weight of `program`."""
        names = _shared_names(program.weights)
        readers: dict[str, set[bool]] = defaultdict(set)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                users = {_is_linear_weight(node, user) for user in node.users}
                readers[names[str(node.target)]] |= users
        return cls(names, frozenset(n for n, linear in readers.items() if linear == {True}))

    def name(self, weight: str) -> str:
        """Return the initialiser that holds `weight`."""
        return self.names[weight]

    def is_transposed(self, weight: str) -> bool:
        """Whether `weight` is stored as `W.T`."""
        return self.names[weight] in self.transposed


def _is_linear_weight(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is a linear layer that reads `node` as its weight and nothing else."""
    places = [i for i, arg in enumerate(user.args) if arg is node]
    return user.target is torch.ops.aten.linear.default and places == [1]


def _shared_names(weights: dict[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_identity(w), name) for name, w in weights.items()}


def _identity(weight: Tensor) -> tuple[object, ...]:
    """Return a key that is equal only for tensors with equal bytes."""
    kind = (weight.dtype, tuple(weight.shape))
    if weight.nbytes <= COMPARED_BYTES:
        return (*kind, weight.reshape(-1).view(torch.uint8).numpy().tobytes())
    return (*kind, weight.data_ptr(), weight.stride())
