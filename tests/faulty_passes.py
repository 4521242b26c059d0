"""Passes of kvxform, each with one fault at one layer, as a change of the code could bring it in.

Bisect copies this file into its repro folders, so it imports nothing of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvxform.ir.program import Program
from kvxform.pass_base import Match, Rewriter
from kvxform.passes.rotation.rotate_v import RotateV as GoodRotateV

LAYER = 1  # where every fault is


@dataclass(frozen=True)
class RotateV(GoodRotateV):
    """The rotation of V is not undone in W_o."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate values, and forget to rotate back."""
        site = program.site(match.layer or 0)
        assert site.o is not None
        weight = program.weights[site.o.weight]
        super().rewrite(program, match, rewriter)
        if match.layer == LAYER:
            rewriter.set_weight(site.o.weight, weight)
