"""Checks a lowering whose caches cannot be watched: it follows one that can, action by action.

Both round differently, and of a lossy cache that moves single codes. So what is cached is held to a
share of what the codes themselves cost, in that layer and in those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvxform.ir.cache import watch_caches
from kvxform.verify.cache_state import is_lossy
from kvxform.verify.checking import ALL, Talk, divergence
from kvxform.verify.probe import Probe, Reference
from kvxform.verify.protocols import ModelLike
from kvxform.verify.reference import run_in_one_piece
from kvxform.verify.replay import Replay
from kvxform.verify.results import Comparison
from kvxform.verify.schedules import Schedule
from kvxform.verify.suites import Suite
from kvxform.verify.tolerances import Tolerance


class Follower:
    """Compares a model with another lowering of the same program.

    Args:
        model: What is checked.
        leader: The same program, whose caches can be watched.
        tolerance: Bounds of its dtype.
        cost: KL divergence in nats that its codes cost against the source, as far as it is known.
        talk: Called with the name of each schedule before it runs.
    """

    def __init__(
        self, model: ModelLike, leader: ModelLike, tolerance: Tolerance, cost: float, talk: Talk
    ) -> None:
        assert leader.plan is not None, "the model has a cache"
        self._model, self._leader = model, leader
        self._tolerance, self._cost, self._talk = tolerance, cost, talk
        self.is_lossy = is_lossy(leader.plan, leader.program.dtype)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []  # of the leader: in one piece, in a schedule

    def check(self, suite: Suite) -> list[Comparison]:
        """Run all schedules of a suite on both."""
        own = run_in_one_piece(self._leader, suite.sequences).logits if self.is_lossy else None
        return [
            comparison
            for schedule in suite.schedules.values()
            for comparison in self._check(schedule, suite.sequences, own)
        ]

    def conclude(self) -> list[Comparison]:
        """Return what can be said of all schedules together.

        The leader parts from itself too when a schedule is run in one piece: its sums round
        differently there, and codes move. A model may part from it by four times that, for every
        layer of it rounds differently.
        """
        if not self._pairs:
            return []
        bound = max(self._tolerance.lossy_bound(self._cost), 4 * divergence(self._own))
        return [Comparison(ALL, "logits, against eager (KL)", divergence(self._pairs), bound)]

    def _check(self, schedule: Schedule, sequences: Probe, own: Tensor | None) -> list[Comparison]:
        self._talk(schedule.name)
        leader, model = Replay(self._leader, sequences), Replay(self._model, sequences)
        state, wrong = _Worst(), dict[str, None]()
        with torch.inference_mode():
            for action in schedule.actions:
                with watch_caches(leader.shadow.watch):
                    leader.act(action)
                model.act(action)
                wrong.update(dict.fromkeys(_account(leader, model)))
                self._compare(leader, model, state)
        found = [
            Comparison(schedule.name, "cached tokens, against eager", *state.result()),
            Comparison(schedule.name, "lengths and bytes", at="; ".join(wrong), is_equal=not wrong),
        ]
        pairs = [(leader.logits[place], got) for place, got in model.logits.items()]
        if own is not None:
            self._pairs += pairs
            self._own += [(own[place], leader.logits[place]) for place in model.logits]
            return found
        expected, got = (torch.stack(side) for side in zip(*pairs, strict=True))
        error = Reference(expected).compare(Reference(got)).relative
        return [
            *found,
            Comparison(schedule.name, "logits, against eager", error, self._tolerance.logits),
        ]

    def _compare(self, leader: Replay, model: Replay, worst: _Worst) -> None:
        """Compare what every layer holds of every row.

        A code that rounding moved in one layer is an error that all later layers see, so what the
        codes of a layer and of those before it cost bounds how far two roundings can part there.
        """
        total = 0.0  # sum of the squares of what codes cost so far, relative to K and V
        for site in leader.plan.sites:
            mine = leader.session.logical_cache(site.layer)
            theirs = model.session.logical_cache(site.layer)
            exact = [_handed_in(leader, site.layer, row) for row in sorted(leader.rows)]
            for index, name in enumerate(("key", "value")):
                expected, got = (mine.k, mine.v)[index], (theirs.k, theirs.v)[index]
                bound = self._tolerance.logits
                if self.is_lossy:
                    total += rms([pair[index] for pair in exact], expected) ** 2
                    bound = max(bound, self._tolerance.lossy_share * math.sqrt(total))
                worst.add(rms(got, expected), bound, f"{name[0].upper()} of layer {site.layer}")


class _Worst:
    """The error that comes nearest to its bound, or exceeds it most."""

    def __init__(self) -> None:
        self._found: tuple[float, float, str] | None = None

    def add(self, error: float, bound: float, at: str) -> None:
        """Take one error into account."""
        if self._found is None or not error / bound <= self._found[0] / self._found[1]:
            self._found = error, bound, at

    def result(self) -> tuple[float, float, str]:
        """Return error, bound and place."""
        assert self._found is not None, "every schedule compares something"
        return self._found


def _account(leader: Replay, model: Replay) -> list[str]:
    """Return what is wrong with lengths and bytes."""
    wrong = []
    expected = list(leader.session.sequence_lengths())
    got = list(model.session.sequence_lengths())
    if got != expected:
        wrong.append(f"sequence lengths must be {expected}, not {got}")
    planned = getattr(model.session, "planned_bytes", model.expected_bytes)()
    if planned != model.session.cache_bytes():
        wrong.append(f"the cache must hold {planned} bytes, not {model.session.cache_bytes()}")
    return wrong


def _handed_in(run: Replay, layer: int, row: int) -> tuple[Tensor, Tensor]:
    """Return exact K and V of one row, as the source would hold them."""
    stored = run.shadow.stored(layer, row)
    key = run.shadow.in_source(layer, "key", stored["key"])
    if "value" in stored:
        return key, run.shadow.in_source(layer, "value", stored["value"])
    return key, run.shadow.held(layer, row)[1]


def rms(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the root mean square of differences over that of `expected`; infinite if unlike."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return float("inf")
    pairs = list(zip(got, expected, strict=True))
    error = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    return float(
        (error / max(sum(float(y.double().square().sum()) for _, y in pairs), 1e-30)) ** 0.5
    )
