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
        lossy_share: The same as a share of what the codes themselves cost against the source,
            where that is more; the more a model minds its codes, the more it minds one of them.
    """

    logits: float
    inputs: float
    state: float
    reads: float
    lossy_kl: float
    lossy_share: float

    def lossy_bound(self, cost: float) -> float:
        """Return the bound of two forms of a lossy program whose codes cost `cost` nats."""
        return max(self.lossy_kl, self.lossy_share * cost)


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # Sums of some thousand terms at 2.2e-16, through layers that amplify up to a hundredfold. No
    # code moves: a value would have to lie within 1e-14 of a boundary.
    torch.float64: Tolerance(1e-9, 1e-9, state=1e-12, reads=1e-10, lossy_kl=1e-6, lossy_share=0.0),
    # The same at 1.2e-7. One value in some ten thousand lies so near to a boundary.
    torch.float32: Tolerance(3e-4, 3e-4, state=1e-5, reads=1e-4, lossy_kl=2e-2, lossy_share=0.5),
    # Ten mantissa bits: one operation is already off by 1e-3.
    torch.float16: Tolerance(3e-2, 3e-2, state=5e-3, reads=1e-2, lossy_kl=5e-2, lossy_share=0.5),
    # Seven mantissa bits: 8e-3.
    torch.bfloat16: Tolerance(2e-1, 2e-1, state=3e-2, reads=6e-2, lossy_kl=1e-1, lossy_share=1.0),
}


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    """Return the row of `dtype`; a dtype without one is held to the float32 row."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])
