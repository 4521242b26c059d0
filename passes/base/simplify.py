"""simplify: rotations cancel, and scales move from cached elements to query, token or step.

In the graph, a Hadamard after an equal one is nothing, for the matrix is its own inverse. In the
plan, a stream with an affine codec is read folded: the scale of a key channel goes onto the query,
that of a token onto its score column or its probability, that of a value channel onto the output,
and zero points become one correction of rank one. `kvxform.codecs.folded` has the equations.
Legal everywhere: both are identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.base import CODECS
from kvxform.ir.facts import FactValue
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import ReadForm, StreamPlan
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

FOLDED = ReadForm("folded")


@register_pass
@dataclass(frozen=True)
class Simplify(GraphPass):
    """Cancel rotations in the graph and fold scales in the plan."""

    numerics: ClassVar[Numerics] = EXACT
    source: ClassVar[str] = "KIVI, arXiv 2402.02750, section 3.3 (fused read); own algebra"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that nothing is applied per cached element that need not be."""
        return {"read.simplified": True}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match pairs of rotations, and sites with a stream that can be read folded."""
        sites = program.plan.sites if program.plan else ()
        return [*_rotations(program), *(_check_site(site) for site in sites)]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Remove one pair of rotations, or set how one site is read."""
        if match.layer is not None:
            rewriter.update_site_plan(match.layer, **match.data)
            return
        outer = rewriter.node(match.node)
        inner = outer.args[0]
        assert isinstance(inner, fx.Node), "match found a rotation"
        value, signs = inner.args[0], inner.kwargs.get("signs")
        assert isinstance(value, fx.Node), "a rotation has an operand"
        if signs is not None:
            value = rewriter.call_before(
                outer, torch.ops.aten.mul.Tensor, (value, signs), type_=outer.meta["type"]
            )
        rewriter.replace(outer, value)


def _rotations(program: Program) -> list[Match | NoMatch]:
    """Pair rotations that follow each other, each at most once."""
    found: list[Match | NoMatch] = []
    paired: set[fx.Node] = set()
    for outer in program.calls(kvx.HADAMARD):
        inner = outer.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not kvx.HADAMARD or inner in paired:
            continue
        if inner.kwargs["block"] != outer.kwargs["block"]:
            hint = "give both rotations the same block"
            found.append(NoMatch("blocks of the two rotations differ", node=outer.name, hint=hint))
        elif outer.kwargs.get("signs") is not None:
            hint = "leave out the seed of the second rotation"
            reason = "signs stand between the two rotations"
            found.append(NoMatch(reason, node=outer.name, hint=hint))
        else:
            paired.add(outer)
            found.append(Match(node=outer.name))
    return found


def _check_site(site: SitePlan) -> Match | NoMatch:
    streams = {name: _folded(stream) for name, stream in site.streams.items()}
    if streams == site.streams:
        return NoMatch("no scale is applied per cached element", site.layer, done=True)
    return Match(site.layer, data=streams)


def _folded(stream: StreamPlan) -> StreamPlan:
    is_affine = CODECS[stream.codec["codec"]].is_affine
    return replace(stream, read=FOLDED) if is_affine and not stream.is_turned_at_read else stream
