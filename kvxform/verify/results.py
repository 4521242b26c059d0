"""What the verification of a finished model found, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared in one schedule.

    Attributes:
        schedule: Name of the schedule.
        compared: What was compared, and with what.
        error: Worst error, or None where the two must simply be equal.
        bound: Largest error that passes, or None if it was only measured.
        at: Where the worst error was, or what is wrong; empty if there is nothing to say.
        is_equal: Whether what must be equal is.
    """

    schedule: str
    compared: str
    error: float | None = None
    bound: float | None = None
    at: str = ""
    is_equal: bool = True

    @property
    def is_fine(self) -> bool:
        """Whether it passes; what was only measured does."""
        if self.bound is None:
            return self.is_equal
        return self.is_equal and self.error is not None and self.error <= self.bound


@dataclass(frozen=True)
class Verification:
    """Everything that was compared.

    Attributes:
        name: Model and recipe.
        lowering: What ran.
        dtype: Dtype whose rounding sets the bounds.
        reference: What it was compared with, in words.
        is_lossy: Whether the cache loses precision.
        comparisons: In the order in which schedules ran.
        left_out: Schedules that do not apply, and why, by key.
    """

    name: str
    lowering: str
    dtype: str
    reference: str
    is_lossy: bool
    comparisons: tuple[Comparison, ...]
    left_out: Mapping[str, str]

    @property
    def is_fine(self) -> bool:
        """Whether every comparison passes."""
        return not any(True for _ in self.failures())

    def failures(self) -> Iterator[Comparison]:
        """Yield what does not pass."""
        return (comparison for comparison in self.comparisons if not comparison.is_fine)

    def to_data(self) -> dict[str, Any]:
        """Return plain data; an error that is no number is None, and not equal."""
        data = dataclasses.asdict(self)
        for entry, comparison in zip(data["comparisons"], self.comparisons, strict=True):
            entry["is_fine"] = comparison.is_fine
            if entry["error"] is not None and not math.isfinite(entry["error"]):
                entry["error"] = None
        return {"is_fine": self.is_fine, **data, "left_out": dict(self.left_out)}
