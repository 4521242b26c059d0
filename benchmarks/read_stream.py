"""A kernel that reads memory and does nothing else: what attention over a cache is held against."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Config(NamedTuple):
    """Launch parameters: words a load, loads a block, warps."""

    words: int
    loads: int
    num_warps: int


CONFIGS = (
    Config(4096, 4, 8),
    Config(2048, 8, 4),
    Config(2048, 4, 4),
    Config(4096, 8, 8),
    Config(1024, 8, 4),
)


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _read(words, sink, WORDS: tl.constexpr, LOADS: tl.constexpr):  # noqa: N803  Triton's habit
    first = tl.program_id(0).to(tl.int64) * (WORDS * LOADS)
    total = tl.zeros([WORDS], tl.int32)
    for i in tl.static_range(LOADS):
        offsets = first + i * WORDS + tl.arange(0, WORDS)
        total ^= tl.load(words + offsets, eviction_policy="evict_first")
    result = tl.reduce(total, 0, _xor)
    if result == 123456789:  # the store keeps the loads alive; it hardly ever happens
        tl.store(sink, result)


def read(words: torch.Tensor, sink: torch.Tensor, config: Config) -> None:
    """Read `words`, int32, a multiple of 32768 of them; `sink` is int32 `[1]`."""
    grid = (words.numel() // (config.words * config.loads),)
    _read[grid](words, sink, config.words, config.loads, num_warps=config.num_warps)
