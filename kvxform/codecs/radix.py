"""Codes of any number of levels in bytes: several codes make one number, written in a few bytes.

A word of m <= 7 bytes holds n codes q_0 .. q_(n-1) of L levels as sum_i q_i L^i, lowest byte first,
with L^n <= 256^m. n and m are those that waste least: 5 levels take 24 codes in 7 bytes, 2.333 bits
a code, where log2(5) = 2.322. Words follow each other; the codes that are left over make one
shorter word. Numbers of levels that are a power of two, at most 256, are packed as `packing` does
where the number of codes lets it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvxform.codecs.packing import channel_multiple, pack, packed_bytes, unpack

LARGEST_WORD = 7  # bytes; int64 holds every value


def packed_level_bytes(count: int, levels: int) -> int:
    """Return bytes of one packed row of `count` codes of `levels` levels."""
    bits = whole_bits(count, levels)
    if bits:
        return packed_bytes(count, bits)
    return sum(size * words for _, size, words in words_of(count, levels))


def pack_levels(codes: Tensor, levels: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: Integers `[..., N]`, each at least 0 and below `levels`.
        levels: Number of levels, at least 2.

    Returns:
        uint8 `[..., packed_level_bytes(N, levels)]`.
    """
    count = codes.shape[-1]
    bits = whole_bits(count, levels)
    if bits:
        return pack(codes.to(torch.uint8), bits)
    words, parts, first = words_of(count, levels), [], 0
    for num_codes, num_bytes, num_words in words:
        run = codes[..., first : first + num_codes * num_words].long()
        digits = run.unflatten(-1, (num_words, num_codes))
        values = (digits * _powers(levels, num_codes, codes.device)).sum(-1, keepdim=True)
        shifts = 8 * torch.arange(num_bytes, device=codes.device)
        parts.append(((values >> shifts) & 255).to(torch.uint8).flatten(-2))
        first += num_codes * num_words
    return torch.cat(parts, -1)


def unpack_levels(packed: Tensor, levels: int, count: int) -> Tensor:
    """Return the `count` codes, int64 `[..., count]`, of what `pack_levels` returned."""
    bits = whole_bits(count, levels)
    if bits:
        return unpack(packed, bits).long()
    parts, first = [], 0
    for num_codes, num_bytes, num_words in words_of(count, levels):
        run = packed[..., first : first + num_bytes * num_words].long()
        shifts = 8 * torch.arange(num_bytes, device=packed.device)
        values = (run.unflatten(-1, (num_words, num_bytes)) << shifts).sum(-1, keepdim=True)
        powers = _powers(levels, num_codes, packed.device)
        parts.append((values.div(powers, rounding_mode="floor") % levels).flatten(-2))
        first += num_bytes * num_words
    return torch.cat(parts, -1)


def whole_bits(count: int, levels: int) -> int:
    """Return bits of a code if `packing` takes such codes, else 0."""
    bits = levels.bit_length() - 1
    fits = levels == 1 << bits and bits <= 8 and count % channel_multiple(bits) == 0
    return bits if fits else 0


@functools.cache
def words_of(count: int, levels: int) -> tuple[tuple[int, int, int], ...]:
    """Return (codes of a word, bytes of a word, number of words) of the full and the last word."""
    num_codes, num_bytes = _best_word(levels)
    full, rest = divmod(count, num_codes)
    last = (rest, _bytes_of(rest, levels), 1)
    return tuple(run for run in ((num_codes, num_bytes, full), last) if run[0] and run[2])


def _best_word(levels: int) -> tuple[int, int]:
    most = [(_codes_in(size, levels), size) for size in range(1, LARGEST_WORD + 1)]
    return max(most, key=lambda word: (word[0] / word[1], -word[1]))


def _codes_in(size: int, levels: int) -> int:
    count = 0
    while levels ** (count + 1) <= 256**size:
        count += 1
    return count


def _bytes_of(count: int, levels: int) -> int:
    return (int(levels**count - 1).bit_length() + 7) // 8


def _powers(levels: int, count: int, device: torch.device) -> Tensor:
    return torch.tensor([levels**i for i in range(count)], device=device)
