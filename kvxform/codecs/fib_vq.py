"""Codec `fib-vq`: one norm a vector, and one codebook for every block of k coordinates of x / |x|.

    q_j = the word nearest to the block u_(jk) .. u_(jk + k - 1)          u'_block = word q_j

Blocks of a uniform direction all have the same distribution, so one codebook serves all, which
depends on nothing but head_dim, k and the number of words (`fib_codebook`). A code costs
log2(words) / k bits a value, which may be a fraction, also below one. Where k does not divide
head_dim, zeros fill the last block.

Source: FibQuant, arXiv 2605.11478.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvxform.codecs.base import PlaneSpec, register_codec, require_option
from kvxform.codecs.directions import DirectionCodec
from kvxform.codecs.fib_codebook import codebook, nearest
from kvxform.codecs.radix import pack_levels, packed_level_bytes, unpack_levels
from kvxform.errors import PassError

MOST_WORDS = 1024
LARGEST_BLOCK = 8


@register_codec
@dataclass(frozen=True)
class FibVqCodec(DirectionCodec):
    """Vector codes of a direction.

    Attributes:
        words: Words of the codebook, 2 to 1024.
        k: Coordinates of a block, 1 to 8.
    """

    name: ClassVar[str] = "fib-vq"
    words: int = 256
    k: int = 4

    def __post_init__(self) -> None:
        """Check the options on their own."""
        super().__post_init__()
        fits = isinstance(self.words, int) and 2 <= self.words <= MOST_WORDS
        require_option(fits, self.name, f"words must be 2 to {MOST_WORDS}", self.words)
        fits = isinstance(self.k, int) and 1 <= self.k <= LARGEST_BLOCK
        require_option(fits, self.name, f"k must be 1 to {LARGEST_BLOCK}", self.k)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 unless `head_dim` holds two blocks and its bytes tell it."""
        if head_dim < 2 * self.k:
            raise PassError(
                "KVX203",
                f"blocks of codec fib-vq must be at most half of head_dim {head_dim}",
                got=self.k,
                hint=f"use k: {head_dim // 2}",
            )
        super().check(head_dim)

    def code_planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, one code a block."""
        return (PlaneSpec("codes", "uint8", packed_level_bytes(self.blocks(head_dim), self.words)),)

    def encode_directions(self, u: Tensor) -> dict[str, Tensor]:
        """Encode `[..., D]` by the nearest word of each block."""
        head_dim = u.shape[-1]
        padded = F.pad(u, (0, self.blocks(head_dim) * self.k - head_dim))
        blocks = padded.reshape(-1, self.k)
        book = codebook(self.words, self.k, head_dim).to(u.device)
        codes = nearest(blocks, book).reshape(*u.shape[:-1], self.blocks(head_dim))
        return {"codes": pack_levels(codes, self.words)}

    def decode_directions(
        self, planes: Mapping[str, Tensor], head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Look up every block."""
        codes = unpack_levels(planes["codes"], self.words, self.blocks(head_dim))
        book = codebook(self.words, self.k, head_dim).to(codes.device, dtype)
        found: Tensor = book[codes].flatten(-2)[..., :head_dim]
        return found

    def blocks(self, head_dim: int) -> int:
        """Return the number of codes of a vector."""
        return -(-head_dim // self.k)
