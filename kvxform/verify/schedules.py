"""Schedules: the ways in which sequences come into a cache, stay in it and leave it.

Every schedule feeds the same sequences, whole or in part. A causal model gives the same K, V and
logits at a position however its tokens arrive, so one run of the source is the reference of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvxform.ir.plan import CachePlan


@dataclass(frozen=True)
class Prefill:
    """Append tokens to rows of a session.

    Attributes:
        tokens: For each row, how many tokens of its sequence come next.
        padding: Side on which short rows are padded; with `both`, so are the longest.
        chunk_size: Tokens per forward pass, or None for all at once.
        sequences: Sequence of each row that starts here; rows not named continue.
        all_logits: Ask for the logits of every position.
    """

    tokens: Mapping[int, int]
    padding: Literal["left", "right", "both"] = "right"
    chunk_size: int | None = None
    sequences: Mapping[int, int] | None = None
    all_logits: bool = False


@dataclass(frozen=True)
class Decode:
    """Append one token to every live row, `steps` times."""

    steps: int


@dataclass(frozen=True)
class Free:
    """Forget rows; their pages go back to the pool."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class Reorder:
    """Let row i become what row `order[i]` was; a row named twice is forked.

    Attributes:
        order: Source of each row; other rows are freed.
        sequences: Rows that go on as another sequence, which begins with the same tokens.
    """

    order: tuple[int, ...]
    sequences: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Crop:
    """Drop the newest tokens of rows.

    Attributes:
        tokens: For each row, how many tokens stay.
        sequences: As for `Reorder`.
    """

    tokens: Mapping[int, int]
    sequences: Mapping[int, int] | None = None


Action = Prefill | Decode | Free | Reorder | Crop


@dataclass(frozen=True)
class Schedule:
    """A named list of actions on an empty session."""

    name: str
    actions: tuple[Action, ...]


def probe_schedule(lengths: Sequence[int], decode_steps: int = 3) -> Schedule:
    """Return the cheap schedule that runs after every pass: ragged prefill, then a few steps.

    It covers every position of sequences of `lengths`, all of them longer than `decode_steps`.
    """
    tokens = {row: n - decode_steps for row, n in enumerate(lengths)}
    sequences = {row: row for row in tokens}
    prefill = Prefill(tokens, "left", sequences=sequences, all_logits=True)
    return Schedule("ragged prefill and decode", (prefill, Decode(decode_steps)))


