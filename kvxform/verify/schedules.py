"""Schedules: the ways in which sequences come into a cache, stay in it and leave it.

Every schedule feeds the same sequences, whole or in part. A causal model gives the same K, V and
logits at a position however its tokens arrive, so one run of the source is the reference of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Prefill:
    """Append tokens to rows of a session.

    Attributes:
        tokens: For each row, how many tokens of its sequence come next.
        padding: Side on which short rows are padded.
        chunk_size: Tokens per forward pass, or None for all at once.
        sequences: Sequence of each row that starts here; rows not named continue.
        all_logits: Ask for the logits of every position.
    """

    tokens: Mapping[int, int]
    padding: Literal["left", "right"] = "right"
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


Action = Prefill | Decode | Free


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
