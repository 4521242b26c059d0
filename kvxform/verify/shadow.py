"""Shadow: stands between the cached ops and a cache, and checks what comes out by the equations.

The shadow keeps K and V as they were handed in. What attention returns, and later what the cache
holds, must follow from them by `verify.equations`, to rounding. Errors of codes therefore cannot
hide errors of state: both sides have the same codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.ir.cache import CacheState
from kvxform.ir.logical import source_keys, unrotate_pair
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import KeyView, StreamPlan
from kvxform.verify.equations import TwoCopies, attend, attention_in_chunks, two_copies

StepTokens = Sequence[tuple[int, int]]  # (row, new tokens) of each batch entry of a forward pass


@dataclass
class Shadow:
    """The second copy of a session's cache.

    Attributes:
        program: What runs; the equations follow its plan.
        read_error: Largest error of an attention output so far, as a share of its largest value.
        read_at: Where that was.
    """

    program: Program
    read_error: float = 0.0
    read_at: str = ""
    _steps: list[StepTokens] = field(default_factory=list)
    _done: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _values: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _queries: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _scales: dict[int, float] = field(default_factory=dict)
    _copies: dict[tuple[int, int], tuple[TwoCopies, TwoCopies]] = field(default_factory=dict)

    @property
    def plan(self) -> CachePlan:
        """What is cached and how."""
        assert self.program.plan is not None, "the model has a cache"
        return self.program.plan

    @property
    def announced(self) -> Sequence[StepTokens]:
        """All forward passes so far, oldest first."""
        return self._steps

    def expect(self, step: StepTokens) -> None:
        """Announce the next forward pass."""
        self._steps.append(step)

    def reorder(self, sources: Mapping[int, int]) -> None:
        """Let each row become what its source was; forget all other rows."""
        for store in (self._keys, self._values, self._queries):
            old = dict(store)
            store.clear()
            for row, source in sources.items():
                store |= {(layer, row): x for (layer, r), x in old.items() if r == source}
        self._copies.clear()

    def crop(self, row: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a row."""
        for store in (self._keys, self._values, self._queries):
            for key in [key for key in store if key[1] == row]:
                store[key] = store[key][:, :tokens]
        self._copies.clear()

    def watch(self, state: CacheState) -> CacheState:
        """Return a cache that is `state`, watched."""
        return _Watched(self, state)

    def stored(self, layer: int, row: int) -> dict[str, Tensor]:
        """Return each stored stream of a row as handed in, `[Hk, T, D]`, in the stored basis."""
        site, stores = self.plan.site(layer), {"key": self._keys, "value": self._values}
        if site.payload == "pair":
            return {name: store[layer, row] for name, store in stores.items()}
        owner = site.owner
        return {name: stores[name][owner, row] for name in self.plan.site(owner).streams}

    def in_source(self, layer: int, stream: str, x: Tensor) -> Tensor:
        """Return one stored stream `[Hk, T, D]` as the source model would hold it."""
        if stream == "key":
            return source_keys(self.program, layer, x)
        return self.program.site(layer).v_basis.unrotate(x, self.program.weights)

    def held(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Return what the logical cache must be: `[Hk, T, D]`, decoded and un-rotated."""
        key, value = self._two_copies(layer, row)
        return unrotate_pair(self.program, layer, key.held(), value.held())

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Record new tokens `[B, Hk, S, D]`, cut to the counts that were announced."""
        step = self._steps[self._done[layer]]
        self._done[layer] += 1
        for store, new in ((self._keys, k), (self._values, v)):
            if new is not None:
                _extend(store, layer, new, step)
        for row, _ in step:
            for reader in (
                s.layer for s in self.plan.sites if s.owner == self.plan.site(layer).owner
            ):
                self._copies.pop((reader, row), None)

    def ask(self, layer: int, q: Tensor, scale: float) -> None:
        """Record new queries `[B, H, S, D]` where a codec ranks tokens by them."""
        site = self.plan.site(layer)
        if site.owner == layer and site.key.score_bytes:
            _extend(self._queries, layer, q, self._steps[self._done[layer] - 1])
            self._scales[layer] = scale

    def check_read(self, layer: int, q: Tensor, out: Tensor, scoring: Scoring) -> None:
        """Compare attention outputs `[B, H, S, Dv]` with the equations."""
        owner = self.plan.site(layer).owner
        for entry, (row, count) in enumerate(self._steps[self._done[owner] - 1]):
            length = self._keys[owner, row].shape[1]
            positions = torch.arange(length - count, length, device=q.device)
            key, value = self._two_copies(layer, row)
            expected = attend(q[entry, :, :count], positions, key, value, scoring)
            expected = expected[..., : self.plan.site(owner).value.head_dim]
            worst = float((out[entry, :, :count].double() - expected).abs().max())
            error = worst / max(float(expected.abs().max()), 1e-30)
            if error > self.read_error or error != error:
                self.read_error, self.read_at = error, f"layer {layer}, row {row}"

    def _two_copies(self, layer: int, row: int) -> tuple[TwoCopies, TwoCopies]:
        site = self.plan.site(layer)
        where = (site.owner, row)
        if site.payload == "pair":
            return self._halves_of_pair(site, row)
        if where not in self._copies:
            attention = self._attention(site.key, where) if site.key.score_bytes else None
            key = two_copies(site.key, self._keys[where], attention)
            value = key  # all of it, where values are its first channels
            if not isinstance(site.value, KeyView):
                value = two_copies(site.value, self._values[where], attention)
            self._copies[where] = key, value
        return self._copies[where]

    def _halves_of_pair(self, site: SitePlan, row: int) -> tuple[TwoCopies, TwoCopies]:
        """Return K and V of one layer of a pair; what the upper layer has yet to bring is zero."""
        where = (site.layer, row)
        if where not in self._copies:
            layers = [s.layer for s in self.plan.sites if s.owner == site.owner]  # lower, upper
            parts = [store.get((n, row)) for n in layers for store in (self._keys, self._values)]
            lower = [part for part in parts[:2] if part is not None]
            tokens = lower[0].shape[1]
            upper = [
                x.new_zeros(x.shape)
                if part is None
                else F.pad(part, (0, 0, 0, tokens - part.shape[1]))
                for x, part in zip(lower, parts[2:], strict=True)
            ]
            whole = two_copies(site.key, torch.cat([*lower, *upper], -1))
            key, value = (whole.channels(part) for part in site.pair_channels)
            self._copies[where] = key, value
        return self._copies[where]

    def _attention(self, stream: StreamPlan, where: tuple[int, int]) -> Tensor:
        codec = make_codec(stream.codec)
        assert isinstance(codec, SaliencyCodec), "no other codec ranks tokens"
        sink, keys = stream.regions.sink, self._keys[where]
        tokens = max(0, keys.shape[1] - sink) // codec.chunk * codec.chunk
        body = slice(sink, sink + tokens)
        exact = keys[:, body].to(dtype_from_name(stream.regions.dtype))
        return attention_in_chunks(
            codec, self._queries[where][:, body], exact, self._scales[where[0]]
        )


def _extend(
    store: dict[tuple[int, int], Tensor], layer: int, new: Tensor, step: StepTokens
) -> None:
    """Add the tokens of a step `[B, H, S, D]` to what each of its rows has."""
    for entry, (row, count) in enumerate(step):
        part = new[entry, :, :count].clone()
        old = store.get((layer, row))
        store[layer, row] = part if old is None else torch.cat([old, part], 1)


class _Watched:
    """A CacheState that lets a shadow see what goes in and what comes out."""

    def __init__(self, shadow: Shadow, state: CacheState) -> None:
        self._shadow, self._state = shadow, state

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        self._shadow.append(layer, k, v)
        self._state.append(layer, k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        self._shadow.ask(layer, q, scoring.scale)
        out = self._state.attend(layer, q, positions, scoring)
        self._shadow.check_read(layer, q, out, scoring)
        return out
