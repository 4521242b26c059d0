"""fuse-norms: gains and biases of norms move into the linear layers that read the norm.

With y = n * g + b, where n is the bare norm, W y + c = (W diag(g)) n + (W b + c). Legal where every
reader of the norm is a linear layer, and nothing else reads the weights of these layers. A head
that is tied to the embedding keeps its norm, unless it may have a weight of its own. A bare norm
commutes with rotations of the residual stream, which is what later passes need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.facts import FactValue
from kvxform.ir.linear import (
    ADDMM,
    LINEAR,
    LinearCall,
    as_linear,
    channel_users,
    rename_bias,
    weight_uses,
)
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

EMBEDDING = torch.ops.aten.embedding.default
LAYER_NORM = torch.ops.aten.layer_norm.default
SCALED_AT_ONCE = 1 << 22  # elements in float64
UNTIE = "untie it: give every layer that reads it a weight of its own"
UNTIE_HEAD = "use untie: true, which gives the head a weight of its own"


@dataclass(frozen=True)
class NormCall:
    """A norm of the graph: `x / rms(x) * (gain + offset) + bias`, or the same for LayerNorm.

    Attributes:
        first: Position of the gain among the arguments of the node.
        gain: Node of the gain, or None.
        bias: Node of the bias, or None.
        offset: Added to the gain (Gemma stores gain - 1).
    """

    first: int
    gain: fx.Node | None
    bias: fx.Node | None
    offset: float = 0.0


@register_pass
@dataclass(frozen=True)
class FuseNorms(GraphPass):
    """Fold the gain of RMSNorm, and gain and bias of LayerNorm, into the next linear layers.

    Attributes:
        untie: Give a linear layer that shares its weight with an embedding one of its own, at the
            price of its memory, so that it can absorb the gain too.
    """

    untie: bool = False
    numerics: ClassVar[Numerics] = EXACT
    source: ClassVar[str] = "SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that norms are fused wherever that is possible."""
        return {"norms_fused": True}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every norm whose readers can absorb it."""
        uses = weight_uses(program)
        tied = _embeddings(program)
        norms = program.calls(kvx.RMS_NORM, LAYER_NORM)
        return [_check(node, uses, tied, untie=self.untie) for node in norms]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Scale the linear layers of one norm, add its bias to theirs, and bare the norm."""
        node = rewriter.node(match.node)
        norm = _parse(node)
        gain = bias = None
        if norm.gain is not None:
            gain = program.weights[str(norm.gain.target)].double() + norm.offset
        if norm.bias is not None:
            bias = program.weights[str(norm.bias.target)].double()
        for linear in match.data["linears"]:
            if bias is not None:
                _add_bias(program, linear, bias, rewriter)
            if gain is not None:
                name = linear.weight
                factor = gain if linear.layout == "out_in" else gain[:, None]
                scaled = _scale(program.weights[name], factor)
                if name in match.data["tied"]:
                    _untie(rewriter, linear, scaled)
                else:
                    rewriter.set_weight(name, scaled)
            rewriter.set_args(rewriter.node(linear.node))
        bare = [None, None] if node.target is LAYER_NORM else [None]
        args = list(node.args)
        args[norm.first : norm.first + len(bare)] = bare
        rewriter.set_args(node, tuple(args))


def _scale(weight: Tensor, factor: Tensor) -> Tensor:
    """Return `weight * factor`, computed in float64 some rows at a time: a head can be large."""
    scaled = torch.empty_like(weight)
    factor = factor.expand(weight.shape)
    step = max(1, SCALED_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        scaled[rows] = weight[rows].double() * factor[rows]
    return scaled


def _parse(node: fx.Node) -> NormCall:
    def argument(index: int) -> fx.Node | None:
        value = node.args[index] if index < len(node.args) else None
        return value if isinstance(value, fx.Node) else None

    if node.target is LAYER_NORM:
        return NormCall(2, argument(2), argument(3))
    offset = node.kwargs.get("weight_offset", 0.0)
    assert isinstance(offset, int | float), "weight_offset is a number in the schema"
    return NormCall(1, argument(1), None, float(offset))


def _embeddings(program: Program) -> dict[str, int]:
    """Return how many embeddings read each weight."""
    tables = (node.args[0] for node in program.calls(EMBEDDING))
    return Counter(str(table.target) for table in tables if isinstance(table, fx.Node))


def _check(
    node: fx.Node, uses: Mapping[str, int], embeddings: Mapping[str, int], *, untie: bool
) -> Match | NoMatch:
    norm = _parse(node)
    if norm.gain is None and norm.bias is None:
        return NoMatch("already without gain", node=node.name, done=True)
    if any(n is not None and n.op != "get_attr" for n in (norm.gain, norm.bias)):
        hint = "store the gain itself as a parameter of the norm"
        return NoMatch("gain or bias of the norm is computed", node=node.name, hint=hint)
    linears: list[LinearCall] = []
    tied: list[str] = []
    for value, user in channel_users(node):
        linear = as_linear(user, value)
        if linear is None:
            return NoMatch(f"{user.name} reads the norm and is no linear layer", node=node.name)
        if norm.bias is not None and user.target not in (LINEAR, ADDMM):
            return NoMatch(f"{user.name} has no place for a bias", node=node.name)
        for name in filter(None, (linear.weight, linear.bias)):
            is_tied = embeddings.get(name, 0) == uses[name] - 1 > 0
            if is_tied and untie:
                tied.append(name)
            elif uses[name] != 1:
                reason = f"weight {name} is read in {uses[name]} places"
                hint = UNTIE_HEAD if is_tied else UNTIE
                return NoMatch(reason, node=node.name, hint=hint)
        linears.append(linear)
    if not linears:
        return NoMatch("nothing reads the norm", node=node.name)
    return Match(node=node.name, data={"linears": tuple(linears), "tied": tuple(tied)})


def _untie(rewriter: Rewriter, linear: LinearCall, weight: Tensor) -> None:
    """Let a linear layer read `weight`, under a name of its own."""
    name = linear.weight.removesuffix(".weight") + ".untied"
    rewriter.set_weight(name, weight, made_from=[linear.weight])
    node = rewriter.node(linear.node)
    own = rewriter.get_weight_node(name, node, TensorType(weight.dtype, tuple(weight.shape)))
    old = next(n for n in node.all_input_nodes if n.target == linear.weight)
    rewriter.set_args(node, tuple(own if arg is old else arg for arg in node.args))


def _add_bias(program: Program, linear: LinearCall, bias: Tensor, rewriter: Rewriter) -> None:
    """Add W b to the bias of a linear layer, which gets one if it has none."""
    weight = program.weights[linear.weight]
    matrix = weight.double() if linear.layout == "out_in" else weight.double().T
    shift = matrix @ bias
    if linear.bias is not None:
        old = program.weights[linear.bias]
        rewriter.set_weight(linear.bias, (old.double() + shift).to(old.dtype))
        return
    name = linear.weight.removesuffix(".weight") + ".fused_bias"
    rewriter.set_weight(name, shift.to(weight.dtype))
    node = rewriter.node(linear.node)
    type_ = TensorType(weight.dtype, tuple(shift.shape))
    rewriter.set_args(node, (*node.args[:2], rewriter.get_weight_node(name, node, type_)))
    for layer, changes in rename_bias(program, linear.weight, name).items():
        rewriter.update_site(layer, **changes)
