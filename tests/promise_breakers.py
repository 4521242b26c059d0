"""A pass that keeps every promise, and passes that are like it but for one.

They stand in a module of their own, so that another process can import them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvxform.ir.facts import Requirement
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, approx

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleValues(GraphPass):
    """Double W_v and halve what attention returns: an identity before there is a cache."""

    factor: float = 2.0
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (False,), because="a cache would hold other values"),
    )
    source: ClassVar[str] = "a test"

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [self._look(program, site) for site in program.sites]

    def _look(self, program: Program, site: AttentionSite) -> Match | NoMatch:
        if self.pass_name() in program.passes:
            return NoMatch("values are doubled", site.layer, done=True)
        others = (site.q, site.k, *(s.v for s in program.sites if s.layer != site.layer))
        if site.v is None or site.latent or any(p and p.weight == site.v.weight for p in others):
            return NoMatch("W_v is not a matrix of its own", site.layer)
        return Match(site.layer)

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        site = program.site(match.layer or 0)
        self.double(program, site, rewriter)
        node = program.attention_node(site.layer)
        readers = list(node.users)
        half = rewriter.call_after(
            node, aten.mul.Scalar, (node, 1 / self.factor), type_=node.meta["type"]
        )
        for reader in readers:
            rewriter.set_args(reader, tuple(half if arg is node else arg for arg in reader.args))

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        for name in (site.v.weight, site.v.bias):
            if name is not None:
                rewriter.set_weight(name, program.weights[name] * self.factor)


class Undeclared(DoubleValues):
    source: ClassVar[str] = ""
    invalidates: ClassVar[tuple[str, ...]] = ("v.bases",)


@dataclass(frozen=True)
class ImpureMatch(DoubleValues):
    """`match` leaves a note in the program."""

    def match(self, program: Program) -> list[Match | NoMatch]:
        program.touched["head.weight"] = "impure-match"
        return super().match(program)


@dataclass(frozen=True)
class WriteInPlace(DoubleValues):
    """Weights are shared with the program before, and this one writes into them."""

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        program.weights[site.v.weight].mul_(self.factor)


@dataclass(frozen=True)
class WrongType(DoubleValues):
    """The new node says it is float16."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        node = next(iter(program.attention_node(match.layer or 0).users))
        node.meta["type"] = replace(node.meta["type"], dtype=torch.float16)


@dataclass(frozen=True)
class NoMeta(DoubleValues):
    """The verifier finds a node without metadata."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        next(iter(program.attention_node(match.layer or 0).users)).meta.clear()


@dataclass(frozen=True)
class NoProvenance(DoubleValues):
    """New nodes claim to come from the source."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        next(iter(program.attention_node(match.layer or 0).users)).meta["via"] = ()


@dataclass(frozen=True)
class RandomResult(DoubleValues):
    """The factor is drawn without a seed."""

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        noise = 1 + 1e-13 * torch.rand((), dtype=torch.float64)
        rewriter.set_weight(site.v.weight, program.weights[site.v.weight] * self.factor * noise)


@dataclass(frozen=True)
class HashedName(DoubleValues):
    """A weight is named by the hash of a string, another one in each process."""

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        super().double(program, site, rewriter)
        name = f"scale_{hash(site.module) % 1000}"
        rewriter.set_weight(name, program.weights[site.v.weight].new_ones(1))
        node = program.attention_node(site.layer)
        type_ = replace(node.meta["type"], shape=(1,))
        factor = rewriter.get_weight_node(name, node, type_)
        (reader,) = node.users
        scaled = rewriter.call_after(node, aten.mul.Tensor, (node, factor), type_=node.meta["type"])
        rewriter.set_args(reader, (scaled, *reader.args[1:]))


@dataclass(frozen=True)
class NeverDone(DoubleValues):
    """A second run doubles once more."""

    def match(self, program: Program) -> list[Match | NoMatch]:
        return super().match(replace(program, passes=()))


@dataclass(frozen=True)
class ReadsValues(DoubleValues):
    """A dry run has no values to read."""

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        assert float(program.weights[site.v.weight].abs().max()) > 0
        super().double(program, site, rewriter)


@dataclass(frozen=True)
class Swallow(DoubleValues):
    """Errors inside of the rewrite are hidden."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        with contextlib.suppress(Exception):
            super().rewrite(program, match, rewriter)


@dataclass(frozen=True)
class EvenHeadsOnly(DoubleValues):
    """A program it cannot take is not refused but breaks an assertion."""

    def match(self, program: Program) -> list[Match | NoMatch]:
        assert all(site.head_dim == 16 for site in program.sites), "I only know 16"
        return super().match(program)


@dataclass(frozen=True)
class FullStop(DoubleValues):
    """A reason ends in a full stop."""

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [*super().match(program), NoMatch("nothing here.")]


@dataclass(frozen=True)
class Inexact(DoubleValues):
    """Attention is not halved by what V was doubled by."""

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        rewriter.set_weight(site.v.weight, program.weights[site.v.weight] * self.factor * 1.001)


@dataclass(frozen=True)
class NotFinite(DoubleValues):
    """An approximate pass may lose something, but not everything."""

    numerics: ClassVar[Numerics] = approx("kl")

    def double(self, program: Program, site: AttentionSite, rewriter: Rewriter) -> None:
        weight = program.weights[site.v.weight]
        rewriter.set_weight(site.v.weight, torch.full_like(weight, float("nan")))
