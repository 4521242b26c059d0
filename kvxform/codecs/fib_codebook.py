"""Codebooks for blocks of k neighbouring coordinates of a uniform direction of D channels.

Such a block has a uniform direction of its own and a length with R^2 ~ Beta(k / 2, (D - k) / 2).
A codebook of N words starts from a spiral and is then polished on samples:

1. Lengths r_n = sqrt(BetaInv((n - 1/2) / N; k / 2, b)), with the companded shape
   b = k / (k + 2) * (D - k - 2) / 2 + 1: the density of words that is best at high rates.
2. Directions that fill the sphere evenly: the golden angle (k = 2), heights and angles of a
   Fibonacci sphere (k = 3), or normal quantiles (k >= 4). From k = 3 on they come from a Kronecker
   sequence with the generalised golden ratio, so that they do not go with the lengths.
3. Lloyd's iteration on samples of the block, from several rotations of the start; a word that no
   sample is nearest to moves next to the word of the largest error. The best codebook is polished
   again on more samples.

Source: FibQuant, arXiv 2605.11478; M. Roberts, The unreasonable effectiveness of quasirandom
sequences (the Kronecker sequence).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvxform.codecs.lloyd_tables import sphere_table
from kvxform.codecs.tables import cached_table

VERSION = 2  # of the method; part of the names of tables
RESTARTS = 4
STEPS = 25
SAMPLES_PER_WORD = (30, 60)  # while the start is chosen, and of the last polish
FEWEST_SAMPLES = 60_000  # of the last polish; a share of it while the start is chosen
WORK = 1 << 20  # scores held at a time
Array = NDArray[np.float64]


@functools.cache
def codebook(words: int, k: int, dim: int) -> Tensor:
    """Return the codebook of blocks of a unit vector, float32 `[words, k]`.

    Args:
        words: Number of words, at least 2.
        k: Coordinates of a block, at least 1; 1 gives the Lloyd-Max table.
        dim: Channels of the vector, at least k + 3.
    """
    if k == 1:
        return sphere_table(words, dim)[:, None]
    name = f"fib-{words}-{k}-{dim}-v{VERSION}"
    return cached_table(name, lambda: _build(words, k, dim))


def nearest(blocks: Tensor, book: Tensor) -> Tensor:
    """Return the index of the nearest word of each block: the largest 2 x . c - |c|^2.

    Args:
        blocks: `[M, k]`.
        book: `[N, k]`, same dtype and device.

    Returns:
        int64 `[M]`.
    """
    if book.shape[1] == 1:
        ordered = book[:, 0].contiguous()
        return torch.bucketize(blocks[:, 0].contiguous(), (ordered[1:] + ordered[:-1]) / 2)
    half = book.square().sum(-1) / -2
    rows = max(1, WORK // len(book))
    return torch.cat([_argmax(torch.addmm(half, part, book.mT)) for part in blocks.split(rows)])


def _argmax(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # several times as fast as torch here
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)


def spiral(words: int, k: int, dim: int) -> Array:
    """Return the start of the codebook, float64 `[words, k]`, words by ascending length."""
    from scipy.special import betaincinv  # only where a codebook is built: it is slow to import

    shape = k / (k + 2) * (dim - k - 2) / 2 + 1
    lengths = np.sqrt(betaincinv(k / 2, shape, (np.arange(words) + 0.5) / words))
    return np.asarray(lengths[:, None] * _directions(words, k))


def sample_blocks(count: int, k: int, dim: int, seed: int) -> Array:
    """Return blocks of `count` independent uniform directions, float64 `[count, k]`."""
    generator = np.random.default_rng(seed)
    block = generator.standard_normal((count, k))
    rest = generator.chisquare(dim - k, (count, 1))
    return np.asarray(block / np.sqrt(np.square(block).sum(-1, keepdims=True) + rest))


def _directions(words: int, k: int) -> Array:
    index: Array = np.arange(words, dtype=np.float64) + 0.5
    if k == 2:
        angle = index * math.pi * (3 - math.sqrt(5))
        return np.stack([np.cos(angle), np.sin(angle)], -1)
    if k == 3:
        share = _kronecker(index, 2)
        height, angle = 1 - 2 * share[:, 0], 2 * math.pi * share[:, 1]
        ring = np.sqrt(1 - height * height)
        return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], -1)
    from scipy.special import ndtri

    normal = ndtri(_kronecker(index, k))
    return np.asarray(normal / np.linalg.norm(normal, axis=-1, keepdims=True))


def _kronecker(index: Array, k: int) -> Array:
    """Return points of [0, 1)^k: multiples of powers of the root of x^(k + 1) = x + 1 above 1."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (k + 1))
    return np.asarray(np.modf(index[:, None] * ratio ** -np.arange(1.0, k + 1))[0])


def _build(words: int, k: int, dim: int) -> Tensor:
    few, many = (words * count for count in SAMPLES_PER_WORD)
    samples = _samples(max(many, FEWEST_SAMPLES), k, dim, seed=1)
    draft = _samples(max(few, FEWEST_SAMPLES // RESTARTS), k, dim, seed=0)
    tries = [_polish(turned, draft)[1] for turned in _turned(spiral(words, k, dim), RESTARTS)]
    chosen = min(tries, key=lambda book: _error(book, samples))
    return _polish(chosen, samples)[1]


def _error(book: Tensor, blocks: Tensor) -> float:
    return float((blocks - book[nearest(blocks, book)]).square().sum(-1).double().mean())


def _turned(start: Array, count: int) -> list[Tensor]:
    """Return `start` as it is and in random rotations, `count` in all, float32."""
    generator = np.random.default_rng(0)
    k = start.shape[1]
    turns = [np.linalg.qr(generator.standard_normal((k, k)))[0] for _ in range(count - 1)]
    return [torch.from_numpy(start @ turn).float() for turn in (np.eye(k), *turns)]


def _samples(count: int, k: int, dim: int, seed: int) -> Tensor:
    return torch.from_numpy(sample_blocks(count, k, dim, seed)).float()


def _polish(book: Tensor, blocks: Tensor) -> tuple[float, Tensor]:
    """Return (mean squared error, codebook) after Lloyd's iteration, the best that was met."""
    best = (math.inf, book)
    for _ in range(STEPS):
        owner = nearest(blocks, book)
        errors = (blocks - book[owner]).square().sum(-1)
        best = min(best, (float(errors.double().mean()), book), key=lambda found: found[0])
        book = _means(blocks, owner, errors, book)
    return best


def _means(blocks: Tensor, owner: Tensor, errors: Tensor, book: Tensor) -> Tensor:
    """Return the mean of the blocks of each word; empty words split the words of largest error."""
    words = len(book)
    counts = torch.bincount(owner, minlength=words)
    sums = torch.zeros(words, blocks.shape[1], dtype=torch.float64)
    sums.index_add_(0, owner, blocks.double())
    means = (sums / counts.clamp_min(1)[:, None]).float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        totals = torch.zeros(words, dtype=torch.float64).index_add_(0, owner, errors.double())
        worst = totals.topk(len(empty)).indices
        means[empty] = means[worst] * 1.01
        means[worst] = means[worst] * 0.99
    return means
