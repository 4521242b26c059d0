"""rotate-residual: the residual stream is expressed in a rotated basis, at no cost at run time.

A norm without gain commutes with every orthogonal Q: norm(x Q) = norm(x) Q. So embeddings and the
matrices that write to the stream absorb Q, those that read it absorb Q^T, and nothing else changes:
every activation between two norms has its outliers spread over all channels, which is what weight
and activation quantisation need. K and V stay as they are.

A LayerNorm subtracts the mean first. Where all that is written to the stream has mean zero, it is
an RMSNorm; so with LayerNorms the means of what is written go into the weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import block_hadamard, largest_block
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import LinearCall
from kvxform.ir.program import Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.orders import DenseRotation, hadamard_factors
from kvxform.rotations.residual import ResidualStream, trace_residual

KINDS = ("hadamard", "orthogonal")
ROTATED_AT_ONCE = 1 << 22  # elements in float64


@register_pass
@dataclass(frozen=True)
class RotateResidual(GraphPass):
    """Rotate the residual stream inside of all weights that write or read it.

    Attributes:
        kind: `hadamard`: random signs and a Hadamard matrix; `orthogonal`: a random rotation,
            for widths without a known Hadamard matrix.
        seed: Seed of the signs, or of the rotation.
        online_down: Rotate the inputs of the matrices that write to the stream, but for those that
            read attention: a block Hadamard in the graph, and its inverse in the matrix.
    """

    kind: str = "hadamard"
    seed: int = 0
    online_down: bool = False
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("norms_fused", (True,), because="gains of norms do not commute with rotations"),
    )
    source: ClassVar[str] = (
        "QuaRot, arXiv 2404.00456, section 4, stages 1a and 1b; R1 and R4 of SpinQuant,"
        " arXiv 2405.16406; means of LayerNorm: SliceGPT, arXiv 2401.15024, section 3"
    )

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            rule = f"kind must be {' or '.join(KINDS)}"
            raise RecipeError("KVX107", rule, where="rotate-residual", got=repr(self.kind))

    def ensures(self) -> Mapping[str, FactValue]:
        """State the basis of the residual stream."""
        return {"residual.basis": self.kind}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match the residual stream as a whole."""
        if program.facts["residual.basis"] != "identity":
            return [NoMatch("already rotated", done=True)]
        found = trace_residual(program)
        if isinstance(found, NoMatch):
            return [found]
        width = _width(program, found)
        if self.kind == "hadamard" and hadamard_factors(width) is None:
            hint = "use kind: orthogonal"
            return [NoMatch(f"no Hadamard matrix of order {width} is known", hint=hint)]
        down = _inner(program, found) if self.online_down else ()
        return [Match(data={"stream": found, "width": width, "down": down})]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate every weight of the stream, one after the other."""
        stream: ResidualStream = match.data["stream"]
        rotation = DenseRotation(match.data["width"], self.kind, self.seed)
        for name, axis in stream.axes.items():
            centred = bool(stream.layer_norms) and name in stream.made
            rotated = _rotate(program.weights[name], axis, rotation, centred=centred)
            rewriter.set_weight(name, rotated)
        for linear in match.data["down"]:
            _rotate_input(rewriter, linear)
        for name in stream.layer_norms:
            node = rewriter.node(name)
            x, eps = node.args[0], node.args[4] if len(node.args) > 4 else 1e-5
            kind = node.meta["type"]
            wide = torch.promote_types(kind.dtype, torch.float32)  # as LayerNorm computes
            options = {} if wide == kind.dtype else {"compute_dtype": wide}
            args = (x, None, eps)
            bare = rewriter.call_before(node, kvx.RMS_NORM, args, options, type_=kind, like=node)
            rewriter.replace(node, bare)


def _width(program: Program, stream: ResidualStream) -> int:
    name, axis = next(iter(stream.axes.items()))
    return program.weights[name].shape[axis]


def _inner(program: Program, stream: ResidualStream) -> tuple[LinearCall, ...]:
    """Return the makers of the stream that do not read attention and take a Hadamard."""
    outputs = {site.o.weight for site in program.sites if site.o is not None}
    found = []
    for linear in stream.makers:
        inputs = program.weights[linear.weight].shape[1 if linear.layout == "out_in" else 0]
        if linear.weight not in outputs and largest_block(inputs) > 1:
            found.append(linear)
    return tuple(found)


def _rotate_input(rewriter: Rewriter, linear: LinearCall) -> None:
    """Put a block Hadamard before a linear layer, and the same into its weight."""
    node = rewriter.node(linear.node)
    weight = rewriter.program.weights[linear.weight]
    axis = 1 if linear.layout == "out_in" else 0
    block = largest_block(weight.shape[axis])
    x = next(n for n in node.all_input_nodes if n.op != "get_attr")
    kind = x.meta["type"]
    turned = rewriter.call_before(node, kvx.HADAMARD, (x,), {"block": block}, type_=kind, like=node)
    rewriter.set_args(node, tuple(turned if arg is x else arg for arg in node.args))
    wide = weight.double().movedim(axis, -1)
    rotated = block_hadamard(wide, block, None).movedim(-1, axis)
    rewriter.set_weight(linear.weight, rotated.to(weight.dtype).contiguous())


def _rotate(weight: Tensor, axis: int, rotation: DenseRotation, *, centred: bool) -> Tensor:
    """Return `weight` with the channels on `axis` rotated, computed some rows at a time.

    Args:
        weight: A matrix, a bias or an embedding.
        axis: The axis that runs over channels of the stream.
        rotation: The rotation.
        centred: Subtract the mean over the channels first.
    """
    rotated = torch.empty_like(weight)
    source, target = (torch.atleast_2d(x.movedim(axis, -1)) for x in (weight, rotated))  # views
    step = max(1, ROTATED_AT_ONCE // rotation.size)
    for first in range(0, len(source), step):
        rows = source[first : first + step].double()
        if centred:
            rows = rows - rows.mean(-1, keepdim=True)
        target[first : first + step] = rotation.apply(rows)
    return rotated
