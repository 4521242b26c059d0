"""What is said of a pass: its contract, and the places it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

REQUIRED = "required"  # stands for the default of an option that has none
Outcome = Literal["match", "no match", "done"]
State = Literal["applies", "done", "skipped", "no match", "refused", "not tried"]
FINE = ("applies", "done", "skipped")


@dataclass(frozen=True)
class OptionRecord:
    """One option of a pass: its type, its default and the value it has here, as plain data."""

    name: str
    type: str
    default: Any
    value: Any


@dataclass(frozen=True)
class RequirementRecord:
    """One fact that a pass needs.

    Attributes:
        fact: Name of the fact.
        wanted: Values that are fine, in words.
        got: What it is where the pass stands; None if the pass was not reached.
        is_met: Whether that is fine; None if the pass was not reached.
        because: What would go wrong.
        hint: What to do if it is not met, or empty.
    """

    fact: str
    wanted: str
    got: Any
    is_met: bool | None
    because: str
    hint: str = ""


@dataclass(frozen=True)
class PlaceRecord:
    """One place that a pass looked at.

    Attributes:
        outcome: `match`, `no match`, or `done` if the pass had been applied there already.
        layer: Layer of the site, or None.
        module: Path of the source module, or empty.
        node: Op and source line of the first node that differs, or of the match; may be empty.
        reason: Why it does not match, or empty.
        hint: What would have to change, or empty.
    """

    outcome: Outcome
    layer: int | None
    module: str
    node: str = ""
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True)
class PassFinding:
    """One pass: its contract, and what it finds in the model.

    Attributes:
        name: Recipe name.
        at: Where it stands: `kv4.yaml:10`, or empty.
        about: What it does.
        source: Where the method comes from.
        exactness: `exact`, `approximate` or `needs training`.
        metric: What an approximate pass is measured by, or None.
        bound: Largest allowed value of the metric, or None.
        options: Its options.
        requires: Facts that must hold before.
        ensures: Facts that hold afterwards.
        invalidates: Facts that go back to their defaults.
        state: `applies`, `done` (before), `skipped` (nowhere, which the recipe allows), `no match`
            (nowhere), `refused` or `not tried`.
        why: Why it is refused or was not tried, or empty.
        places: The places it looked at.
    """

    name: str
    at: str
    about: str
    source: str
    exactness: str
    metric: str | None
    bound: float | None
    options: tuple[OptionRecord, ...]
    requires: tuple[RequirementRecord, ...]
    ensures: dict[str, Any]
    invalidates: tuple[str, ...]
    state: State
    why: str = ""
    places: tuple[PlaceRecord, ...] = ()
