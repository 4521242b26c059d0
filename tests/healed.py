"""What tests of healing share: programs that a lossy pass has changed, and a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from programs import apply, llama_program
from torch import Tensor

from kvxform.ir.program import Program
from kvxform.pass_base import GraphPass, Match, NoMatch, Numerics, Rewriter, approx
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_v import RotateV

KEYS = [f"layers.{layer}.attn.{name}.weight" for layer in range(2) for name in "kv"]


def single(**options: Any) -> Program:
    """Return a source with one KV head, in float32."""
    return llama_program(dtype=torch.float32, heads=2, kv_heads=1, **options)


def cached(program: Program) -> Program:
    """Return `program` after exact passes that rewrite most of its weights."""
    for graph_pass in (FuseNorms(), RotateV(), InsertCache(), RotateQk()):
        program, _ = apply(graph_pass, program)
    return program


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
