"""Explain passes: play a recipe on shapes alone, and keep what every `match` says on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.errors import KvxformError
from kvxform.explain.pass_records import (
    FINE,
    REQUIRED,
    OptionRecord,
    Outcome,
    PassFinding,
    PlaceRecord,
    RequirementRecord,
    State,
)
from kvxform.ir.facts import Requirement
from kvxform.ir.program import Program
from kvxform.order import PlannedPass, describe_wanted, hint_for
from kvxform.pass_base import GraphPass, Match, NoMatch
from kvxform.pipeline import apply_pass
from kvxform.summary import first_sentence


def explain_passes(
    program: Program, passes: Sequence[PlannedPass], name: str | None
) -> tuple[PassFinding, ...]:
    """Explain passes, each on what those before it leave.

    Args:
        program: A captured program; it is not changed, and its weights are not read.
        passes: The passes, in order.
        name: Explain only passes of this name, or None for all.

    Returns:
        One finding a pass; after a pass that is refused, the others are `not tried`.
    """
    weights = {name: weight.to("meta") for name, weight in program.weights.items()}
    program = dataclasses.replace(program, weights=weights)
    findings, stopped = [], ""
    for planned in passes:
        finding = contract_of(type(planned.graph_pass), planned.graph_pass, planned.step.at)
        if stopped:
            finding = dataclasses.replace(finding, why=stopped)
        else:
            finding, program = _try(program, planned, finding)
            if finding.state not in FINE:
                stopped = f"{planned.name} before it is refused: {finding.why}"
        findings.append(finding)
    return tuple(f for f in findings if name in (None, f.name))


def contract_of(cls: type[GraphPass], graph_pass: GraphPass | None, at: str = "") -> PassFinding:
    """Return the contract of a pass that has not been tried.

    Args:
        cls: The pass.
        graph_pass: An instance with its options, or None if it has none yet.
        at: Where it stands in a recipe.
    """
    return PassFinding(
        name=cls.pass_name(),
        at=at,
        about=first_sentence(cls.__doc__),
        source=cls.source,
        exactness=cls.numerics.exactness.value,
        metric=cls.numerics.metric,
        bound=cls.numerics.bound,
        options=tuple(_options(cls, graph_pass)),
        requires=tuple(
            RequirementRecord(r.fact, describe_wanted(r), None, None, r.because)
            for r in cls.requires
        ),
        ensures={} if graph_pass is None else dict(graph_pass.ensures()),
        invalidates=cls.invalidates,
        state="not tried",
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option as plain data; `required` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return REQUIRED if field.default is dataclasses.MISSING else _plain(field.default)


def _options(cls: type[GraphPass], graph_pass: GraphPass | None) -> Iterator[OptionRecord]:
    for field in dataclasses.fields(cls):
        default = default_of(field)
        value = default if graph_pass is None else _plain(getattr(graph_pass, field.name))
        yield OptionRecord(field.name, str(field.type), default, value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _try(
    program: Program, planned: PlannedPass, finding: PassFinding
) -> tuple[PassFinding, Program]:
    """Return what a pass finds, and the program after it (the same one if it cannot run)."""
    requires = tuple(_check(r, program, planned.name) for r in planned.graph_pass.requires)
    finding = dataclasses.replace(finding, requires=requires)
    unmet = [r for r in requires if not r.is_met]
    if unmet:
        why = f"it needs {unmet[0].fact} to be {unmet[0].wanted}"
        return dataclasses.replace(finding, why=why), program
    try:
        found = planned.graph_pass.match(program)
        finding = dataclasses.replace(finding, places=_places(program, found))
        after, _ = apply_pass(program, planned)
    except KvxformError as error:
        applies_nowhere = error.code == "KVX210"
        state: State = "no match" if applies_nowhere else "refused"
        return dataclasses.replace(finding, state=state, why=str(error)), program
    return dataclasses.replace(finding, state=_state_of(found)), after


def _state_of(found: Sequence[Match | NoMatch]) -> State:
    """Return the state of a pass that may run: not finding anything is allowed here."""
    if any(isinstance(f, Match) for f in found):
        return "applies"
    is_done = bool(found) and all(isinstance(f, NoMatch) and f.done for f in found)
    return "done" if is_done else "skipped"


def _check(requirement: Requirement, program: Program, name: str) -> RequirementRecord:
    is_met = requirement.is_met(program.facts)
    return RequirementRecord(
        requirement.fact,
        describe_wanted(requirement),
        program.facts[requirement.fact],
        is_met,
        requirement.because,
        "" if is_met else hint_for(requirement, program.facts, name),
    )


def _places(program: Program, found: Sequence[Match | NoMatch]) -> tuple[PlaceRecord, ...]:
    nodes = {node.name: node for node in program.graph.nodes}
    layers = {node.kwargs["layer"]: node for node in program.calls(*kvx.ATTENTION_OPS)}
    return tuple(_place(f, nodes.get(f.node) or layers.get(f.layer)) for f in found)


def _place(found: Match | NoMatch, node: fx.Node | None) -> PlaceRecord:
    """Return the record of one place; `node` is the one it names, else the attention there."""
    module, origin = ("", "") if node is None else (node.meta["module"], node.meta["origin"])
    if isinstance(found, Match):
        return PlaceRecord("match", found.layer, module, origin)
    outcome: Outcome = "done" if found.done else "no match"
    return PlaceRecord(outcome, found.layer, module, origin, found.reason, found.hint)


def required_options(cls: type[GraphPass]) -> list[str]:
    """Return the names of the options that have no default."""
    return [f.name for f in dataclasses.fields(cls) if default_of(f) == REQUIRED]


def need_options(cls: type[GraphPass]) -> PassFinding:
    """Return the contract of a pass that cannot be tried without options."""
    names = " and ".join(required_options(cls))
    why = f"it needs options: {names}; give a recipe that has it, or write them behind its name"
    return dataclasses.replace(contract_of(cls, None), why=why)
