"""A cache for measurements: it holds one prefill, passed through codecs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvxform.codecs.base import Codec
from kvxform.ir.plan import SitePlan
from kvxform.ir.scoring import Scoring, attend
from kvxform.ir.stream_plan import StreamPlan

Stream = tuple[int, str]  # owner layer, and `key` or `value`


class TrialCache:
    """Keys and values of one prefill, each stream through the codec that it is given.

    Exact first tokens stay exact. There is no recent region: every token behind them is read back
    decoded, which is what most of a long sequence is read as.

    Args:
        sites: Plans by layer.
    """

    def __init__(self, sites: Mapping[int, SitePlan]) -> None:
        self._sites = sites
        self._codecs: Mapping[Stream, Codec] = {}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._exact: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self) -> None:
        """Remember what is held as what an exact cache holds."""
        self._exact = dict(self._held)

    def begin(self, codecs: Mapping[Stream, Codec]) -> None:
        """Begin a trial: hold what `keep` remembered, and pass streams through `codecs`."""
        self._codecs, self._held = codecs, dict(self._exact)

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Store the whole prefill of one layer, each `[B, Hk, S, D]`."""
        site = self._sites[layer]
        keys = self._stored((layer, "key"), site.key, k)
        if v is None or not isinstance(site.value, StreamPlan):
            self._held[layer] = keys, keys
        else:
            self._held[layer] = keys, self._stored((layer, "value"), site.value, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """Attend from q `[B, H, S, D]` at `positions` `[B, S]` to all of it."""
        k, v = self._held[self._sites[layer].owner]
        if scoring.key_read is not None:
            k = scoring.key_read.apply(k, 0, scoring.key_read.table(k.shape[2], k.dtype))
        past = torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1)
        mask = scoring.span.sees(positions, past)
        return attend(q, k, v, mask, scoring, bias=scoring.bias(positions, past))

    def _stored(self, stream: Stream, plan: StreamPlan, x: Tensor) -> Tensor:
        codec = self._codecs.get(stream)
        if codec is None:
            return x
        first = plan.regions.sink
        body = (x.shape[2] - first) // codec.tokens_per_group * codec.tokens_per_group
        if body <= 0:
            return x
        coded = x[:, :, first : first + body]
        decoded = codec.decode(codec.encode(coded), x.dtype)
        return torch.cat([x[:, :, :first], decoded, x[:, :, first + body :]], 2)
