"""Bases from second moments: eigenvectors, then a Hadamard matrix, in bit-reversed order.

Source: OSCAR, arXiv 2605.17757 (the composition R = U H P as reported; its code was not read).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvxform.ir.calibration import Calibration
from kvxform.ir.program import AttentionSite, Program
from kvxform.rotations.orders import hadamard_of_width


def spectral_basis(moments: Tensor) -> Tensor:
    """Return R = U H P of symmetric matrices, float64 `[Hk, D, D]`.

    U holds the eigenvectors of `moments` in the order of falling eigenvalues, H spreads each of
    them over all channels evenly, and P puts channels in bit-reversed order, so that neighbours
    share few rows of H.

    Args:
        moments: Second moments `[Hk, D, D]`; a Hadamard matrix of order D must be known.
    """
    wide = moments.double()
    _, vectors = torch.linalg.eigh(wide)
    vectors = vectors.flip(-1)
    largest = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()  # a sign is all that is left open
    dim = wide.shape[-1]
    mixed: Tensor = vectors @ hadamard_of_width(dim).to(wide)[:, bit_reversed(dim)]
    return mixed


def bit_reversed(size: int) -> Tensor:
    """Return 0 .. size - 1 in the order of their bits read backwards, int64 `[size]`."""
    bits = max(1, (size - 1).bit_length())
    keys = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(size)]
    return torch.tensor(sorted(range(size), key=keys.__getitem__))


def query_moments(program: Program, site: AttentionSite, calibration: Calibration) -> Tensor:
    """Return E[q q^T] over all query heads that read each KV head, float64 `[Hk, D, D]`."""
    grams = [
        calibration.layers[reader.layer].q_post.gram.unflatten(0, (site.num_kv_heads, -1))
        for reader in program.readers(site.owner)
    ]
    return torch.cat(grams, 1).mean(1)


def value_moments(program: Program, site: AttentionSite, calibration: Calibration) -> Tensor:
    """Return E[sum_t p_t v_t v_t^T] over the queries of all readers, float64 `[Hk, D, D]`."""
    readers = program.readers(site.owner)
    return torch.stack([calibration.layers[r.layer].v_weighted for r in readers]).mean(0)
