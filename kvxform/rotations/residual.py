"""Which weights make the residual stream of a program, and which read it.

The stream is found from the embedding of the tokens, forwards through sums, bare norms and whatever
keeps the channels apart from a factor, and from every sum backwards to what else is added. It can
be expressed in another orthogonal basis if only plain matrices and embeddings make and read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.linear import (
    ADDMM,
    LINEAR,
    PRODUCTS,
    RESHAPES,
    SIZE,
    LinearCall,
    as_linear,
    weight_uses,
)
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType
from kvxform.pass_base import NoMatch

_ATEN = torch.ops.aten
EMBEDDING = _ATEN.embedding.default
LAYER_NORM = _ATEN.layer_norm.default
SUMS = (_ATEN.add.Tensor, _ATEN.sub.Tensor)
PRODUCTS_BY_CHANNEL = (_ATEN.mul.Tensor, _ATEN.mul.Scalar)
QUOTIENTS = (_ATEN.div.Tensor, _ATEN.div.Scalar)
CASTS = (
    _ATEN.to.dtype,
    _ATEN._to_copy.default,
    _ATEN.clone.default,
    _ATEN.alias.default,
    _ATEN.contiguous.default,
)
UNTIE = "give every layer that reads it a weight of its own"
BARE = "run fuse-norms first, with untie: true where the head is tied to the embedding"


@dataclass
class ResidualStream:
    """What a basis of the residual stream has to change.

    Attributes:
        axes: The axis of each weight, biases included, that runs over channels of the stream.
        makers: Linear layers that add to the stream.
        made: Weights and biases that write to the stream.
        layer_norms: Names of LayerNorms.
        others: Names of nodes that read the stream before any norm and are no LayerNorm.
    """

    axes: dict[str, int] = field(default_factory=dict)
    makers: list[LinearCall] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    layer_norms: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class BlockedError(Exception):
    """The stream cannot be rotated; carries the reason."""

    def __init__(self, reason: str, node: fx.Node, hint: str = "") -> None:
        super().__init__(reason)
        self.miss = NoMatch(reason, node=node.name, hint=hint)


def trace_residual(program: Program) -> ResidualStream | NoMatch:
    """Return the residual stream of `program`, or why it cannot be rotated."""
    try:
        return _Tracer(program).run()
    except BlockedError as blocked:
        return blocked.miss


class _Tracer:
    def __init__(self, program: Program) -> None:
        self._program, self._found = program, ResidualStream()
        self._seen: dict[fx.Node, bool] = {}  # nodes of the stream: whether a norm made them
        self._pending: list[fx.Node] = []
        self._uses: dict[str, int] = {}

    def run(self) -> ResidualStream:
        ids = self._program.placeholder("input_ids")
        starts = [node for node in self._program.calls(EMBEDDING) if _reads(node, ids)]
        if not starts:
            raise BlockedError("the tokens have no embedding", ids)
        for node in starts:
            self._back(node)
        while self._pending:
            node = self._pending.pop()
            for user in node.users:
                self._forward(node, user)
        self._check_uses(starts[0])
        if self._found.layer_norms and self._found.others:
            reason = f"{self._found.others[0]} reads the mean of the stream, LayerNorm drops it"
            raise BlockedError(reason, starts[0])
        return self._found

    def _mark(self, node: fx.Node, is_normed: bool) -> None:
        """Add a node to the stream; its readers are looked at later."""
        if node not in self._seen:
            self._seen[node] = is_normed
            self._pending.append(node)

    def _forward(self, node: fx.Node, user: fx.Node) -> None:
        """Take in one reader of the stream."""
        if user.target is SIZE:
            return
        is_normed = self._seen[node]
        if user.target in SUMS:
            self._sum(user)
        elif _passes(user, node):
            self._mark(user, is_normed)
        elif user.target in (kvx.RMS_NORM, LAYER_NORM) and user.args[0] is node:
            self._norm(user, is_normed)
        else:
            self._read(node, user, is_normed)

    def _sum(self, node: fx.Node) -> None:
        if not all(isinstance(value, fx.Node) for value in node.args):
            raise BlockedError(f"{node.name} adds a number to the stream", node)
        self._mark(node, False)
        for value in node.all_input_nodes:
            self._back(value)

    def _norm(self, node: fx.Node, is_normed: bool) -> None:
        gains = node.args[1:2] if node.target is kvx.RMS_NORM else node.args[2:4]
        if any(gain is not None for gain in gains):
            raise BlockedError("a norm of the stream has a gain", node, BARE)
        if node.target is LAYER_NORM:
            if node.name not in self._found.layer_norms:
                self._found.layer_norms.append(node.name)
        elif not is_normed:
            self._found.others.append(node.name)
        self._mark(node, True)

    def _read(self, node: fx.Node, user: fx.Node, is_normed: bool) -> None:
        linear = as_linear(user, node)
        if linear is None:
            raise BlockedError(f"{user.name} reads the stream and is no linear layer", user)
        self._count(linear.weight, 1 if linear.layout == "out_in" else 0, user)
        if not is_normed:
            self._found.others.append(user.name)

    def _back(self, node: fx.Node) -> None:
        """Take in what is added to the stream."""
        if node in self._seen:
            return
        if node.target is EMBEDDING:
            self._embedding(node)
        elif node.target in (LINEAR, ADDMM, *PRODUCTS):
            self._maker(node)
        elif node.target in SUMS:
            self._sum(node)
            return
        elif node.target in (kvx.RMS_NORM, LAYER_NORM):
            self._back(_first(node))
            self._norm(node, self._seen[_first(node)])
            return
        else:
            source = next((n for n in node.all_input_nodes if _passes(node, n)), None)
            if source is None:
                raise BlockedError(f"{node.name} adds to the stream and is no linear layer", node)
            self._back(source)
        self._mark(node, False)

    def _embedding(self, node: fx.Node) -> None:
        table = node.args[0]
        if not isinstance(table, fx.Node) or table.op != "get_attr":
            raise BlockedError("an embedding is computed", node)
        self._count(str(table.target), 1, node)
        self._found.made.add(str(table.target))

    def _maker(self, node: fx.Node) -> None:
        x = node.args[1 if node.target is ADDMM else 0]
        linear = as_linear(node, x) if isinstance(x, fx.Node) else None
        if linear is None:
            raise BlockedError(f"{node.name} adds to the stream with a computed weight", node)
        self._count(linear.weight, 0 if linear.layout == "out_in" else 1, node)
        self._found.makers.append(linear)
        self._found.made.add(linear.weight)
        if linear.bias is not None:
            self._count(linear.bias, 0, node)
            self._found.made.add(linear.bias)

    def _count(self, weight: str, axis: int, node: fx.Node) -> None:
        if self._found.axes.setdefault(weight, axis) != axis:
            raise BlockedError(f"weight {weight} both makes and reads the stream", node, UNTIE)
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def _check_uses(self, node: fx.Node) -> None:
        """Nothing else may read the weights, under this or another name."""
        for name, count in weight_uses(self._program).items():
            if name in self._uses and count != self._uses[name]:
                raise BlockedError(f"weight {name} is read in {count} places", node, UNTIE)


def _reads(node: fx.Node, value: fx.Node) -> bool:
    return any(found is value for found in _ancestors(node))


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what the indices of an embedding come from, through views and casts."""
    index = node.args[1]
    while isinstance(index, fx.Node):
        yield index
        index = index.args[0] if index.target in (*RESHAPES, *CASTS) else None


def _first(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node), "a norm has an operand"
    return value


def _passes(node: fx.Node, value: fx.Node) -> bool:
    """Whether `node` is `value` with its channels in place, times one factor at most."""
    if node.target in CASTS or node.target in RESHAPES:
        return node.args[0] is value and _width(node) == _width(value)
    if node.target not in (*PRODUCTS_BY_CHANNEL, *QUOTIENTS):
        return False
    if node.target in QUOTIENTS and node.args[0] is not value:
        return False
    other = next((arg for arg in node.args if arg is not value), None)
    return other is not None and (not isinstance(other, fx.Node) or _width(other) == 1)


def _width(node: fx.Node) -> int | str:
    """Return the size of the last axis, 1 for a scalar."""
    kind = node.meta.get("type")
    return kind.shape[-1] if isinstance(kind, TensorType) and kind.shape else 1
