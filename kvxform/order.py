"""Order of passes: a recipe is checked over facts before any work is done.

Each pass says which facts it needs, makes true and makes unknown. Playing a recipe over these
declarations alone finds every wrong order, and says in words which pass has to move where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvxform.errors import RecipeError
from kvxform.ir.facts import Facts, Requirement
from kvxform.pass_base import PASSES, GraphPass
from kvxform.recipe import PassStep, build_pass


@dataclass(frozen=True)
class PlannedPass:
    """A step of a recipe with its pass."""

    step: PassStep
    graph_pass: GraphPass

    @property
    def name(self) -> str:
        """Recipe name of the pass."""
        return self.step.name


def plan_passes(steps: Sequence[PassStep], facts: Facts, *, auto_order: bool) -> list[PlannedPass]:
    """Return the passes of `steps` in a legal order.

    Args:
        steps: Steps of a recipe.
        facts: What is known of the program before the first pass.
        auto_order: Move passes as little as possible instead of refusing.

    Raises:
        RecipeError: KVX214 if a pass stands in the wrong place, KVX213 if one is missing.
    """
    passes = [PlannedPass(step, build_pass(step)) for step in steps]
    if auto_order:
        passes = _ordered(passes, facts) or passes
    check_order(passes, facts)
    return passes


def check_order(passes: Sequence[PlannedPass], facts: Facts) -> None:
    """Raise RecipeError KVX213 or KVX214 at the first requirement that would not be met."""
    before = [facts]
    for i, planned in enumerate(passes):
        for requirement in planned.graph_pass.requires:
            if not requirement.is_met(before[i]):
                raise _refusal(passes, i, requirement, before)
        before.append(facts_after(planned.graph_pass, before[i]))


def facts_after(graph_pass: GraphPass, facts: Facts) -> Facts:
    """Return what is known once `graph_pass` has run."""
    return facts.updated(graph_pass.ensures(), forget=graph_pass.invalidates)


def hint_for(requirement: Requirement, facts: Facts, name: str) -> str:
    """Return what to do where `requirement` of the pass called `name` is not met."""
    makers = passes_that_ensure(requirement, facts)
    if makers:
        return f"add {' or '.join(makers)} before {name}"
    return f"change the recipe so that {requirement.fact} is {describe_wanted(requirement)}"


def describe_wanted(requirement: Requirement) -> str:
    """Return the values that meet a requirement, in words."""
    if requirement.allowed:
        return " or ".join(str(value) for value in requirement.allowed)
    return "not " + " or ".join(str(value) for value in requirement.refused)


def _refusal(
    passes: Sequence[PlannedPass], index: int, requirement: Requirement, before: Sequence[Facts]
) -> RecipeError:
    """Say who spoiled the requirement, who would establish it too late, or who is missing."""
    needy = passes[index]
    for spoiler, facts in reversed(list(zip(passes[:index], before[:index], strict=True))):
        if requirement.is_met(facts):
            return _move(requirement, needy, above=spoiler, where=spoiler)
    for late in passes[index + 1 :]:
        if requirement.is_met(facts_after(late.graph_pass, before[index])):
            return _move(requirement, late, above=needy, where=needy)
    hint = hint_for(requirement, before[index], needy.name)
    return RecipeError("KVX213", requirement.because, where=needy.name, at=needy.step.at, hint=hint)


def _move(
    requirement: Requirement, mover: PlannedPass, *, above: PlannedPass, where: PlannedPass
) -> RecipeError:
    place = f" ({above.step.at})" if above.step.at else ""
    hint = f"move {mover.name} above {above.name}{place}"
    return RecipeError("KVX214", requirement.because, where=where.name, hint=hint)


def passes_that_ensure(requirement: Requirement, facts: Facts) -> list[str]:
    """Return registered passes that would meet `requirement` with their default options."""
    found = []
    for name, cls in sorted(PASSES.items()):
        graph_pass = _with_defaults(cls)
        if graph_pass is not None and requirement.is_met(facts_after(graph_pass, facts)):
            found.append(name)
    return found


def _with_defaults(cls: type[GraphPass]) -> GraphPass | None:
    """Return a pass with its default options, or None if some have to be given."""
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            return None
    try:
        return cls()
    except RecipeError:  # one of several options must be given
        return None


def _ordered(passes: Sequence[PlannedPass], facts: Facts) -> list[PlannedPass] | None:
    """Return a legal order that keeps the given one where it can, or None if there is none."""
    remaining, done = list(passes), list[PlannedPass]()
    while remaining:
        for planned in remaining:
            others = [p for p in remaining if p is not planned]
            if _is_runnable(planned, facts) and not _spoils(planned, others, facts):
                break
        else:
            return None
        remaining.remove(planned)
        done.append(planned)
        facts = facts_after(planned.graph_pass, facts)
    return done


def _is_runnable(planned: PlannedPass, facts: Facts) -> bool:
    return all(r.is_met(facts) for r in planned.graph_pass.requires)


def _spoils(planned: PlannedPass, others: Sequence[PlannedPass], facts: Facts) -> bool:
    """Whether running `planned` now takes away what one of `others` needs and has."""
    after = facts_after(planned.graph_pass, facts)
    needs = [r for other in others for r in other.graph_pass.requires]
    return any(r.is_met(facts) and not r.is_met(after) for r in needs)
