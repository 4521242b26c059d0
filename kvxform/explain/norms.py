"""Norms and linear layers beside an attention, found by walking the graph from it.

The graph has `kvx.rms_norm` where capture proved one, and `aten.layer_norm` as it came.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.explain.records import NormRecord
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS
from kvxform.ir.types import TensorType

aten = torch.ops.aten
LAYER_NORM = aten.layer_norm.default
_NORMS = (kvx.RMS_NORM, LAYER_NORM)
_LINEARS = (LINEAR, ADDMM, *PRODUCTS)
_MOVES = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("transpose", "permute", "contiguous", "clone", "to", "_to_copy", "type_as", "dropout"),
    }
)
_DEFAULT_EPS = 1e-5  # of aten.layer_norm
_FARTHEST = 40  # nodes between attention and a projection


@dataclass(frozen=True)
class Lane:
    """The way back from q, k or v.

    Attributes:
        norms: Norms on it, nearest to the attention first.
        linear: The linear layer that it ends at, or None.
        nodes: All nodes before that, nearest to the attention first.
    """

    norms: tuple[NormRecord, ...]
    linear: fx.Node | None
    nodes: tuple[fx.Node, ...]


def find_lanes(attention: fx.Node, head_dim: int) -> dict[str, Lane]:
    """Return the ways back from `q`, `k` and `v`.

    Args:
        attention: A `kvx.attention` node.
        head_dim: Channels of a head, which tells norms per head from norms across heads.
    """
    lanes = {}
    for name, operand in zip("qkv", attention.args[:3], strict=True):
        assert isinstance(operand, fx.Node), "operands of attention are nodes"
        lanes[name] = _walk_back(operand, name, head_dim)
    return lanes


def find_norms(attention: fx.Node, lanes: dict[str, Lane]) -> tuple[NormRecord, ...]:
    """Return the norms before the projections, inside, and after the output projection."""
    inputs = {name: _input_norm(lane.linear) for name, lane in lanes.items()}
    found: list[NormRecord] = []
    if len(set(inputs.values())) == 1:
        found += [replace(n, role="input") for n in (inputs["q"],) if n is not None]
    else:
        found += [replace(n, role=f"input of {s}") for s, n in inputs.items() if n is not None]
    for lane in lanes.values():
        found += reversed(lane.norms)
    after = _output_norm(attention)
    return (*found, *([] if after is None else [after]))


def _walk_back(operand: fx.Node, name: str, head_dim: int) -> Lane:
    norms: list[NormRecord] = []
    ropes: list[int] = []  # how many norms had been seen when a rope was met
    nodes: list[fx.Node] = []
    node = operand
    for _ in range(_FARTHEST):
        if node.op != "call_function" or node.target in _LINEARS:
            break
        nodes.append(node)
        if node.target in _NORMS:
            norms.append(_read(node, name))
        if node.target is kvx.ROPE:
            ropes.append(len(norms))
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not inputs:
            break
        node = inputs[0]
    placed = []
    for i, norm in enumerate(norms):
        place = "per head" if norm.size == head_dim else "across heads"
        if ropes:
            place += ", after RoPE" if i < ropes[0] else ", before RoPE"
        placed.append(replace(norm, place=place))
    is_linear = node.op == "call_function" and node.target in _LINEARS
    return Lane(tuple(placed), node if is_linear else None, tuple(nodes))


def linear_input(linear: fx.Node) -> fx.Node:
    """Return what a linear layer reads."""
    x = linear.args[1] if linear.target is ADDMM else linear.args[0]
    assert isinstance(x, fx.Node), "a linear layer reads a node"
    return x


def _input_norm(linear: fx.Node | None) -> NormRecord | None:
    """Return the norm whose output a linear layer reads, through moves and casts alone."""
    if linear is None:
        return None
    node: object = linear_input(linear)
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in _NORMS:
            return _read(node, "input")
        if _name(node) not in _MOVES:
            return None
        node = node.args[0]
    return None


def _output_norm(attention: fx.Node) -> NormRecord | None:
    """Return the norm that reads the output projection and nothing else does, or None."""
    linear = next(_forward(attention, stop=_LINEARS), None)
    norm = None if linear is None else next(_forward(linear, stop=_NORMS), None)
    return None if norm is None else _read(norm, "output")


def _forward(node: fx.Node, stop: tuple[object, ...]) -> Iterator[fx.Node]:
    """Yield the first node of `stop` that a chain of moves after `node` ends in, if it does."""
    while True:
        users = [u for u in node.users if isinstance(u.meta.get("type"), TensorType)]
        if len(users) != 1:
            return
        node = users[0]
        if node.target in stop:
            yield node
            return
        if _name(node) not in _MOVES:
            return


def _read(node: fx.Node, role: str) -> NormRecord:
    size = node.meta["type"].shape[-1]
    assert isinstance(size, int), "channels are static"
    if node.target is LAYER_NORM:
        gain, bias, eps = (*node.args, None, None, None)[2:5]
        eps = _DEFAULT_EPS if eps is None else eps
        return NormRecord(role, "LayerNorm", _number(eps), size, _weight(gain), bias=_weight(bias))
    offset = node.kwargs.get("weight_offset", 0.0)
    return NormRecord(
        role, "RMSNorm", _number(node.args[2]), size, _weight(node.args[1]), _number(offset)
    )


def _number(value: object) -> float:
    assert isinstance(value, int | float), "a number in the schema"
    return float(value)


def _weight(value: object) -> str | None:
    if not isinstance(value, fx.Node):
        return None
    return str(value.target) if value.op == "get_attr" else f"computed ({value.meta['origin']})"


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[-1]
