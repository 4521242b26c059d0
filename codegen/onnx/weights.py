"""How weights are stored: equal tensors once, those of linear layers transposed or packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx

from kvxform.codegen.onnx.nbits import (
    BLOCK,
    MATRIX_BITS,
    TABLE_BITS,
    Packer,
    Packing,
    pack,
    unpack,
)
from kvxform.ir.program import Program

if TYPE_CHECKING:
    from kvxform.codegen.onnx.forms import WeightKind

COMPARED_BYTES = 1 << 16  # tensors up to here are compared by content, larger ones by storage
Use = Literal["matrix", "turned", "flipped", "table", "other"]

aten = torch.ops.aten
# Where an operation reads a weight as a matrix `[N, K]`, as one `[K, N]`, or as a table of rows. A
# matrix is flipped where the program itself writes `x @ W.T`.
PLACES: dict[tuple[object, int], Use] = {
    (aten.linear.default, 1): "matrix",
    (aten.addmm.default, 2): "turned",
    (aten.mm.default, 1): "turned",
    (aten.matmul.default, 1): "turned",
    (aten.embedding.default, 0): "table",
}
# Turned, a MatMul reads memory in order, without a packed copy. A tied table then gives a column
# for a token, and not a row.
TURNED_USES: tuple[set[Use], ...] = ({"matrix"}, {"matrix", "table"})


@dataclass(frozen=True)
class WeightStore:
    """Where each weight of a Program lies in the exported file.

    Attributes:
        names: Weight name -> name of the initialiser, the same for equal tensors.
        transposed: Initialisers that linear layers read, and that are at most a table besides;
            they are stored as `W.T`.
        packed: How initialisers are packed that are stored in few bits.
        packer: Packs them.
    """

    names: dict[str, str]
    transposed: frozenset[str]
    packed: Mapping[str, Packing] = field(default_factory=dict)
    packer: Packer = field(default_factory=Packer)

    @classmethod
    def of(cls, program: Program, kind: WeightKind = "source") -> WeightStore:
        """Decide for every weight of `program`.

        Args:
            program: Whose weights.
            kind: `int4` packs what products read, as far as ONNX Runtime can.
        """
        names = _shared_names(program.weights)
        uses: dict[str, set[Use]] = defaultdict(set)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                uses[names[str(node.target)]].update(_use(node, user) for user in node.users)
        matrices = frozenset(name for name, found in uses.items() if found in TURNED_USES)
        if kind == "source":
            return cls(names, matrices)
        packings = {name: _packing(program.weights[name], found) for name, found in uses.items()}
        packed = {name: packing for name, packing in packings.items() if packing is not None}
        return cls(names, matrices - packed.keys(), packed)

    def name(self, weight: str) -> str:
        """Return the initialiser that holds `weight`."""
        return self.names[weight]

    def is_transposed(self, weight: str) -> bool:
        """Whether `weight` is stored as `W.T`."""
        return self.names[weight] in self.transposed

    def packing(self, weight: str) -> Packing | None:
        """Return how `weight` is packed, or None if it is stored as it is."""
        return self.packed.get(self.names[weight])


def unpacked_program(program: Program) -> Program:
    """Return `program` with the values that its weights have in an int4 package."""
    changed, store = program.clone(), WeightStore.of(program, "int4")
    for name, weight in program.weights.items():
        packing = store.packing(name)
        if packing is not None:
            changed.weights[name] = unpack(pack(weight, packing), packing, weight)
    return changed


def is_flip(node: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]


def _use(node: fx.Node, user: fx.Node) -> Use:
    """Return how `user` reads the weight `node`, if it reads it once and in a known place."""
    places = [i for i, arg in enumerate(user.args) if arg is node]
    if len(places) != 1 or not user.kwargs.keys() <= {"beta", "alpha"}:
        return "other"
    if is_flip(user):
        return "flipped" if {_use(user, reader) for reader in user.users} == {"turned"} else "other"
    is_scaled = any(factor != 1 for factor in user.kwargs.values())
    return "other" if is_scaled else PLACES.get((user.target, places[0]), "other")


def _packing(weight: Tensor, uses: set[Use]) -> Packing | None:
    """Return how a weight of such uses is packed; None if it cannot be."""
    if weight.dim() != 2 or not weight.is_floating_point() or min(weight.shape) < BLOCK:
        return None
    if uses in ({"matrix"}, {"flipped"}):
        return Packing(MATRIX_BITS)
    if uses == {"turned"}:
        return Packing(MATRIX_BITS, is_turned=True)
    is_tied_table = uses == {"matrix", "table"} and weight.shape[1] % BLOCK == 0
    return Packing(TABLE_BITS) if is_tied_table else None


def _shared_names(weights: dict[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_identity(w), name) for name, w in weights.items()}


def _identity(weight: Tensor) -> tuple[object, ...]:
    """Return a key that is equal only for tensors with equal bytes."""
    kind = (weight.dtype, tuple(weight.shape))
    if weight.nbytes <= COMPARED_BYTES:
        return (*kind, weight.reshape(-1).view(torch.uint8).numpy().tobytes())
    return (*kind, weight.data_ptr(), weight.stride())
