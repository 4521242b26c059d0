"""A program whose K and V are rounded to few bits in given bases, with gradients for the bases.

Rounding has no useful derivative, so gradients pass straight through it; they do reach the range of
each vector, which is what a rotation changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import rotate_heads
from kvxform.ir.program import Program, default_positions
from kvxform.ir.store import watching

Bases = Mapping[tuple[str, int], Tensor]  # ("key" or "value", owner layer) -> [Hk, D, D]


class RoundedProgram(fx.Interpreter):
    """Runs a program without a cache; every attention reads rounded keys and values.

    Args:
        program: What to run.
        bits: Bits of K and V, one scale and zero point a token and head.
    """

    def __init__(self, program: Program, bits: int) -> None:
        super().__init__(program.to_module())
        self._program, self._bits = program, bits
        self._owners = {site.layer: site.owner for site in program.sites}
        self._bases: Bases = {}

    def loss(self, token_ids: Tensor, bases: Bases) -> Tensor:
        """Return the mean cross entropy of the next token.

        Args:
            token_ids: int64 `[B, S]`.
            bases: Where K and V are rounded; streams that are not named keep their basis.
        """
        self._bases = bases
        with watching(self._program.store):
            logits = self.run(token_ids, default_positions(token_ids))[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one call, with the operands of attention rounded."""
        if target is kvx.ATTENTION:
            q, k, v, *rest = args
            owner = self._owners[kwargs["layer"]]
            k, v = self._round("key", owner, k), self._round("value", owner, v)
            args = (q, k, v, *rest)
        return super().call_function(kvx.DIFFERENTIABLE.get(target, target), args, kwargs)

    def _round(self, stream: str, owner: int, x: Tensor) -> Tensor:
        basis = self._bases.get((stream, owner))
        if basis is None:
            return fake_int(x, self._bits)
        return rotate_heads(fake_int(rotate_heads(x, basis), self._bits), basis.mT)


def fake_int(x: Tensor, bits: int) -> Tensor:
    """Return `x` `[..., D]` rounded to codes, with one scale and one integer zero point a vector.

    The equations are those of codec `int` on the token axis, with parameters that are not rounded.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    last = 2**bits - 1
    scale = ((high - low) / last).clamp_min(1e-8)
    zero = _round_through(-low / scale)
    codes = (_round_through(wide / scale) + zero).clamp(0, last)
    rounded: Tensor = ((codes - zero) * scale).to(x.dtype)
    return rounded


def _round_through(x: Tensor) -> Tensor:
    """Round, with the derivative of the identity."""
    return x + (x.round() - x).detach()
