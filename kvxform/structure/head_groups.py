"""Which KV heads become one: neighbours, or those that calibration has found alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.structure.head_mixes import Turns

MOST_TOKENS = 512  # of the samples that similarities are computed from


def mean_similarity(x: Tensor) -> Tensor:
    """Return cosines between heads `[heads, N, D]`, float64 `[heads, heads]`: for their mean."""
    rows = x.double().flatten(1)
    return _normalised(rows @ rows.T, rows.square().sum(1))


def plain_similarity(x: Tensor) -> Tensor:
    """Return how far heads `[heads, N, D]` are linear images of each other, float64.

    It is 1 where one is an orthogonal image of the other. Source: CKA with a linear kernel,
    arXiv 1905.00414, section 3, not centred.
    """
    few = x[:, :MOST_TOKENS].double()
    kernels = (few @ few.mT).flatten(1)  # [heads, N * N]
    return _normalised(kernels @ kernels.T, kernels.square().sum(1))


def turning_similarity(x: Tensor, turns: Turns) -> Tensor:
    """Return the same under mixes that commute with RoPE: one complex factor for each pair."""
    first, second = turns.pairs()
    wide = x.double()
    numbers = torch.complex(wide[..., first], wide[..., second])  # [heads, N, pairs]
    products = torch.einsum("anf,bnf->fab", numbers, numbers.conj()).abs().sum(0)
    rest = wide[..., turns.rotary_dim :].flatten(1)
    return _normalised(products + (rest @ rest.T).abs(), wide.square().sum((1, 2)))


def similar_order(similarity: Tensor, groups: int) -> tuple[int, ...]:
    """Return an order of heads whose equal runs are groups of heads that are alike.

    Neighbours first; then two heads change places, always the best two, while that makes heads of
    a group more alike. So the groups are never worse than neighbours.

    Args:
        similarity: `[heads, heads]`, symmetric.
        groups: A divisor of the number of heads.
    """
    heads = len(similarity)
    place = torch.arange(heads) // (heads // groups)
    pairs = torch.tensor(list(itertools.combinations(range(heads), 2)), dtype=torch.int64)
    a, b = pairs.reshape(-1, 2).T
    while len(pairs):
        member = (place[:, None] == torch.arange(groups)).to(similarity)
        to_group = similarity @ member  # of each head to the heads of each group, itself included
        own, other = place[a], place[b]
        gain = to_group[a, other] - similarity[a, b] + to_group[b, own] - similarity[a, b]
        gain -= to_group[a, own] - similarity[a, a] + to_group[b, other] - similarity[b, b]
        gain[own == other] = 0
        best = int(gain.argmax())
        if float(gain[best]) <= 1e-9:
            break
        place[a[best]], place[b[best]] = place[b[best]].clone(), place[a[best]].clone()
    return _by_group(place.tolist(), groups)


def _by_group(place: Sequence[int], groups: int) -> tuple[int, ...]:
    """Return heads group by group, groups in the order of their first heads."""
    members = [[head for head, own in enumerate(place) if own == group] for group in range(groups)]
    return tuple(head for group in sorted(members) for head in group)


def _normalised(products: Tensor, squares: Tensor) -> Tensor:
    norms = squares.clamp_min(1e-300).sqrt()
    return products / (norms[:, None] * norms)
