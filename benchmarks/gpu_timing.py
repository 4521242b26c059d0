"""Times on a GPU: replayed CUDA graphs over caches in rotation, and the rate of a read-only stream.

A turn calls every function of a list once. The functions do the same work on different copies of a
cache, together so large that nothing of a copy is left in L2 when its turn comes again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

TURN_BYTES = 400_000_000  # read in one turn; an H100 has 50 MB of L2
WARM_STEPS = 6
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median_us: Median over turns.
        low_us: The time that a tenth of the turns beat.
        high_us: The time that a tenth of the turns exceed.
        turns: Turns that were timed.
        captured: Whether a CUDA graph was replayed; if not, launches by the host are included.
    """

    median_us: float
    low_us: float
    high_us: float
    turns: int
    captured: bool

    @classmethod
    def of(cls, times_us: Sequence[float], *, captured: bool) -> Timing:
        """Return the summary of times of single calls."""
        tenths = statistics.quantiles(times_us, n=10, method="inclusive")
        middle = statistics.median(times_us)
        return cls(middle, tenths[0], tenths[-1], len(times_us), captured)


def copies_for(cache_bytes: float) -> int:
    """Return how many copies of a cache must take turns, at least two."""
    return max(2, math.ceil(TURN_BYTES / cache_bytes))


def time_calls(calls: Sequence[Call], *, turns: int = 60, warm_turns: int = 3) -> Timing:
    """Time one turn of `calls`, divided by their number.

    They are captured into one CUDA graph; where that fails they are launched one by one.
    """
    return time_turn_about([calls], turns=turns, warm_turns=warm_turns)[0]


def time_turn_about(
    lists: Sequence[Sequence[Call]], *, turns: int = 60, warm_turns: int = 3
) -> list[Timing]:
    """Time several lists of calls as `time_calls` does, turn about: all see the same clocks."""
    captured = [capture(calls) for calls in lists]
    runs = [turn or _one_by_one(calls) for turn, calls in zip(captured, lists, strict=True)]
    for _ in range(warm_turns):
        for run in runs:
            run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, calls, own in zip(runs, lists, times, strict=True):
            own.append(_time_once(run) / len(calls))
    return [
        Timing.of(own, captured=turn is not None) for own, turn in zip(times, captured, strict=True)
    ]


def _time_once(run: Callable[[], None]) -> float:
    """Return microseconds of one run; the host waits for it, or it would run ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def capture(calls: Sequence[Call]) -> Callable[[], None] | None:
    """Return a function that replays `calls`, or None if they cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated on first use, happens here
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception:  # libraries raise many types for what must not be captured
        torch.cuda.synchronize()
        return None
    return graph.replay


def _one_by_one(calls: Sequence[Call]) -> Callable[[], None]:
    def turn() -> None:
        for call in calls:
            call()

    return turn


def measure_read_stream(num_bytes: int = 1 << 30) -> float:
    """Return GB/s at which a kernel that only reads gets through `num_bytes`; the best of five."""
    from read_stream import CONFIGS, read

    words = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    times = [
        time_calls([lambda c=config: read(words, sink, c)], turns=30).median_us
        for config in CONFIGS
    ]
    return num_bytes / min(times) / 1e3


def time_steps(step: Call, steps: int, device: torch.device) -> Timing:
    """Time steps that follow each other; nothing waits in between."""
    for _ in range(WARM_STEPS):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        times = [(b - a) * 1e6 for a, b in itertools.pairwise(marks)]
        return Timing.of(times, captured=False)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
    return Timing.of(times, captured=False)


def peak_bytes(device: torch.device) -> int:
    """Return the peak of allocated memory since `free_memory`; 0 off the GPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
