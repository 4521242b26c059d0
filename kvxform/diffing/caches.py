"""The caches of two models, run through the same ragged prefill, decode steps and page reuse.

First each side runs by itself: that gives the error of every layer, lengths and bytes. If anything
differs, both run again with B led by A (see `lockstep`), and every layer is looked at alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvxform.diffing.cache_faults import FaultFinder
from kvxform.diffing.lockstep import Lockstep
from kvxform.diffing.records import LayerDiff
from kvxform.diffing.symptoms import CacheDiff
from kvxform.ir.rounding import coarsest
from kvxform.verify.cache_state import rms_error
from kvxform.verify.probe import Probe
from kvxform.verify.prober import first_encoded_length
from kvxform.verify.protocols import ModelLike
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import Decode, Free, Prefill, Reorder, Schedule
from kvxform.verify.tolerances import tolerance_for

SCHEDULE = "ragged prefill, decode, page reuse and reorder"
SHORT, STEPS = 12, 2
LONGEST = 384  # tokens; larger pages and windows are not filled
Pairs = Sequence[tuple[int, int]]


def cache_lengths(*models: ModelLike) -> tuple[int, int, int]:
    """Return lengths of three sequences with which `compare_caches` sees most.

    The first fills two pages and has encoded tokens in every stream, the third more than one page.
    """
    plans = [model.plan for model in models if model.plan is not None]
    pages = [plan.layout.page_size for plan in plans if plan.layout.kind == "paged"]
    needed = max((first_encoded_length(plan) for plan in plans), default=1)
    exact = max(
        (
            st.regions.sink + st.recent_capacity
            for plan in plans
            for site in plan.owners
            for st in site.streams.values()
        ),
        default=0,
    )
    longest = max(40, needed + needed // 4, min(2 * max(pages, default=0) + exact + 8, LONGEST))
    limits = [model.program.info.context_length or 1 << 30 for model in models]
    longest = min(longest, *limits)
    return longest, min(SHORT, longest), max(longest // 2 + 4, 1)


def comparison_schedule(lengths: Sequence[int]) -> Schedule:
    """Return the schedule: all sequences but the last start; the last takes the place of the first.

    Args:
        lengths: Tokens of at least two sequences, each more than 4.
    """
    *first, last = lengths
    starts = {row: n - (STEPS if row == 0 else 2 * STEPS) for row, n in enumerate(first)}
    return Schedule(
        SCHEDULE,
        (
            Prefill(starts, "left", sequences={row: row for row in starts}),
            Decode(STEPS),
            Free((0,)),
            Prefill({0: last - STEPS}, sequences={0: len(first)}),
            Reorder(tuple(reversed(starts))),
            Decode(STEPS),
        ),
    )


def short_schedule(lengths: Sequence[int]) -> Schedule:
    """Return the schedule that shows how far two plans lie apart on a sound runtime."""
    starts = {row: n - 1 for row, n in enumerate(lengths)}
    prefill = Prefill(starts, "left", sequences={row: row for row in starts})
    return Schedule("ragged prefill and decode", (prefill, Decode(1)))


def compare_caches(
    a: ModelLike,
    b: ModelLike,
    sequences: Probe,
    *,
    pairs: Pairs | None = None,
    symptoms: bool = True,
) -> CacheDiff:
    """Run both models through one schedule and compare what their caches hold.

    Args:
        a: The first model.
        b: The second one; it takes the same token ids.
        sequences: At least two, of more than 4 tokens each; `cache_lengths` says how many are good.
        pairs: Layers to compare, (layer of A, layer of B); by default those of the same index.
        symptoms: Reuse pages and reorder rows too, and run both once more to tell what differs, if
            anything does. Two sides with the same runtime have the same faults.

    Returns:
        An empty result if one of them has no cache.
    """
    if a.plan is None or b.plan is None:
        return CacheDiff()
    wanted = _equal_layers(a, b) if pairs is None else pairs
    lengths = sequences.lengths
    schedule = comparison_schedule(lengths) if symptoms else short_schedule(lengths)
    alone = Lockstep(a, b, sequences, wanted, is_led=False)
    layers, complaints = _NaturalErrors(wanted), list[str]()
    for action in schedule.actions:
        alone.act(action)
        complaints += [
            f"{side}: {line}"
            for side, run in (("A", alone.a), ("B", alone.b))
            for line in _account(run)
        ]
        layers.add(alone)
    found = layers.result()
    lines = tuple(dict.fromkeys(complaints))
    if not symptoms or (not complaints and _is_equal(found, alone, _dtype(a, b))):
        return CacheDiff(found, lines, (schedule.name,))
    led = Lockstep(a, b, sequences, wanted, is_led=True)
    finder = FaultFinder(wanted, tolerance_for(_dtype(a, b)))
    for action in schedule.actions:
        led.act(action)
        finder.look(led, action)
    return CacheDiff(found, lines, (schedule.name,), finder.symptoms())


def _equal_layers(a: ModelLike, b: ModelLike) -> Pairs:
    assert a.plan is not None, "it has a cache"
    assert b.plan is not None, "it has a cache"
    others = {site.layer for site in b.plan.sites}
    return [(site.layer, site.layer) for site in a.plan.sites if site.layer in others]


def _dtype(a: ModelLike, b: ModelLike) -> torch.dtype:
    return coarsest(a.program.dtype, b.program.dtype)


def _account(run: Replay) -> list[str]:
    """Return what is wrong with the lengths and bytes of one side, by its own plan."""
    wrong = []
    wanted = [run.rows[row][1] for row in sorted(run.rows)]
    got = list(run.session.sequence_lengths())
    if got != wanted:
        wrong.append(f"sequence lengths must be {wanted}, not {got}")
    expected, held = run.expected_bytes(), run.session.cache_bytes()
    if held != expected:
        wrong.append(f"the cache must hold {expected} bytes, not {held}")
    return wrong


class _NaturalErrors:
    """Errors of every layer, the largest over all actions."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._worst: dict[int, dict[str, float | None]] = {}

    def add(self, run: Lockstep) -> None:
        """Compare what both sides hold now."""
        for layer, other in self._pairs:
            mine, theirs = run.a.session.logical_cache(layer), run.b.session.logical_cache(other)
            now = {
                "key": shaped_error(theirs.k, mine.k),
                "value": shaped_error(theirs.v, mine.v),
                "codes": _codes(run, layer, other),
            }
            old = self._worst.setdefault(layer, dict.fromkeys(now))
            for name, error in now.items():
                before = old[name]
                if error is not None:
                    old[name] = error if before is None else max(before, error)

    def result(self) -> tuple[LayerDiff, ...]:
        """Return one record a layer of A."""
        return tuple(LayerDiff(layer, **worst) for layer, worst in sorted(self._worst.items()))


