"""What the passes of a build promised, and what was measured, by classes that rounding leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from kvxform.report import BoundRecord, PassRecord, Report

ROUNDING = "rounding"
UNMEASURED = "not measured"
_MARKS = (1.0, 2.0, 5.0)
_FACTOR = 2.6  # two measurements of the same thing may lie on both sides of a mark, no further


@dataclass(frozen=True)
class PassContract:
    """One pass.

    Attributes:
        name: Recipe name.
        exactness: `exact`, `approximate` or `needs training`.
        matched: Places where it was applied.
        measured: `rounding` for an exact pass that kept its tolerance; else the KL divergence from
            the stage before in nats, as the nearest of 1, 2, 5 times a power of ten; or
            `not measured`.
        options: Its options, as the recipe gives them.
    """

    name: str
    exactness: str
    matched: int
    measured: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BoundContract:
    """A bound of the recipe, and whether it was kept; None if it was not measured."""

    name: str
    limit: float
    kept: bool | None


def pass_contracts(report: Report) -> tuple[PassContract, ...]:
    """Return what a report says of its passes."""
    return tuple(
        PassContract(
            record.name, record.exactness, record.matched, _measured(record), dict(record.options)
        )
        for record in report.passes
    )


def bound_contracts(report: Report) -> tuple[BoundContract, ...]:
    """Return what a report says of the bounds of its recipe."""
    return tuple(_bound(record) for record in report.bounds)


def is_same_measure(before: str, after: str) -> bool:
    """Return whether two measurements may be of the same thing."""
    if before == after:
        return True
    if ROUNDING in (before, after):
        return False
    if UNMEASURED in (before, after):
        return True  # nothing is known, so nothing has changed
    low, high = sorted((float(before), float(after)))
    return low > 0 and high / low < _FACTOR


def _measured(record: PassRecord) -> str:
    found = record.vs_before
    if found is None:
        return UNMEASURED
    if record.exactness == "exact":
        return ROUNDING  # a pass that breaks its contract ends the build
    return mark(found.kl)


def _bound(record: BoundRecord) -> BoundContract:
    return BoundContract(record.name, record.limit, record.is_kept)


def mark(value: float) -> str:
    """Return a figure as the nearest of 1, 2, 5 times a power of ten; `0` below 1e-9."""
    if not value >= 1e-9:
        return "0"
    power = math.floor(math.log10(value))
    marks = [m * 10.0**p for p in (power, power + 1) for m in _MARKS]
    return f"{min(marks, key=lambda m: abs(math.log(m / value))):.0e}"
