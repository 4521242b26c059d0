"""The one table of tolerances: how far two computations of the same thing may lie apart.

Errors are shares of the largest value compared. Each entry is ten to fifty times what models of 2
to 30 layers show, so that rounding passes, and a wrong formula, off by 1e-2 or more, does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Bounds in one dtype.

    Attributes:
        logits: Logits of two exact programs.
        inputs: K and V that an exact program hands to its cache, against those of the source.
        state: What a cache holds, against the equations applied to the same K and V.
        reads: Outputs of attention, against the equations applied to the same q, K and V.
        lossy_kl: Mean KL divergence in nats between two exact forms of one lossy program. Rounding
            moves a few codes across a boundary there, and later layers see whole steps of it.
    """

    logits: float
    inputs: float
    state: float
    reads: float
    lossy_kl: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # Sums of some thousand terms at 2.2e-16, through layers that amplify up to a hundredfold.
    torch.float64: Tolerance(logits=1e-9, inputs=1e-9, state=1e-12, reads=1e-10, lossy_kl=1e-6),
    # The same at 1.2e-7.
    torch.float32: Tolerance(logits=3e-4, inputs=3e-4, state=1e-5, reads=1e-4, lossy_kl=2e-2),
    # Ten mantissa bits: one operation is already off by 1e-3.
    torch.float16: Tolerance(logits=3e-2, inputs=3e-2, state=5e-3, reads=1e-2, lossy_kl=5e-2),
    # Seven mantissa bits: 8e-3.
    torch.bfloat16: Tolerance(logits=2e-1, inputs=2e-1, state=3e-2, reads=6e-2, lossy_kl=1e-1),
}


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    """Return the row of `dtype`; a dtype without one is held to the float32 row."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])
