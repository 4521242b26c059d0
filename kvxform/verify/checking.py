"""Runs suites on a finished model and says what every schedule showed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvxform.verify.cache_state import StateCheck, check_schedule, is_lossy
from kvxform.verify.probe import Probe, Reference, SourceRun, pick
from kvxform.verify.protocols import ModelLike
from kvxform.verify.reference import run_in_one_piece
from kvxform.verify.replay import Replay
from kvxform.verify.results import Comparison
from kvxform.verify.schedules import Schedule
from kvxform.verify.suites import Suite
from kvxform.verify.tolerances import Tolerance

ALL = "all schedules"
Talk = Callable[[str], None]
Logits = Sequence[tuple[Tensor, Tensor]]  # what is expected and what came out, `[vocab]` each


class Checker:
    """Compares a model in every schedule with the equations and with itself in one piece.

    Args:
        model: A cached model.
        tolerance: Bounds of its dtype.
        cost: KL divergence in nats that its codes cost against the source, as far as it is known.
        talk: Called with the name of each schedule before it runs.
    """

    def __init__(self, model: ModelLike, tolerance: Tolerance, cost: float, talk: Talk) -> None:
        assert model.plan is not None, "the model has a cache"
        self._model, self._tolerance, self._cost, self._talk = model, tolerance, cost, talk
        self._dtype = model.program.dtype
        self._is_recomputed = model.plan.layout.kind == "checkpoint"  # no cache to be watched
        self.is_lossy = is_lossy(model.plan, self._dtype)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def check(self, suite: Suite, *, unwatched: ModelLike | None = None) -> list[Comparison]:
        """Run all schedules of a suite.

        Args:
            suite: What to run.
            unwatched: A lowering that hides more from a watch runs every schedule once more,
                as it is; its logits are compared too.
        """
        if not suite.schedules:
            return []
        own = run_in_one_piece(self._model, suite.sequences)
        comparisons = []
        for schedule in suite.schedules.values():
            self._talk(schedule.name)
            check = check_schedule(self._model, schedule, suite.sequences, own, self._dtype)
            comparisons += self._state(check)
            pairs = [(own.logits[place], got) for place, got in check.logits.items()]
            comparisons += self._logits(schedule.name, "logits, against one piece", pairs)
            if unwatched is not None:
                run = _replay(unwatched, suite.sequences, schedule)
                pairs = [(own.logits[place], got) for place, got in run.logits.items()]
                comparisons += self._logits(schedule.name, "logits of replayed steps", pairs)
        return comparisons

    def conclude(self) -> list[Comparison]:
        """Return what can be said of all schedules together."""
        if not self._pairs:
            return []
        kl = divergence(self._pairs)
        bound = self._tolerance.lossy_bound(self._cost)
        return [Comparison(ALL, "logits, against one piece (KL)", kl, bound)]

    def _state(self, check: StateCheck) -> list[Comparison]:
        bounds, found = self._tolerance, check
        own = ("K and V, against one piece", found.input_error, bounds.inputs, found.input_at)
        watched = (
            ("attention, against the equations", found.read_error, bounds.reads, found.read_at),
            (
                "cached tokens, against the equations",
                found.state_error,
                bounds.state,
                found.state_at,
            ),
        )
        rows = (own,) if self._is_recomputed else (own, *watched)
        wrong = "; ".join(dict.fromkeys(check.complaints))
        return [
            *(Comparison(check.schedule, *row) for row in rows),
            Comparison(check.schedule, "lengths and bytes", at=wrong, is_equal=not wrong),
        ]

    def _logits(self, schedule: str, compared: str, pairs: Logits) -> list[Comparison]:
        """Compare logits of one schedule; those of a lossy cache are judged together, later."""
        if self.is_lossy:
            self._pairs += pairs
            return []
        expected, got = (torch.stack(side) for side in zip(*pairs, strict=True))
        error = Reference(expected).compare(Reference(got)).relative
        return [Comparison(schedule, compared, error, self._tolerance.logits)]


def compare_with_source(
    model: ModelLike, source: SourceRun, probe: Probe, tolerance: Tolerance, *, is_exact: bool
) -> list[Comparison]:
    """Compare a model in one piece with its source.

    Args:
        model: The cached model.
        source: The source on `probe`.
        probe: Sequences.
        tolerance: Bounds of an exact model; any other is only measured.
        is_exact: Whether the model promises to be its source, rounding apart.
    """
    own = run_in_one_piece(model, probe)
    place = "one piece"
    found = Reference(pick(source.logits, probe)).compare(Reference(pick(own.logits, probe)))
    bounds = (tolerance.logits, tolerance.inputs) if is_exact else (None, None)
    comparisons = [
        Comparison(place, "logits, against the source", found.relative, bounds[0]),
        Comparison(place, "logits, against the source (KL)", found.kl),
    ]
    for name, mine, theirs in (("K", own.keys, source.keys), ("V", own.values, source.values)):
        errors = {
            layer: _relative(x[probe_rows(probe, x)], theirs[layer][probe_rows(probe, x)])
            for layer, x in mine.items()
            if layer in theirs and x.shape == theirs[layer].shape
        }
        if errors:
            worst = max(errors, key=lambda layer: errors[layer])
            compared = f"{name} handed in, against the source"
            comparisons.append(
                Comparison(place, compared, errors[worst], bounds[1], f"layer {worst}")
            )
    return comparisons


def probe_rows(probe: Probe, x: Tensor) -> Tensor:
    """Return which entries of `[B, Hk, S, D]` count, bool `[B, Hk, S, D]`."""
    return probe.real.to(x.device)[:, None, :, None].expand(x.shape)


def _replay(model: ModelLike, sequences: Probe, schedule: Schedule) -> Replay:
    """Run a schedule without watching it."""
    run = Replay(model, sequences)
    with torch.inference_mode():
        for action in schedule.actions:
            run.act(action)
    return run


def divergence(pairs: Logits) -> float:
    """Return the mean KL divergence of pairs of logits, a thousand at a time."""
    total = 0.0
    for start in range(0, len(pairs), 1000):
        part = pairs[start : start + 1000]
        expected, got = (torch.stack(side) for side in zip(*part, strict=True))
        total += Reference(expected).compare(Reference(got)).kl * len(part)
    return total / len(pairs)


def _relative(got: Tensor, expected: Tensor) -> float:
    worst = (got.double() - expected.double()).abs().max()
    return float(worst / expected.double().abs().max().clamp_min(1e-30))
