"""The least that caching can cost: K and V as they are, written to pages by one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from problems import DEVICE


@triton.jit
def _write(
    k,
    v,
    pages,
    block_table,
    starts,
    k_batch: tl.constexpr,
    k_head: tl.constexpr,
    k_token: tl.constexpr,
    num_tokens,
    max_pages: tl.constexpr,
    HEADS: tl.constexpr,  # noqa: N803  Triton's habit, as below
    DIM: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    head = tl.program_id(1)
    row = tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_new = token < num_tokens
    position = tl.load(starts + row) + token
    page = tl.load(block_table + row * max_pages + position // PAGE, mask=is_new, other=0)
    channel = tl.arange(0, DIM)[None, :]
    source = row * k_batch + head * k_head + token[:, None] * k_token + channel  # [TILE, DIM]
    slot = (page.to(tl.int64) * HEADS + head) * 2 * PAGE + position % PAGE
    target = slot[:, None] * DIM + channel
    mask = is_new[:, None]
    tl.store(pages + target, tl.load(k + source, mask=mask), mask=mask)
    tl.store(pages + target + PAGE * DIM, tl.load(v + source, mask=mask), mask=mask)


def make_pages(num_pages: int, heads: int, page_size: int, dim: int) -> torch.Tensor:
    """Return pages, `[num_pages, Hk, 2, page_size, D]` bfloat16: keys, then values of a head."""
    size = (num_pages, heads, 2, page_size, dim)
    return torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)


def write(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    *,
    tile: int = 1,
    num_warps: int = 1,
) -> None:
    """Write k and v `[B, Hk, S, D]`, of equal strides, at positions `starts`, int32 `[B]`."""
    batch_size, heads, num_tokens, dim = k.shape
    assert k.stride() == v.stride(), "one set of strides serves both"
    grid = (triton.cdiv(num_tokens, tile), heads, batch_size)
    strides = (k.stride(0), k.stride(1), k.stride(2), num_tokens, block_table.shape[1])
    sizes = (heads, dim, pages.shape[3], tile)
    _write[grid](k, v, pages, block_table, starts, *strides, *sizes, num_warps=num_warps)


@triton.jit
def _empty(x):
    pass


def launch_nothing(x: torch.Tensor) -> None:
    """Launch a kernel that does nothing."""
    _empty[(1,)](x, num_warps=1)
