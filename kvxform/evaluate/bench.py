"""Tokens per second of prefill and decode; models take turns, so that drift hits all alike."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.evaluate.runners import Runner


@dataclass(frozen=True)
class Rate:
    """Tokens per second over repeats: median, slowest and fastest."""

    median: float
    slowest: float
    fastest: float

    @classmethod
    def of(cls, num_tokens: int, times_s: list[float]) -> Rate:
        """Return the rate of `num_tokens` tokens done in each of `times_s` seconds."""
        rates = [num_tokens / seconds for seconds in times_s]
        return cls(statistics.median(rates), min(rates), max(rates))


@dataclass(frozen=True)
class Speed:
    """How fast one model is.

    Attributes:
        prefill: Prompt tokens per second.
        decode: New tokens per second, one at a time, after the prompt.
        prompt_tokens: Length of the prompt.
        new_tokens: Decode steps of one repeat.
        repeats: How often it was timed.
        batch_size: Rows that ran together; rates count the tokens of all of them.
    """

    prefill: Rate
    decode: Rate
    prompt_tokens: int
    new_tokens: int
    repeats: int
    batch_size: int = 1

    @property
    def first_token_s(self) -> float:
        """Seconds from the prompt to the logits of its last tokens, median."""
        return self.batch_size * self.prompt_tokens / self.prefill.median


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far (Linux counts in KiB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_speed(
    runners: Mapping[str, Runner],
    input_ids: Tensor,
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Speed]:
    """Time every runner on the same prompt and the same forced continuation.

    All runners decode the same tokens, so that no model gains by stopping early. One short warm-up
    comes first.

    Args:
        runners: Models by name.
        input_ids: Prompts, int64 `[B, S]`; all rows decode the tokens of the first one.
        new_tokens: Decode steps to time.
        repeats: Rounds; each runner is timed once a round.
        progress: Called with the number of rounds done.
    """
    prefill_s: dict[str, list[float]] = {name: [] for name in runners}
    decode_s: dict[str, list[float]] = {name: [] for name in runners}
    forced = input_ids[0, torch.arange(new_tokens) % input_ids.shape[1]]
    for runner in runners.values():
        _time_once(runner, input_ids, forced[:2])
    for done in range(repeats):
        for name, runner in runners.items():
            first, rest = _time_once(runner, input_ids, forced)
            prefill_s[name].append(first)
            decode_s[name].append(rest)
        if progress is not None:
            progress(done + 1)
    batch_size, prompt_tokens = input_ids.shape
    return {
        name: Speed(
            prefill=Rate.of(batch_size * prompt_tokens, prefill_s[name]),
            decode=Rate.of(batch_size * new_tokens, decode_s[name]),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            batch_size=batch_size,
        )
        for name in runners
    }


def _time_once(runner: Runner, input_ids: Tensor, forced: Tensor) -> tuple[float, float]:
    """Return seconds of one prefill and of decoding all `forced` tokens."""
    start = time.perf_counter()
    runner.prefill(input_ids)
    middle = time.perf_counter()
    for position in range(len(forced)):
        runner.decode(forced[position].expand(len(input_ids)))
    return middle - start, time.perf_counter() - middle