def _codes(run: Lockstep, layer: int, other: int) -> float | None:
    """Return the share of stored codes that differ, None if there are none of the same codec."""
    mine, theirs = run.a.plan.site(layer).streams, run.b.plan.site(other).streams
    names = [n for n in mine if n in theirs and mine[n].codec == theirs[n].codec]
    differing = total = 0
    rows = run.a.session.stored_planes(layer)
    for row, twin in zip(rows, run.b.session.stored_planes(other), strict=False):
        for name in names:
            x, y = _plane(row, name), _plane(twin, name)
            if x is not None and y is not None and x.shape == y.shape:
                differing += int((x != y).sum())
                total += x.numel()
    return differing / total if total else None


def _plane(row: Mapping[str, Mapping[str, Tensor]], stream: str) -> Tensor | None:
    return row.get(stream, {}).get("codes")


def shaped_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return the `rms_error`, or None for other shapes."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return None
    return rms_error(got, expected)


def _is_equal(layers: Sequence[LayerDiff], run: Lockstep, dtype: torch.dtype) -> bool:
    """Whether caches and logits agree to rounding."""
    tolerance = tolerance_for(dtype)
    errors = [error for diff in layers for error in (diff.key, diff.value)]
    if any(error is None or error > tolerance.state for error in errors):
        return False
    for place, logits in run.a.logits.items():
        other = run.b.logits[place]
        if other.shape != logits.shape:
            return False
        worst = (other.double().cpu() - logits.double().cpu()).abs().max()
        if not worst <= tolerance.logits * logits.double().abs().max():
            return False
    return True
