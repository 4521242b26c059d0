"""fuse-projections: linear layers that read the same values become one, and slices of its output.

[W_q; W_k; W_v] x is one product instead of three, and so are gate and up of a gated MLP. A decode
step reads every weight once for a few rows; products of a few megabytes each leave much of the
memory bandwidth unused, one larger product does not. Legal for `aten.linear` with plain weights
that nothing else reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kvxform.ir.linear import LINEAR, LinearCall, as_linear, weight_uses
from kvxform.ir.program import Program, Projection
from kvxform.ir.types import TensorType
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

SLICE = torch.ops.aten.slice.Tensor
PROJECTIONS = ("q", "k", "v")


@register_pass
@dataclass(frozen=True)
class FuseProjections(GraphPass):
    """Make one linear layer of those that read the same values."""

    numerics: ClassVar[Numerics] = EXACT
    source: ClassVar[str] = "Megatron-LM, arXiv 1909.08053, section 3 (fused QKV)"

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every value that two or more linear layers read."""
        uses, latent = weight_uses(program), _latent_weights(program)
        found: list[Match | NoMatch] = []
        for node in program.graph.nodes:
            linears = _readers(node)
            if len(linears) > 1:
                found.append(_check(node, linears, uses, latent))
            elif linears and any(_is_fused(user) for user in node.users):
                found.append(NoMatch("already one projection", node=node.name, done=True))
        return found

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Stack the weights, and let each old layer become a slice of the new one's output."""
        linears: tuple[LinearCall, ...] = match.data["linears"]
        nodes = [rewriter.node(linear.node) for linear in linears]
        name = _joint_name([linear.weight for linear in linears])
        weights = [program.weights[linear.weight] for linear in linears]
        names = [linear.weight for linear in linears]
        rewriter.set_weight(f"{name}.weight", torch.cat(weights), made_from=names)
        bias_names = [linear.bias for linear in linears if linear.bias is not None]
        if bias_names:
            biases = torch.cat([program.weights[name] for name in bias_names])
            rewriter.set_weight(f"{name}.bias", biases, made_from=bias_names)
        self._replace(nodes, name, bool(bias_names), rewriter)
        start = 0
        for linear, weight in zip(linears, weights, strict=True):
            _move_projection(program, linear.weight, name, bool(bias_names), start, rewriter)
            start += len(weight)

    def _replace(self, nodes: list[fx.Node], name: str, has_bias: bool, rewriter: Rewriter) -> None:
        first, widths = nodes[0], [node.meta["type"].shape[-1] for node in nodes]
        *shape, _ = first.meta["type"].shape
        dtype = first.meta["type"].dtype
        keys = [f"{name}.weight", f"{name}.bias"][: 1 + has_bias]
        operands = []
        for key in keys:
            type_ = TensorType(dtype, tuple(rewriter.program.weights[key].shape))
            operands.append(rewriter.get_weight_node(key, first, type_))
        whole = TensorType(dtype, (*shape, sum(widths)))
        joint = rewriter.call_before(first, LINEAR, (first.args[0], *operands), type_=whole)
        start, anchor = 0, joint
        for node, width in zip(nodes, widths, strict=True):
            part = TensorType(dtype, (*shape, width))
            args = (joint, len(shape), start, start + width)
            anchor = rewriter.call_after(anchor, SLICE, args, type_=part, like=node)
            rewriter.replace(node, anchor)
            start += width


def _readers(node: fx.Node) -> list[LinearCall]:
    """Return the linear layers that read `node`, in graph order."""
    if node.op == "get_attr":
        return []
    calls = [as_linear(user, node) for user in node.users if user.target is LINEAR]
    return [call for call in calls if call is not None]


def _check(
    node: fx.Node, linears: list[LinearCall], uses: Mapping[str, int], latent: set[str]
) -> Match | NoMatch:
    for linear in linears:
        for name in filter(None, (linear.weight, linear.bias)):
            if uses[name] != 1:
                reason = f"weight {name} is read in {uses[name]} places"
                hint = "untie it: give every layer that reads it a weight of its own"
                return NoMatch(reason, node=node.name, hint=hint)
        if linear.weight in latent:
            reason = f"weight {linear.weight} makes keys and values from a latent"
            return NoMatch(reason, node=node.name, hint="put cache-latent before it")
    if len({linear.bias is None for linear in linears}) > 1:
        return NoMatch("some of the linear layers have a bias and some have none", node=node.name)
    return Match(node=node.name, data={"linears": tuple(linears)})


def _latent_weights(program: Program) -> set[str]:
    latents = [site.latent for site in program.sites if site.latent is not None]
    return {up.weight for latent in latents for up in (latent.up_k, latent.up_v)}


def _is_fused(node: fx.Node) -> bool:
    """Whether a node is a linear layer of which there are slices only."""
    readers = list(node.users)
    return node.target is LINEAR and len(readers) > 1 and all(r.target is SLICE for r in readers)


def _joint_name(weights: list[str]) -> str:
    """Return a name for the stack: `a.q.weight`, `a.k.weight` -> `a.q_k`."""
    stems = [name.removesuffix(".weight") for name in weights]
    folder = stems[0].rpartition(".")[0]
    joint = "_".join(stem.rpartition(".")[2] for stem in stems)
    return f"{folder}.{joint}" if folder else joint


def _move_projection(
    program: Program, weight: str, name: str, has_bias: bool, start: int, rewriter: Rewriter
) -> None:
    """Tell sites where the rows of `weight` are now."""
    for site in program.sites:
        changes: dict[str, Projection] = {}
        for field in PROJECTIONS:
            old: Projection | None = getattr(site, field)
            if old is not None and old.weight == weight:
                changes[field] = dataclasses.replace(
                    old,
                    weight=f"{name}.weight",
                    bias=f"{name}.bias" if has_bias else None,
                    start=old.start + start,
                )
        if changes:
            rewriter.update_site(site.layer, **changes)
