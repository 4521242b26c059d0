"""The first pass of a recipe that fails, and what it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvxform.bisecting.outcomes import (
    Attempt,
    Failure,
    Limits,
    attempt,
    final_plan,
)
from kvxform.bisecting.records import StageRow
from kvxform.calibrate import CalibrationLike
from kvxform.ir.program import Program
from kvxform.order import PlannedPass, plan_passes
from kvxform.pass_base import Match
from kvxform.pipeline import calibrated, recalibrated
from kvxform.recipe import Recipe
from kvxform.verify.prober import Executor, Prober

SEEN_IN_LOGITS = ("KVX212", "KVX501")
Talk = Callable[[str], None]


@dataclass(frozen=True)
class Broken:
    """A pass that fails, with all that is needed to try it again.

    Attributes:
        planned: The pass.
        before: The program that it was given.
        prober: Has measured `before`.
        failure: How it failed.
        matches: Places where it applies; empty if it did not say.
        uncached: The last program before it that caches can be compared with: it has none itself.
        steps: Passes from there up to it; it is the last one.
    """

    planned: PlannedPass
    before: Program
    prober: Prober
    failure: Failure
    matches: tuple[Match, ...]
    uncached: Program
    steps: tuple[PlannedPass, ...]

    def attempt(self, wanted: frozenset[int], limits: Limits) -> Attempt:
        """Try the pass at some of its matches; the cache is checked if that is what failed."""
        state = self.failure.code not in SEEN_IN_LOGITS
        return attempt(self.before, self.planned, self.prober, limits, wanted, state=state)


def find_broken(
    program: Program,
    recipe: Recipe,
    limits: Limits,
    *,
    executor: Executor,
    calibration: CalibrationLike = None,
    talk: Talk,
) -> tuple[list[StageRow], Broken | None]:
    """Run the passes of `recipe` until one breaks its contract or a limit.

    Args:
        program: A captured program; it is not changed.
        recipe: What to do; its bounds are not looked at.
        limits: See `require_limits`.
        executor: Makes a runnable model of a program.
        calibration: As for `optimize`.
        talk: Told what runs.

    Returns:
        A row for every pass that ran, and the one that failed or None.

    Raises:
        KvxformError: What is wrong with the recipe or the model, rather than with a pass.
    """
    passes = plan_passes(recipe.passes, program.facts, auto_order=recipe.auto_order)
    if any(planned.graph_pass.needs_calibration for planned in passes):
        talk("calibration")
        program = calibrated(program, recipe, passes, calibration)
    talk("source model")
    prober = Prober(program, executor, final_plan(program, passes))
    uncached, first, rows = program, 0, list[StageRow]()
    for index, planned in enumerate(passes):
        if _can_be_source(program):
            uncached, first = program, index
        talk(planned.name)
        found = attempt(program, planned, prober, limits)
        rows.append(_row(planned, found))
        if found.program is None or found.failure is not None:
            assert found.failure is not None, "without a failure there is a program"
            matches = found.matches or _matches(planned, program)
            steps = tuple(passes[first : index + 1])
            return rows, Broken(planned, program, prober, found.failure, matches, uncached, steps)
        rest = passes[index + 1 :]
        is_changed = found.program is not program and not planned.graph_pass.numerics.is_exact
        program = recalibrated(found.program, recipe, rest) if is_changed else found.program
        prober = found.prober
    return rows, None


def _can_be_source(program: Program) -> bool:
    """Whether K and V can be recorded from a program; latents can be before they are cached."""
    return not program.is_cached and all(site.payload != "latent" for site in program.sites)


def _row(planned: PlannedPass, found: Attempt) -> StageRow:
    stage, is_failing = found.stage, found.failure is not None
    if stage is None:
        return StageRow(planned.name, None, None, is_failing)
    return StageRow(planned.name, stage.vs_before.relative, stage.vs_source.kl, is_failing)


def _matches(planned: PlannedPass, program: Program) -> tuple[Match, ...]:
    """Return where a pass that broke down applies, if it can still say so."""
    try:
        found = planned.graph_pass.match(program)
    except Exception:
        return ()
    return tuple(match for match in found if isinstance(match, Match))
