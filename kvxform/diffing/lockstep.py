"""Two sessions side by side: each action of a schedule is done by A, then by B.

B may be led by A: its caches are handed the queries, keys and values of A, and its layers go on
with what attention returned in A. Then every layer of B is judged alone, for nothing that an
earlier one did wrong reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvxform.codecs.basis import Basis
from kvxform.ir.cache import CacheState, watch_caches
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring
from kvxform.verify.probe import Probe
from kvxform.verify.protocols import ModelLike
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import Action
from kvxform.verify.shadow import StepTokens

New = tuple[Tensor, Tensor | None]  # K and V `[B, Hk, S, D]` of one append


@dataclass(frozen=True, eq=False)
class Read:
    """One attention over a cache.

    Attributes:
        q: Queries as the side made them, `[B, H, S, D]`.
        positions: Their positions, `[B, S]`.
        scoring: The options of the attention.
        out: What came back, `[B, H, S, Dv]`.
    """

    q: Tensor
    positions: Tensor
    scoring: Scoring
    out: Tensor


@dataclass
class Tape:
    """What one side hands to its cache and gets back during an action, pass by pass.

    Attributes:
        lead: The tape of A, if B is led by it.
        leaders: Layer of A that leads each layer of B; all others go their own way.
        appended: K and V of each append by layer, as the side made them.
        reads: Attentions by layer.
    """

    lead: Tape | None = None
    leaders: Mapping[int, int] = field(default_factory=dict)
    appended: dict[int, list[New]] = field(default_factory=dict)
    reads: dict[int, list[Read]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the action."""
        self.appended.clear()
        self.reads.clear()

    def watch(self, state: CacheState) -> CacheState:
        """Return a cache that is `state`, taped and led."""
        return _Taped(self, state)

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> New:
        """Record an append and return what goes into the cache."""
        own = self.appended.setdefault(layer, [])
        own.append((k, v))
        theirs = [] if self.lead is None else self.lead.appended.get(self._leader(layer), [])
        if len(theirs) < len(own):
            return k, v
        key, value = theirs[len(own) - 1]
        if key.shape != k.shape or (value is None) != (v is None):
            return k, v
        return key.to(k), v if value is None or v is None else value.to(v)

    def leading(self, layer: int, q: Tensor) -> Read | None:
        """Return the attention of A that leads the next one of `layer`, or None."""
        theirs = [] if self.lead is None else self.lead.reads.get(self._leader(layer), [])
        index = len(self.reads.get(layer, ()))
        found = theirs[index] if index < len(theirs) else None
        return found if found is not None and found.q.shape == q.shape else None

    def _leader(self, layer: int) -> int:
        return self.leaders.get(layer, -1)


class _Taped:
    """A CacheState between a tape and the real one."""

    def __init__(self, tape: Tape, state: CacheState) -> None:
        self._tape, self._state = tape, state

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        self._state.append(layer, *self._tape.append(layer, k, v))

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        lead = self._tape.leading(layer, q)
        asked = q if lead is None else lead.q.to(q)
        out = self._state.attend(layer, asked, positions, scoring)
        self._tape.reads.setdefault(layer, []).append(Read(q, positions, scoring, out))
        return out if lead is None or lead.out.shape != out.shape else lead.out.to(out)


class Lockstep:
    """Both sides of a comparison.

    Args:
        a: The first model.
        b: The second one.
        sequences: Token ids that the schedule feeds.
        pairs: Layers that are compared, (layer of A, layer of B).
        is_led: Tape both sides, and let A lead B.

    Attributes:
        a: Session and account of A; likewise below.
        tape_a: What A hands to its cache in the last action; empty unless led.
        passes: Rows and new tokens of each forward pass of the last action.
    """

    def __init__(
        self,
        a: ModelLike,
        b: ModelLike,
        sequences: Probe,
        pairs: Sequence[tuple[int, int]],
        *,
        is_led: bool,
    ) -> None:
        self.a, self.b = Replay(a, sequences), Replay(b, sequences)
        self.is_led, self.passes = is_led, list[StepTokens]()
        self.tape_a = Tape()
        leaders = {
            own: layer for layer, own in pairs if speak_alike(a.program, layer, b.program, own)
        }
        self.tape_b = Tape(self.tape_a, leaders)

    def act(self, action: Action) -> None:
        """Let both sides carry out one action."""
        before = len(self.a.shadow.announced)
        with torch.inference_mode():
            for replay, tape in ((self.a, self.tape_a), (self.b, self.tape_b)):
                if not self.is_led:
                    replay.act(action)
                    continue
                tape.clear()
                with watch_caches(tape.watch):
                    replay.act(action)
        self.passes = list(self.a.shadow.announced[before:])


def speak_alike(a: Program, layer: int, b: Program, own: int) -> bool:
    """Whether K and V that a layer of A stores mean the same to a layer of B."""
    assert a.plan is not None, "it has a cache"
    assert b.plan is not None, "it has a cache"
    site, other = a.plan.site(layer), b.plan.site(own)
    if _geometry(site) != _geometry(other):
        return False
    pairs = zip(site.streams.values(), other.streams.values(), strict=True)
    return all(_same_basis(x.basis, a, y.basis, b) for x, y in pairs)


def _geometry(site: SitePlan) -> tuple[object, ...]:
    streams = [(name, st.head_dim, st.rope) for name, st in site.streams.items()]
    return site.payload, site.num_q_heads, site.num_kv_heads, streams


def _same_basis(x: Basis, a: Program, y: Basis, b: Program) -> bool:
    if (x.kind, x.block, x.seed, x.heads) != (y.kind, y.block, y.seed, y.heads):
        return False
    for name, other in ((x.weight, y.weight), (x.inverse, y.inverse)):
        if (name is None) != (other is None):
            return False
        if name is not None and other is not None:
            mine, theirs = a.weights[name], b.weights[other]
            if mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine)):
                return False
    return True
