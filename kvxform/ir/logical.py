"""From what a cache holds to what the source model would hold."""

from __future__ import annotations

from torch import Tensor

from kvxform.ir.program import Program
from kvxform.ir.residual import make_heads
from kvxform.ir.rotary import KeyRead


def unrotate_pair(program: Program, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return K and V of one layer in the basis of the source model.

    Args:
        program: The rewritten model; dense bases are among its weights.
        layer: Layer that reads the cache.
        k: Keys in the stored basis, `[..., Hk, T, D]`.
        v: Values in the stored basis; ignored where they are a view of the keys.
    """
    site, k = program.site(layer), source_keys(program, layer, k)
    if site.payload == "latent":
        return k, k[..., : site.v_head_dim]
    if site.residual is not None:
        spec, weights = site.residual, program.weights
        return k, make_heads(v, weights[spec.value], _weight(program, spec.value_bias))
    return k, site.v_basis.unrotate(v, program.weights)


def source_keys(program: Program, layer: int, k: Tensor) -> Tensor:
    """Return the keys of one layer as the source model attends to them, `[..., Hk, T, D]`.

    Args:
        program: See `unrotate_pair`.
        layer: Likewise.
        k: Stored keys of positions 0 to T - 1.
    """
    site = program.site(layer)
    if site.residual is not None:
        spec = site.residual
        k = make_heads(k, program.weights[spec.key], _weight(program, spec.key_bias))
    rope = program.site(site.owner).rope
    assert program.plan is not None, "what is cached was planned"
    if rope is None or program.plan.site(layer).key.rope != "pre":
        return site.k_basis.unrotate(k, program.weights)
    read = KeyRead(
        program.weights[rope.inv_freq], rope.rotary_dim, rope.attention_scaling, rope.interleaved
    )
    plain = site.k_basis.unrotate(k, program.weights)
    return read.apply(plain, 0, read.table(k.shape[-2], k.dtype))


def _weight(program: Program, name: str | None) -> Tensor | None:
    return None if name is None else program.weights[name]