def full_schedules(lengths: Sequence[int], decode_steps: int = 64) -> tuple[Schedule, ...]:
    """Return the schedules of a full check.

    Args:
        lengths: Tokens of three sequences.
        decode_steps: Steps of the long decode; fewer if the sequences are short.
    """
    first, second, third = lengths
    whole = Prefill({0: first, 1: second}, sequences={0: 0, 1: 1})
    steps = min(decode_steps, first - 2, second - 1)
    short = {0: first - steps, 1: second - steps}
    chunks = Prefill({0: first, 1: second}, "left", chunk_size=7, sequences={0: 0, 1: 1})
    half = {0: max(1, first // 2), 1: max(1, second // 3)}
    rest = max(1, third // 2)
    tail = min(4, second - half[1], third - rest)
    return (
        Schedule("prefill", (whole,)),
        Schedule("chunked prefill", (chunks,)),
        Schedule("decode", (Prefill(short, sequences={0: 0, 1: 1}), Decode(steps))),
        Schedule("ragged batch", (Prefill(half, "left", sequences={0: 0, 1: 1}), Decode(tail))),
        Schedule(
            "page reuse after free",
            (
                Prefill(half, sequences={0: 0, 1: 1}),
                Free((0,)),
                Prefill({0: rest}, sequences={0: 2}),
                Decode(tail),
            ),
        ),
    )


def row_schedules(
    plan: CachePlan, lengths: Sequence[int], prefix: int, decode_steps: int = 28
) -> tuple[Schedule, ...]:
    """Return schedules that move, fork and crop rows, as far as `plan` allows.

    Args:
        plan: What is cached.
        lengths: Tokens of four sequences. The last begins with `prefix` tokens of the first.
        prefix: Tokens that those two share, two fewer than either has at most.
        decode_steps: Steps after a fork; fewer if the sequences are short.
    """
    first, second, third, twin = lengths
    steps = min(decode_steps, first - prefix, twin - prefix)
    some = {0: max(1, first // 2), 1: max(1, second // 3), 2: max(1, third // 2)}
    tail = min(4, second - some[1], third - some[2], first - some[0]) // 2
    moved = (
        Prefill(some, "left", sequences={0: 0, 1: 1, 2: 2}),
        Reorder((2, 0, 1)),
        Decode(tail),
        Reorder((1, 2, 0)),
        Decode(tail),
    )
    start = Prefill({0: prefix}, sequences={0: 0})
    fork = Reorder((0, 0), {1: 3})
    half = steps // 2
    beams = (start, fork, Decode(half), Reorder((1, 0)), Decode(steps - half), Reorder((1,)))
    schedules = [Schedule("batch reorder", moved), Schedule("beam fork", beams)]
    drop = next((n for n in range(min(8, steps), 0, -1) if _can_crop(plan, prefix + n, prefix)), 0)
    if drop:
        again = Crop({0: prefix, 1: prefix}, {0: 3, 1: 0})
        rewind = (start, fork, Decode(drop), again, Decode(steps))
        schedules.append(Schedule("fork, crop and rewind", rewind))
    return tuple(schedules)


def padded_schedule(lengths: Sequence[int], decode_steps: int = 4) -> Schedule:
    """Return a schedule whose rows are padded on both sides, in one step and in chunks."""
    start = {row: max(1, n // (2 + row)) for row, n in enumerate(lengths)}
    after = {0: max(1, lengths[0] // 4), 1: 1, 2: 1}
    left = min(n - start[row] - after[row] for row, n in enumerate(lengths))
    return Schedule(
        "padded on both sides",
        (
            Prefill(start, "both", sequences={0: 0, 1: 1, 2: 2}),
            Prefill(after, "both", chunk_size=5),
            Decode(min(decode_steps, left)),
        ),
    )


def sharing_schedule(lengths: Sequence[int], prefix: int, decode_steps: int = 8) -> Schedule:
    """Return a schedule in which rows of shared layers are forked, written, freed and used again.

    Args:
        lengths: As for `row_schedules`, likewise `prefix`.
        prefix: Tokens that the first and the last sequence share.
        decode_steps: Steps after the fork and after the reuse; fewer if sequences are short.
    """
    first, second, _, twin = lengths
    steps = min(decode_steps, first - prefix, (twin - prefix) // 2)
    rest = max(1, min(second // 2, second - steps))
    return Schedule(
        "shared layers",
        (
            Prefill({0: prefix}, sequences={0: 0}),
            Reorder((0, 0), {1: 3}),
            Decode(steps),
            Free((0,)),
            Prefill({0: rest}, sequences={0: 1}),
            Decode(min(steps, second - rest)),
        ),
    )


def long_schedule(sequence: int, length: int, decode_steps: int = 8) -> Schedule:
    """Return a schedule that ends with decode steps at the last positions of a long sequence."""
    start = max(1, length - decode_steps)
    prefill = Prefill({0: start}, sequences={0: sequence}, chunk_size=256)
    return Schedule("long positions", (prefill, Decode(length - start)))


def wrap_schedule(sequence: int, length: int, window: int) -> Schedule:
    """Return a schedule that decodes past the end of a window; `length` is more than `window`."""
    start = max(1, min(window - 4, length - 1))
    prefill = Prefill({0: start}, sequences={0: sequence})
    return Schedule("window wrap", (prefill, Decode(length - start)))


def _can_crop(plan: CachePlan, length: int, tokens: int) -> bool:
    """Whether all that is exact with `tokens` tokens is still exact with `length`.

    Tokens that wait with a score cannot take back what dropped queries have added.
    """
    for stream in (st for site in plan.owners for st in site.streams.values()):
        body, sink = stream.body_tokens(tokens), stream.regions.sink
        has_tail = tokens > sink + body
        if has_tail and (stream.score_bytes or body != stream.body_tokens(length)):
            return False
    return True
