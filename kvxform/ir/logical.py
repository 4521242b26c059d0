"""From what a cache holds to what the source model would hold."""

from __future__ import annotations

from torch import Tensor

from kvxform.ir.program import Program


def unrotate_pair(program: Program, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return K and V of one layer in the basis of the source model.

    Args:
        program: The rewritten model; dense bases are among its weights.
        layer: Layer that reads the cache.
        k: Keys in the stored basis, `[..., Hk, T, D]`.
        v: Values in the stored basis; ignored where they are a view of the keys.
    """
    site = program.site(layer)
    k = site.k_basis.unrotate(k, program.weights)
    if site.payload == "latent":
        return k, k[..., : site.v_head_dim]
    return k, site.v_basis.unrotate(v, program.weights)
