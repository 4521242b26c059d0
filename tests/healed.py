"""What tests of healing share: programs that a lossy pass has changed, and a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from programs import apply
from torch import Tensor

from kvxform.ir.program import Program
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx


@dataclass(frozen=True)
class Disturb(GraphPass):
    """Add noise to weights, half as large as they are."""

    numerics: ClassVar[Numerics] = approx("kl")
    names: tuple[str, ...] = ()

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [Match()]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        generator = torch.Generator().manual_seed(1)
        for name in self.names:
            weight = program.weights[name]
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            rewriter.set_weight(name, weight + (0.5 * weight.std() * noise).to(weight.dtype))


def disturbed(program: Program, names: Sequence[str]) -> Program:
    """Return `program` with noise on weights that healing may train."""
    return apply(Disturb(tuple(names)), program)[0]


def text_ids(windows: int, window: int, vocab: int = 48) -> Tensor:
    """Return random tokens, int64 `[windows * window]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab, (windows * window,), generator=generator)
