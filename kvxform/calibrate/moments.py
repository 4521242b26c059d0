"""Streaming statistics of one stream: float64 moments, extremes, and a fixed set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.calibration import StreamStatistics
from kvxform.ir.program import AttentionSite

MOST_SAMPLES = 2048
SAMPLE_BYTES = 1 << 30  # over all streams of all layers; large models keep fewer samples


@dataclass(frozen=True, eq=False)
class Picks:
    """Which tokens of a text are kept: the same for every stream.

    Attributes:
        rows: Window of each picked token, in order, int64 `[N]`.
        positions: Its position in that window, int64 `[N]`.
    """

    rows: Tensor
    positions: Tensor

    def slots(self, row: int) -> slice:
        """Return which of the N samples lie in window `row`."""
        start = int(torch.searchsorted(self.rows, row))
        return slice(start, int(torch.searchsorted(self.rows, row, right=True)))


def sample_limit(sites: Sequence[AttentionSite]) -> int:
    """Return how many tokens can be kept of all streams of `sites`."""
    values = sum(
        2 * (site.num_q_heads + site.num_kv_heads) * site.head_dim
        + site.num_kv_heads * site.v_head_dim
        for site in sites
    )
    return min(MOST_SAMPLES, max(1, SAMPLE_BYTES // (4 * values)))


def pick_tokens(windows: int, window: int, most: int, seed: int) -> Picks:
    """Return `most` tokens (or all, if there are fewer) drawn without replacement.

    Args:
        windows: Number of windows.
        window: Tokens of one.
        most: Tokens wanted.
        seed: Seed of the draw; the text decides nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(windows * window, generator=generator)[:most].sort().values
    return Picks(drawn // window, drawn % window)


class StreamMoments:
    """What has been seen of one stream so far.

    Args:
        heads: Heads of the stream.
        dim: Channels of a head.
        picks: The tokens to keep.
        device: Where sums are kept.
    """

    def __init__(self, heads: int, dim: int, picks: Picks, device: torch.device) -> None:
        self._picks, self._count, self._windows = picks, 0, 0
        self._sum = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        self._gram = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        self._low = torch.full((heads, dim), torch.inf, device=device)
        self._high = torch.full((heads, dim), -torch.inf, device=device)
        self._first = torch.zeros(heads, dim, device=device)
        self._samples = torch.empty(heads, len(picks.rows), dim)

    def add(self, x: Tensor, row: int) -> None:
        """Add the vectors of window `row`, `[heads, S, D]`."""
        wide = x.double()
        self._count += x.shape[1]
        self._windows += 1
        self._sum += wide.sum(1)
        self._gram += wide.mT @ wide
        single = x.float()
        self._low = torch.minimum(self._low, single.amin(1))
        self._high = torch.maximum(self._high, single.amax(1))
        self._first += single[:, 0]
        slots = self._picks.slots(row)
        positions = self._picks.positions[slots].to(x.device)
        self._samples[:, slots] = single[:, positions].cpu()

    def finish(self) -> StreamStatistics:
        """Return the statistics, on the CPU."""
        return StreamStatistics(
            count=self._count,
            mean=(self._sum / self._count).cpu(),
            gram=(self._gram / self._count).cpu(),
            low=self._low.cpu(),
            high=self._high.cpu(),
            samples=self._samples,
            positions=self._picks.positions,
            first=(self._first / self._windows).cpu(),
        )
