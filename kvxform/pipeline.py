"""Pipeline: runs a recipe on a Program, pass by pass, and measures every promise.

Before any work, the order of the whole recipe is checked over facts, and all passes run once on
weights without values, so that what cannot work is refused within a second. Then each pass runs on
a clone: the caller's Program stays as it was whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvxform.calibrate import CalibrationLike, collect, make_calibration
from kvxform.contracts import bound_records, require_bounds, require_contract, require_lowering
from kvxform.errors import KvxformError, PassError
from kvxform.ir.program import Program
from kvxform.ir.verify import verify_program
from kvxform.order import PlannedPass, check_order, facts_after, plan_passes
from kvxform.pass_base import Match, NoMatch, Rewriter
from kvxform.recipe import Recipe
from kvxform.report import PassRecord, Report
from kvxform.runtime.executables import check_target
from kvxform.summary import (
    cache_measured,
    layer_records,
    pass_record,
    plan_summary,
    source_summary,
)
from kvxform.verify.prober import Executor, Prober, StageMeasure

Verify = Literal["none", "probe", "full"]
NEAREST_REASONS = 3  # reasons quoted when a pass applies nowhere


@dataclass(frozen=True)
class Stage:
    """Progress of a run; `seconds` is None when the stage begins."""

    index: int
    total: int
    name: str
    seconds: float | None = None


Progress = Callable[[Stage], None]


def run_pipeline(
    program: Program,
    recipe: Recipe,
    *,
    executor: Executor,
    lowered: Executor | None = None,
    verify: Verify = "probe",
    calibration: CalibrationLike = None,
    progress: Progress | None = None,
) -> tuple[Program, Report]:
    """Apply `recipe` to `program`.

    Args:
        program: A captured program without a cache; it is not changed.
        recipe: What to do.
        executor: Makes a runnable model of a program; the reference of all comparisons.
        lowered: Makes the model that the recipe asks for, where that is another lowering; it is
            compared with the reference at the end.
        verify: `none` measures nothing, `probe` measures after every pass, `full` also runs all
            schedules of the cache-state checker at the end.
        calibration: What to collect statistics on, if a pass needs any; see `make_calibration`.
        progress: Called when a stage begins and when it ends.

    Returns:
        The rewritten program and the report.

    Raises:
        RecipeError: KVX213 or KVX214 if the order of passes is wrong, KVX108 if there is nothing
            to calibrate on.
        PassError: KVX210 if a pass applies nowhere, KVX212 if a contract is broken, KVX215 if a
            pass left an invalid graph.
        CodegenError: KVX401 if the target cannot run the result.
        VerifyError: KVX501 if a bound of the recipe is exceeded, KVX502 if a cache is wrong.
    """
    planned, plan_report = plan_pipeline(program, recipe)
    passes = plan_passes(recipe.passes, program.facts, auto_order=recipe.auto_order)
    is_full = verify == "full" and planned.plan is not None
    calibrates = any(p.graph_pass.needs_calibration for p in passes)
    measured = 0 if verify == "none" else 1 + (lowered is not None) + is_full
    clock = _Clock(len(passes) + calibrates + measured, progress)
    prober: Prober | None = None
    if calibrates:
        with clock.stage("calibration"):
            program = calibrated(program, recipe, passes, calibration)
    if verify != "none":
        with clock.stage("source model"):
            prober = Prober(program, executor, planned.plan)
    program, records, last = _apply_passes(program, recipe, passes, prober, clock)
    report = _with_plan(plan_report, program, recipe)
    report = dataclasses.replace(report, verify=verify, passes=tuple(records))
    if prober is not None and last is not None:
        report = _with_measurements(report, program, recipe, prober, last)
    if prober is not None and lowered is not None:
        report = _with_target(report, program, recipe, prober, lowered, clock)
    if prober is not None and is_full:
        with clock.stage("cache state"):
            cache = cache_measured(prober.check_full(program, lowered))
        report = dataclasses.replace(report, cache=cache)
    require_bounds(report)
    return dataclasses.replace(program, calibration=None), report


def _with_target(
    report: Report,
    program: Program,
    recipe: Recipe,
    prober: Prober,
    lowered: Executor,
    clock: _Clock,
) -> Report:
    """Return the report with the lowering that the recipe asks for, compared with the reference."""
    with clock.stage(f"target {recipe.target.lowering}"):
        stage = prober.measure_lowering(program, lowered)
        lowering = require_lowering(recipe.target.lowering, stage, prober)
    return dataclasses.replace(report, lowering=lowering)


def calibrated(
    program: Program, recipe: Recipe, passes: Sequence[PlannedPass], given: CalibrationLike
) -> Program:
    """Return the source program with what its passes need to know about it."""
    calibration = make_calibration(
        program,
        given,
        tokens=recipe.calibration.tokens,
        window=recipe.calibration.window,
        seed=recipe.calibration.seed,
        fisher=any(p.graph_pass.needs_fisher for p in passes),
    )
    return dataclasses.replace(program, calibration=calibration)


def recalibrated(program: Program, recipe: Recipe, rest: Sequence[PlannedPass]) -> Program:
    """Return a program whose last pass changed the model, with statistics of what it is now.

    Only if one of the passes in `rest` reads them.
    """
    calibration = program.calibration
    reads = any(p.graph_pass.needs_calibration for p in rest)
    if calibration is None or program.is_cached or not reads:
        return program
    found = collect(
        program,
        calibration.token_ids,
        name=calibration.name,
        seed=recipe.calibration.seed,
        fisher=any(p.graph_pass.needs_fisher for p in rest),
    )
    return dataclasses.replace(program, calibration=found)


def _apply_passes(
    program: Program,
    recipe: Recipe,
    passes: Sequence[PlannedPass],
    prober: Prober | None,
    clock: _Clock,
) -> tuple[Program, list[PassRecord], StageMeasure | None]:
    """Apply `passes`; with a prober, measure each and return what the last one measured too."""
    records, last = [], None
    for index, planned_pass in enumerate(passes):
        with clock.stage(planned_pass.name):
            before = program
            program, found = apply_pass(program, planned_pass)
            if program is not before and not planned_pass.graph_pass.numerics.is_exact:
                program = recalibrated(program, recipe, passes[index + 1 :])
            record = pass_record(planned_pass, found, before, program)
            if prober is not None:
                last = prober.measure(program)
                record = require_contract(planned_pass, record, last, prober)
            records.append(record)
    return program, records, last


def plan_pipeline(program: Program, recipe: Recipe) -> tuple[Program, Report]:
    """Apply `recipe` to shapes alone: no weight is read, nothing is measured.

    Returns:
        The rewritten program, its weights on the meta device, and a report without measurements.

    Raises:
        RecipeError: KVX213 or KVX214 if the order of passes is wrong.
        PassError: KVX210 if a pass applies nowhere, or what a pass says against the model.
        CodegenError: KVX401 if the target cannot run the result.
        VerifyError: KVX501 if the plan exceeds a bound of the recipe.
    """
    passes = plan_passes(recipe.passes, program.facts, auto_order=recipe.auto_order)
    source = source_summary(program)
    weights = {name: weight.to("meta") for name, weight in program.weights.items()}
    program = dataclasses.replace(program, weights=weights)
    records = []
    for planned_pass in passes:
        before = program
        program, found = apply_pass(before, planned_pass)
        records.append(pass_record(planned_pass, found, before, program))
    check_target(program, recipe.target)
    report = Report(
        source=source, recipe=recipe.to_data(), verify="none", probes=(), passes=tuple(records)
    )
    report = _with_plan(report, program, recipe)
    require_bounds(report)
    return program, report


def apply_pass(
    program: Program, planned: PlannedPass, *, wanted: Collection[int] | None = None
) -> tuple[Program, Sequence[Match | NoMatch]]:
    """Run one pass on a clone of `program`, and verify the result.

    Args:
        program: What to rewrite; it is not changed.
        planned: The pass.
        wanted: Numbers of the matches to apply it at, counted from 0; all of them if None.

    Returns:
        The new program (the same one if everything had been done already) and what was found.

    Raises:
        RecipeError: KVX213 if the pass needs a fact that does not hold.
        PassError: KVX210 if it applies nowhere, KVX215 if the result is invalid.
    """
    check_order([planned], program.facts)
    with _blamed(planned):
        found = planned.graph_pass.match(program)
    matches = [f for f in found if isinstance(f, Match)]
    _require_matches(planned, found)
    if not matches:
        return program, found
    clone = program.clone()
    rewriter = Rewriter(clone, planned.name, planned.graph_pass.numerics)
    with _blamed(planned):
        for index, match in enumerate(matches):
            if wanted is None or index in wanted:
                planned.graph_pass.rewrite(clone, match, rewriter)
        rewriter.finish()
        clone.facts = facts_after(planned.graph_pass, clone.facts)
        clone.passes = (*clone.passes, planned.name)
        verify_program(clone)
    return clone, found


@contextlib.contextmanager
def _blamed(planned: PlannedPass) -> Iterator[None]:
    """Let errors say which pass it was, where they do not yet."""
    try:
        yield
    except KvxformError as error:
        if error.where not in ("", "verifier"):
            raise
        raise type(error)(
            error.code, error.rule, where=planned.name, got=error.got, at=error.at, hint=error.hint
        ) from error


def _require_matches(planned: PlannedPass, found: Sequence[Match | NoMatch]) -> None:
    """Raise KVX210 if there is nothing to do and nothing was done before."""
    misses = [f for f in found if isinstance(f, NoMatch)]
    is_done = bool(misses) and all(miss.done for miss in misses)
    if len(misses) < len(found) or is_done or planned.step.allow_zero:
        return
    counts = Counter(miss.reason for miss in misses if not miss.done).most_common(NEAREST_REASONS)
    reasons = "; ".join(f"{reason} ({n} times)" if n > 1 else reason for reason, n in counts)
    raise PassError(
        "KVX210",
        "a pass must apply somewhere",
        where=planned.name,
        got=f"no match: {reasons}" if reasons else "no candidate in this model",
        at=planned.step.at,
        hint="remove the pass, or say allow_zero: true",
    )


def _with_plan(report: Report, program: Program, recipe: Recipe) -> Report:
    """Fill in what the plan of `program` costs, its calibration, and what healing may train."""
    trainable = tuple(Counter(program.touched.values()).items())
    report = dataclasses.replace(report, trainable=trainable)
    if program.calibration is not None:
        report = dataclasses.replace(report, calibration=program.calibration.name)
    if program.plan is not None:
        plan, layers = plan_summary(program.plan, report.source), layer_records(program.plan, ())
        report = dataclasses.replace(report, plan=plan, layers=layers)
    return dataclasses.replace(report, bounds=bound_records(recipe, report))


def _with_measurements(
    report: Report, program: Program, recipe: Recipe, prober: Prober, last: StageMeasure
) -> Report:
    """Fill in what the finished model showed."""
    report = dataclasses.replace(report, probes=prober.lengths)
    if program.plan is not None and last.state is not None:
        layers = layer_records(program.plan, last.state.layers)
        cache = cache_measured([last.state])
        report = dataclasses.replace(report, layers=layers, cache=cache)
    return dataclasses.replace(report, bounds=bound_records(recipe, report))


class _Clock:
    """Counts stages and tells how long each took; nothing of it is saved."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._index, self._total, self._progress = 0, total, progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = Stage(self._index, self._total, name)
        self._index += 1
        if self._progress is not None:
            self._progress(begin)
        start = time.perf_counter()
        yield
        if self._progress is not None:
            seconds = time.perf_counter() - start
            self._progress(dataclasses.replace(begin, seconds=seconds))
