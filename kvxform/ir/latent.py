"""Where the latent of a site is in the graph, before `cache-latent` has run.

Capture writes the keys of such a site in one form, on which everything here relies::

    k = cat([heads of the up-projection, expand(shared part)], -1)      (or the other way round)

and leaves the up-projection as one linear layer, or two, on the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from kvxform.ir.linear import as_linear
from kvxform.ir.program import AttentionSite, LatentSpec, Program
from kvxform.ir.types import TensorType

CAT = torch.ops.aten.cat.default
EXPAND = torch.ops.aten.expand.default
SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class LatentNodes:
    """The parts of what is cached for a site with a latent.

    Attributes:
        latent: `[B, S, rank]` or `[B, 1, S, rank]`.
        shared: Part of the keys that all heads share, after RoPE, `[B, 1, S, rope_dim]`.
    """

    latent: fx.Node
    shared: fx.Node


def find_latent(program: Program, site: AttentionSite) -> LatentNodes | str:
    """Return the nodes of the latent of a site, or what differs from the form of capture.

    Args:
        program: Before `cache-latent`.
        site: One with a `latent`.
    """
    spec = site.latent
    assert spec is not None, "the caller has looked"
    _, k, v, _ = program.attention_node(site.layer).args[:4]
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    assert isinstance(v, fx.Node), "operands of attention are nodes"
    shared = _shared_part(k, spec)
    if shared is None:
        return "keys are not written as heads beside a part that all of them share"
    latent = _input_of(v, spec.up_v.weight)
    if latent is None or _input_of(k, spec.up_k.weight) is not latent:
        return "keys and values are not made of the same vector"
    return LatentNodes(latent, shared)


def joined_part(x: fx.Node, start: int, stop: int) -> fx.Node | None:
    """Return the node that is channels `start` to `stop` of `x`, if `x` has been joined from it."""
    parts = x.args[0] if x.target is CAT and x.args[1] == -1 else ()
    at = 0
    for part in parts if isinstance(parts, list | tuple) else ():
        assert isinstance(part, fx.Node), "what is joined are nodes"
        width = part.meta["type"].shape[-1]
        if (at, at + width) == (start, stop):
            return part
        at += width
    return None


def _shared_part(k: fx.Node, spec: LatentSpec) -> fx.Node | None:
    parts = k.args[0] if k.target is CAT else ()
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    spread = parts[0 if spec.shared_first else 1]
    if not isinstance(spread, fx.Node) or spread.target is not EXPAND:
        return None
    shared = spread.args[0]
    assert isinstance(shared, fx.Node), "what is expanded is a node"
    type_ = shared.meta["type"]
    is_one = isinstance(type_, TensorType) and type_.shape == ("B", 1, "S", spec.rope_dim)
    return shared if is_one else None


def _input_of(node: fx.Node, weight: str) -> fx.Node | None:
    """Return what the linear layer with `weight` reads, on the way back from `node`."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for source in current.all_input_nodes:
            linear = as_linear(current, source)
            if linear is not None and linear.weight == weight:
                return source
        stack.extend(current.all_input_nodes)
    return None
