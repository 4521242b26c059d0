"""Ordinary attention as latent attention: which maps make the latent, and what comes back.

K of all KV heads before RoPE is one vector. A pair of channels that RoPE turns is one complex
number, and RoPE multiplies those of one frequency by the same phase in every head. So a real
orthogonal matrix over heads, one for each frequency, commutes with RoPE (RoRoPE). Principal
components over heads gather the energy of a frequency in few numbers. Some of these pairs keep
RoPE: they are the part e of a key that all heads share. The others lose it and join V in the
latent c.

With T = [E; N] the orthogonal matrix whose rows E make the pairs that keep RoPE and N the rest:

    q_h . R k_h = (E_h q) . R (E k) + (N_h q) . (N k)   where RoPE of the rest is left out
    c = P^T [N k / s; v],  N k ~ s P_k c,  v ~ P_v c    where P are principal components

Source: TransMLA, arXiv 2502.07864; which pairs keep RoPE by norms of q and k: MHA2MLA, arXiv
2502.14837. The weight of a frequency is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.structure.components import principal_components


@dataclass(frozen=True, eq=False)
class Turning:
    """How RoPE turns the keys of a site.

    Attributes:
        frequencies: Angle of each pair at position 1, float64 `[F]`.
        first: Channel of the first number of each pair, int64 `[F]`.
        second: Channel of the second one.
        head_dim: Channels of a head; those of no pair are not turned.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor
    head_dim: int

    @classmethod
    def of(cls, inv_freq: Tensor, head_dim: int, *, interleaved: bool) -> Turning:
        """Return the pairs of `kvx::rope`."""
        pair = torch.arange(len(inv_freq))
        pairs = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + len(inv_freq))
        return cls(inv_freq.double().cpu(), *pairs, head_dim)

    @property
    def still(self) -> Tensor:
        """Channels that are not turned, int64."""
        turned = torch.zeros(self.head_dim, dtype=torch.bool)
        turned[torch.cat([self.first, self.second])] = True
        return torch.nonzero(~turned)[:, 0]


@dataclass(frozen=True, eq=False)
class Mixing:
    """Orthogonal maps over the KV heads of a site that commute with RoPE.

    Attributes:
        shared: E, rows of pairs that keep RoPE, first numbers before second ones, `[p, Hk D]`.
        rest: N, `[n, Hk D]`.
        inv_freq: Angle of each pair of `shared`, `[p / 2]`.
        kept: Share of the estimated error of scores without any RoPE that keeping these avoids.
    """

    shared: Tensor
    rest: Tensor
    inv_freq: Tensor
    kept: float


@dataclass(frozen=True, eq=False)
class LatentMaps:
    """From keys and values of all heads to the latent and back.

    Attributes:
        down_k: What keys before RoPE add to the latent, `[rank, Hk D]`.
        down_v: What values add, `[rank, Hk Dv]`.
        up_k: Own channels of the keys of each head, without RoPE, `[Hk D, rank]`.
        up_v: Values of each head, `[Hk Dv, rank]`.
        key_error: Norm of the part of keys that is lost, as a share of that of keys.
        value_error: Likewise.
    """

    down_k: Tensor
    down_v: Tensor
    up_k: Tensor
    up_v: Tensor
    key_error: float
    value_error: float


