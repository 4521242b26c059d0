"""Heads mixed into fewer: the best linear map from t heads to one, and back.

A group of t heads is stored as one vector of the size of one head::

    stored = [x_1 | ... | x_t] @ down        x_h is read as stored @ up_h^T

The map back has a place where it costs nothing: q . (s up^T) = (q up) . s for keys, and
(p s up^T) W_o = (p s) (up^T W_o) for values. The map there is linear too, so it moves into W_k and
W_v wherever nothing stands between.

Source: mean, GQA, arXiv 2305.13245, section 2.1; singular vectors of what calibration has seen,
arXiv 2406.07056. Mixes that commute with RoPE are our own derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2  # share of the mean that is added to what errors cost


@dataclass(frozen=True, eq=False)
class Mix:
    """What t heads of D channels of each group become, and what is read of them.

    Attributes:
        down: float64 `[groups, t * D, D]`.
        up: float64 `[groups * t, D, D]`, for the heads in the order of `down`.
    """

    down: Tensor
    up: Tensor

    def join(self, x: Tensor) -> Tensor:
        """Return what is stored of heads `[groups * t, N, D]`: `[groups, N, D]`."""
        return join_heads(x, len(self.down)) @ self.down

    def errors(self, x: Tensor) -> list[float]:
        """Return the norm of what each group of heads `[groups * t, N, D]` loses, as a share."""
        x, groups = x.double(), len(self.down)
        stored = self.join(x).repeat_interleave(len(x) // groups, 0)
        lost = (x - stored @ self.up.mT).square().sum((1, 2)).view(groups, -1).sum(1)
        whole = x.square().sum((1, 2)).view(groups, -1).sum(1)
        return [float(n) for n in (lost / whole.clamp_min(1e-300)).sqrt()]


@dataclass(frozen=True)
class Turns:
    """Which channels of a head RoPE turns together.

    Attributes:
        rotary_dim: The first so many channels turn in pairs; the others are left alone.
        interleaved: Pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
    """

    rotary_dim: int
    interleaved: bool = False

    def pairs(self) -> Tensor:
        """Return the two channels of each pair, int64 `[2, rotary_dim / 2]`."""
        half = torch.arange(self.rotary_dim // 2)
        if self.interleaved:
            return torch.stack([2 * half, 2 * half + 1])
        return torch.stack([half, half + self.rotary_dim // 2])


def join_heads(x: Tensor, groups: int) -> Tensor:
    """Return heads `[groups * t, N, D]` side by side, float64 `[groups, N, t * D]`."""
    joined: Tensor = x.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    return joined


def mean_mix(heads: int, groups: int, dim: int) -> Mix:
    """Return the mix that stores the mean of each group, which is read as every head of it."""
    eye = torch.eye(dim, dtype=torch.float64)
    together = heads // groups
    down = (eye / together).repeat(groups, together, 1)
    return Mix(down, eye.expand(heads, -1, -1))


def plain_mix(x: Tensor, groups: int) -> Mix:
    """Return the mix with the smallest squared error over samples `[heads, N, D]`.

    What it loses are the singular values of the joined heads behind the first D.
    """
    dim = x.shape[-1]
    return _from_vectors(_leading_vectors(join_heads(x, groups), dim), len(x) // groups)


def turning_mix(x: Tensor, groups: int, turns: Turns) -> Mix:
    """Return the best mix over samples `[heads, N, D]` that commutes with RoPE.

    A pair of channels that turn together is a complex number, and RoPE a product with another. A
    sum over heads with one complex factor for each head and pair commutes with that; the best
    factors of a pair are the first singular vector of its t complex numbers. As real matrices
    they turn pairs and scale them. Channels that do not turn are mixed freely, among themselves.
    """
    heads, _, dim = x.shape
    together = heads // groups
    first, second = turns.pairs()
    wide = x.double().unflatten(0, (groups, together))  # [groups, t, N, D]
    numbers = torch.complex(wide[..., first], wide[..., second]).permute(0, 3, 2, 1)
    factors = _leading_vectors(numbers, 1)[..., 0].transpose(1, 2)  # [groups, t, pairs]
    down = torch.zeros(groups, together, dim, dim, dtype=torch.float64)
    down[..., first, first] = down[..., second, second] = factors.real
    down[..., first, second] = factors.imag
    down[..., second, first] = -factors.imag
    rest = dim - turns.rotary_dim
    if rest:
        vectors = _leading_vectors(join_heads(x[..., turns.rotary_dim :], groups), rest)
        down[..., turns.rotary_dim :, turns.rotary_dim :] = vectors.unflatten(1, (together, rest))
    return _from_vectors(down.flatten(1, 2), together)


def weighed_mix(mix: Mix, roots: Tensor) -> Mix:
    """Return the mix of heads x, from the best one of heads `x @ roots`.

    It has the smallest squared error of x_h @ roots_h: the roots say what errors cost.

    Args:
        mix: The best mix of the weighed heads.
        roots: Symmetric and positive, `[heads, D, D]`.
    """
    together = len(roots) // len(mix.down)
    parts = mix.down.unflatten(1, (together, -1)).flatten(0, 1)
    down = (roots @ parts).unflatten(0, (-1, together)).flatten(1, 2)
    return Mix(down, torch.linalg.solve(roots, mix.up))


def score_roots(moments: Tensor, turns: Turns | None) -> Tensor:
    """Return what errors of keys cost in scores: roots of E[q q^T] of the queries that read them.

    Args:
        moments: float64 `[heads, D, D]`.
        turns: Channels that RoPE turns after keys are mixed, or None. A pair of them has one
            number, for anything else would not commute.
    """
    if turns is None:
        return _roots(moments)
    roots = torch.zeros_like(moments)
    first, second = turns.pairs()
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    size = (diagonal[:, first] + diagonal[:, second]) / 2
    cost = (size + RIDGE * size.mean(-1, keepdim=True)).sqrt()
    roots[:, first, first] = roots[:, second, second] = cost
    rest = slice(turns.rotary_dim, None)
    if turns.rotary_dim < moments.shape[-1]:
        roots[:, rest, rest] = _roots(moments[:, rest, rest])
    return roots


def output_roots(rows: Tensor, heads: int) -> Tensor:
    """Return what errors of values cost in outputs, from rows of W_o `[H, D, n]`.

    H may be several times the KV heads: those of every layer that reads them, one after the other.
    """
    grams = rows.double() @ rows.double().mT
    return _roots(grams.unflatten(0, (heads, -1)).sum(1))


def _roots(moments: Tensor) -> Tensor:
    """Return symmetric roots of moments `[n, D, D]`, damped so that they can be inverted."""
    values, vectors = torch.linalg.eigh(moments)
    damped = values.clamp_min(0) + RIDGE * values.mean(-1, keepdim=True).clamp_min(1e-30)
    roots: Tensor = (vectors * damped.sqrt()[:, None]) @ vectors.mT
    return roots


def mixed_rows(rows: Tensor, mix: Mix) -> Tensor:
    """Return the rows that make what is stored, from those that make heads `[heads, D, n]`."""
    groups = len(mix.down)
    joined = rows.double().reshape(groups, -1, rows.shape[-1])  # [groups, t * D, n]
    return mix.down.mT.to(rows.device) @ joined


def reading_rows(rows: Tensor, mix: Mix) -> Tensor:
    """Return rows of query heads or of W_o, `[H, D, n]`, that meet what is stored.

    Heads are in the order of the mix: the first H / heads of them read its first head.
    """
    up = mix.up.to(rows.device).repeat_interleave(len(rows) // len(mix.up), 0)
    return up.mT @ rows.double()


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return x `[n, ...]` with equal runs of rows, one a head, in the order of `order`."""
    runs = x.unflatten(0, (len(order), -1))
    moved: Tensor = runs[torch.tensor(order, device=x.device)].flatten(0, 1)
    return moved


def _from_vectors(down: Tensor, together: int) -> Mix:
    """Return the mix of orthonormal columns, `[groups, t * D, D]`: its own way back."""
    return Mix(down, down.unflatten(1, (together, -1)).flatten(0, 1))


def _leading_vectors(x: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of `[..., N, n]` as columns, `[..., n, count]`.

    They are orthonormal, whatever N and the rank are. Of each the largest entry is positive.
    """
    triangle = torch.linalg.qr(x, mode="r").R
    vectors = torch.linalg.svd(triangle, full_matrices=True).Vh.mH[..., :count]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    signed: Tensor = vectors * torch.sgn(largest).conj()
    return signed
