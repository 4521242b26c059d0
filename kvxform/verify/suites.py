"""A suite: every schedule that fits a plan and a context, on sequences made for it.

Schedules have keys, by which users name them. What cannot be run says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvxform.errors import KvxformError, nearest_hint
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import AttentionSite
from kvxform.verify.probe import Probe
from kvxform.verify.schedules import (
    Schedule,
    full_schedules,
    long_schedule,
    padded_schedule,
    row_schedules,
    sharing_schedule,
    wrap_schedule,
)

STEPS = 64  # decode steps of the long decode
LONGEST_WRAP = 512  # windows up to here are wrapped
WRAP_STEPS = 24  # tokens beyond the window, or beyond what calibration saw
SHORTEST = 40  # tokens that come before anything is forked
LONG = "long-positions"
SCHEDULES = {
    "prefill": "prefill",
    "chunked-prefill": "chunked prefill",
    "decode": "decode",
    "padded": "padded on both sides",
    "ragged": "ragged batch",
    "page-reuse": "page reuse after free",
    "batch-reorder": "batch reorder",
    "beam-fork": "beam fork",
    "crop-and-rewind": "fork, crop and rewind",
    "shared-layers": "shared layers",
    "ring-wrap": "window wrap",
    LONG: "long positions",
}
"""Names of schedules by the keys that users write, in the order in which they run."""
Write = Callable[[Sequence[int]], Probe]


@dataclass(frozen=True)
class Suite:
    """What is to be run.

    Attributes:
        sequences: Token ids; the fourth sequence begins like the first.
        schedules: By key.
        left_out: Why the others are not run, by key.
    """

    sequences: Probe
    schedules: Mapping[str, Schedule]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Fit:
    """What a suite is made for.

    Attributes:
        plan: What is cached.
        sites: Attentions; their windows and chunks are wrapped.
        needed: Shortest sequence with encoded tokens in every stream.
        context: Longest sequence that the model takes.
        steps: Steps of the long decode.
        known: Longest sequence that calibration saw, for `long-positions`.
        is_ragged: Whether sequences may have different lengths.
    """

    plan: CachePlan
    sites: Sequence[AttentionSite]
    needed: int
    context: int
    steps: int = STEPS
    known: int = 256
    is_ragged: bool = True

    @property
    def window(self) -> int | None:
        """The largest window or chunk that the context and the time for a check allow."""
        spans = [n for site in self.sites for n in (site.window, site.chunk) if n is not None]
        limit = min(LONGEST_WRAP, self.context - 1)
        return max((n for n in spans if n <= limit), default=None)

    @property
    def base(self) -> int:
        """Tokens that come before anything is forked."""
        return max(SHORTEST, self.needed + 8)

    @property
    def usual_lengths(self) -> tuple[int, int, int, int]:
        """Lengths of the four sequences of most schedules, were the context long enough."""
        longest = self.base + self.steps + 2
        if not self.is_ragged:
            return longest, longest, longest, longest
        return longest, self.base // 2 + self.steps + 2, 24, longest


def check_keys(keys: Collection[str]) -> None:
    """Raise KVX801 if one of `keys` is no schedule."""
    for key in keys:
        if key not in SCHEDULES:
            hint = nearest_hint(key, SCHEDULES)
            raise KvxformError("KVX801", "a schedule must be known", got=repr(key), hint=hint)


def make_suites(fit: Fit, write: Write, keys: Collection[str] | None = None) -> tuple[Suite, ...]:
    """Return the schedules `keys` (all by default), as far as they fit.

    Long positions are a suite of their own, so that only one sequence is long.

    Args:
        fit: What they are made for.
        write: Returns sequences of the lengths asked for.
        keys: Keys of `SCHEDULES`.

    Raises:
        KvxformError: KVX801 for an unknown key.
    """
    check_keys(keys or ())
    wanted = [key for key in SCHEDULES if keys is None or key in keys]
    usual = [key for key in wanted if key != LONG]
    suites = [_usual_suite(fit, write, usual)] if usual else []
    return (*suites, _long_suite(fit, write)) if LONG in wanted else tuple(suites)


def _usual_suite(fit: Fit, write: Write, keys: Collection[str]) -> Suite:
    window = fit.window if "ring-wrap" in keys else None
    lengths = [*fit.usual_lengths, *([] if window is None else [window + WRAP_STEPS])]
    probe = write([min(n, fit.context) for n in lengths])
    prefix = min(fit.base, probe.lengths[0] // 2)
    ids = probe.input_ids.clone()
    ids[3, :prefix] = ids[0, :prefix]
    made = _usual_schedules(fit, probe.lengths, prefix, window)
    schedules = {key: made[SCHEDULES[key]] for key in keys if SCHEDULES[key] in made}
    left_out = {key: _reason(key, fit) for key in keys if key not in schedules}
    return Suite(Probe(ids, probe.lengths), schedules, left_out)


def _usual_schedules(
    fit: Fit, lengths: Sequence[int], prefix: int, window: int | None
) -> dict[str, Schedule]:
    """Return every schedule that fits, by name."""
    found = [
        *full_schedules(lengths[:3], fit.steps),
        padded_schedule(lengths[:3]),
        *row_schedules(fit.plan, lengths[:4], prefix),
    ]
    if len(fit.plan.owners) < len(fit.plan.sites):
        found.append(sharing_schedule(lengths[:4], prefix))
    if window is not None:
        found.append(wrap_schedule(4, lengths[4], window))
    return {schedule.name: schedule for schedule in found}


def _long_suite(fit: Fit, write: Write) -> Suite:
    longest = min(max(fit.known, fit.needed) + WRAP_STEPS, fit.context)
    if longest <= min(max(fit.usual_lengths), fit.context):
        nothing = Probe(torch.zeros(0, 0, dtype=torch.int64), ())
        return Suite(nothing, {}, {LONG: _reason(LONG, fit)})
    return Suite(write([longest]), {LONG: long_schedule(0, longest)}, {})


def _reason(key: str, fit: Fit) -> str:
    if key == "crop-and-rewind":
        return "the plan has encoded what would have to be exact again"
    if key == "shared-layers":
        return "no layer reads the cache of another one"
    if key == "ring-wrap":
        return f"no window or chunk of at most {min(LONGEST_WRAP, fit.context - 1)} tokens"
    return f"the context of {fit.context} tokens is no longer than the other sequences"