def mix_heads(
    turning: Turning, heads: int, pairs: int, samples: tuple[Tensor, Tensor] | None, reach: int
) -> Mixing:
    """Return principal components over heads for each frequency, and which pairs keep RoPE.

    Those keep it whose scores would change most without: by the energies of q and k, and by how far
    their angle turns over the distances that occur.

    Args:
        turning: How RoPE turns keys.
        heads: KV heads.
        pairs: Pairs that keep RoPE, at most `heads` times the pairs of a head.
        samples: K `[Hk, N, D]` and Q `[H, N, D]` before RoPE; None for no mixing at all.
        reach: Longest distance of a query and a key.
    """
    count = len(turning.frequencies)
    bases = torch.eye(heads, dtype=torch.float64).repeat(count, 1, 1)  # [F, head, component]
    cost = torch.ones(count, heads, dtype=torch.float64)
    if samples is not None:
        k, q = (x.double() for x in samples)
        energies = []
        for f in range(count):
            both = torch.cat([k[..., turning.first[f]], k[..., turning.second[f]]], 1)  # [Hk, 2 N]
            found = principal_components(both.T, centred=False)
            bases[f] = found.basis
            energies.append(found.energy)
        square = q.square().mean(1).unflatten(0, (heads, -1)).sum(1)  # [Hk, D]
        asked = square[:, turning.first] + square[:, turning.second]  # [Hk, F]
        mixed = torch.einsum("fhj,hf->fj", bases.square(), asked)
        cost = torch.stack(energies) * mixed * _turned(turning.frequencies, reach)[:, None]
    order = cost.flatten().argsort(descending=True, stable=True)
    kept = order[:pairs]
    rows = _rows(turning, bases)  # [2, F, component, Hk D]
    flat = rows.flatten(1, 2)
    still = _still_rows(turning, heads)
    return Mixing(
        shared=flat[:, kept].flatten(0, 1),
        rest=torch.cat([flat[:, order[pairs:]].flatten(0, 1), still]),
        inv_freq=turning.frequencies[kept // heads],
        kept=float(cost.flatten()[kept].sum() / cost.sum().clamp_min(1e-300)),
    )


def fit_latent(
    mixing: Mixing, k: Tensor | None, v: Tensor | None, sizes: tuple[int, int], *, rank: int,
    balance: float,
) -> LatentMaps:  # fmt: skip
    """Return principal components of keys without RoPE and values, joined.

    Args:
        mixing: Which part of keys loses RoPE.
        k: Samples of keys before RoPE, `[N, Hk D]`, or None in a dry run.
        v: Of values, `[N, Hk Dv]`.
        sizes: Hk D and Hk Dv.
        rank: Channels of the latent.
        balance: How much keys weigh beside values of the same size.
    """
    keys, values = len(mixing.rest), sizes[1]
    basis, scale = torch.eye(keys + values, dtype=torch.float64), 1.0
    key_error = value_error = 0.0
    if k is not None and v is not None:
        rest, v = k.double() @ mixing.rest.T, v.double()
        if keys:
            scale = float(rest.norm(dim=1).mean() / (v.norm(dim=1).mean() * balance))
        joined = torch.cat([rest / scale, v], 1)
        basis = principal_components(joined, centred=False).basis
        lost = joined - joined @ basis[:, :rank] @ basis[:, :rank].T
        key_error = float(lost[:, :keys].norm() * scale / k.double().norm())
        value_error = float(lost[:, keys:].norm() / v.norm())
    part_k, part_v = basis[:, :rank].split([keys, values])
    return LatentMaps(
        down_k=part_k.T @ mixing.rest / scale,
        down_v=part_v.T,
        up_k=mixing.rest.T @ part_k * scale,
        up_v=part_v,
        key_error=key_error,
        value_error=value_error,
    )


def _turned(frequencies: Tensor, reach: int) -> Tensor:
    """Return the mean of |1 - exp(i w d)|^2 over distances d below `reach`, for each frequency."""
    distances = torch.arange(reach, dtype=torch.float64)
    return (2 - 2 * (frequencies[:, None] * distances).cos()).mean(1)


def _rows(turning: Turning, bases: Tensor) -> Tensor:
    """Return what makes both numbers of each component, `[2, F, Hk, Hk * D]`."""
    count, heads, _ = bases.shape
    rows = torch.zeros(2, count, heads, heads, turning.head_dim, dtype=torch.float64)
    for part, channels in enumerate((turning.first, turning.second)):
        for f, channel in enumerate(channels.tolist()):
            rows[part, f, :, :, channel] = bases[f].T  # [component, head]
    return rows.flatten(-2)


def _still_rows(turning: Turning, heads: int) -> Tensor:
    """Return what picks the channels that are not turned, `[heads * n, heads * D]`."""
    eye = torch.eye(heads * turning.head_dim, dtype=torch.float64)
    places = torch.arange(heads)[:, None] * turning.head_dim + turning.still
    return eye[places.flatten()]
