"""One pass tried on one program: applied, measured, and held to its contract and to bounds."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvxform.calibrate import make_calibration
from kvxform.contracts import require_contract
from kvxform.errors import KvxformError, VerifyError
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.order import PlannedPass
from kvxform.pass_base import Match
from kvxform.pipeline import apply_pass
from kvxform.recipe import PassStep, build_pass
from kvxform.summary import pass_record
from kvxform.verify.prober import Prober, StageMeasure

FAULTS = ("KVX212", "KVX215", "KVX501", "KVX502")  # what a pass, not a user, has done wrong
WRONG_NUMBERS = ("KVX212", "KVX501", "KVX502")
CALIBRATION_ROWS = (8, 64)  # windows and tokens that stand for a text
LONGEST = 300  # characters of the text of an exception that is none of ours
LIMITS = ("max_kl", "max_relative", "min_top1")

Limits = Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """How a pass failed.

    Attributes:
        code: Code of the error, or the class of an exception that is none of ours.
        rule: What must hold.
        text: The whole error as one line.
    """

    code: str
    rule: str
    text: str

    def is_like(self, other: Failure) -> bool:
        """Whether both are the same fault; numbers in their texts may differ."""
        if self.code in WRONG_NUMBERS:
            return other.code in WRONG_NUMBERS
        return self.code == other.code and _without_numbers(self.rule) == _without_numbers(
            other.rule
        )


@dataclass(frozen=True)
class Attempt:
    """A pass that was tried.

    Attributes:
        program: What it made, or None if it did not get so far.
        stage: What was measured, or None likewise.
        failure: How it failed, or None.
        prober: The prober, ready for the next pass.
        matches: Places where it applies.
    """

    program: Program | None
    stage: StageMeasure | None
    failure: Failure | None
    prober: Prober
    matches: tuple[Match, ...] = ()


def attempt(
    program: Program,
    planned: PlannedPass,
    prober: Prober,
    limits: Limits,
    wanted: Collection[int] | None = None,
    *,
    state: bool = True,
) -> Attempt:
    """Apply a pass, measure it, and compare it with its contract and with `limits`.

    Args:
        program: What to rewrite; it is not changed.
        planned: The pass.
        prober: Has measured `program`; it is not changed either.
        limits: See `require_limits`.
        wanted: Numbers of the matches to apply it at; all of them if None.
        state: Check the cache too, not logits alone.

    Raises:
        KvxformError: Those that say something of the recipe or the model and not of the pass.
    """
    prober = copy.copy(prober)  # measuring replaces what it holds
    after, stage, matches = None, None, tuple[Match, ...]()
    try:
        after, found = apply_pass(program, planned, wanted=wanted)
        matches = tuple(match for match in found if isinstance(match, Match))
        stage = prober.measure(after, state=state)
    except KvxformError as error:
        return Attempt(after, stage, _our_failure(error), prober, matches)
    except Exception as error:  # a pass that breaks down, or a graph that does not run
        name, words = type(error).__name__, " ".join(str(error).split())[:LONGEST]
        broken = Failure(name, words, f"{name}: {words}")
        return Attempt(after, stage, broken, prober, matches)
    try:
        require_contract(planned, pass_record(planned, found, program, after), stage, prober)
        require_limits(stage, limits)
    except KvxformError as error:
        return Attempt(after, stage, _our_failure(error), prober, matches)
    return Attempt(after, stage, None, prober, matches)


def require_limits(stage: StageMeasure, limits: Limits) -> None:
    """Compare a stage with the source: `max_kl`, `max_relative`, `min_top1`.

    Raises:
        VerifyError: KVX501 if a limit is exceeded.
    """
    found = {
        "max_kl": stage.vs_source.kl,
        "max_relative": stage.vs_source.relative,
        "min_top1": stage.vs_source.top1,
    }
    for name, limit in limits.items():
        is_kept = found[name] >= limit if name.startswith("min") else found[name] <= limit
        if not is_kept:
            side = "at least" if name.startswith("min") else "at most"
            rule = f"{name} must be {side} {limit:g}"
            raise VerifyError("KVX501", rule, where="bounds", got=f"{found[name]:.4g}")


def plan_steps(steps: Sequence[PassStep]) -> list[PlannedPass]:
    """Return steps with their passes."""
    return [PlannedPass(step, build_pass(step)) for step in steps]


def final_plan(program: Program, passes: Sequence[PlannedPass]) -> CachePlan | None:
    """Return the plan that `passes` end with, by shapes alone, as far as they get."""
    weights = {name: weight.to("meta") for name, weight in program.weights.items()}
    shapes = Program(**{**vars(program), "weights": weights, "calibration": None})
    try:
        for planned in passes:
            shapes, _ = apply_pass(shapes, planned)
    except Exception:  # what it is will be seen when the passes run on values
        return shapes.plan
    return shapes.plan


def with_calibration(program: Program, passes: Sequence[PlannedPass]) -> Program:
    """Return a program with statistics on random tokens, if one of `passes` needs any."""
    if not any(planned.graph_pass.needs_calibration for planned in passes):
        return program
    rows, width = CALIBRATION_ROWS
    width = min(width, program.info.context_length or width)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, program.info.vocab_size, (rows, width), generator=generator)
    calibration = make_calibration(
        program,
        ids,
        tokens=rows * width,
        window=width,
        seed=0,
        fisher=any(planned.graph_pass.needs_fisher for planned in passes),
    )
    return Program(**{**vars(program), "calibration": calibration})


def run_passes(
    program: Program, passes: Sequence[PlannedPass], prober: Prober, limits: Limits
) -> Attempt | None:
    """Return the attempt at the last of some passes, or None if one before it fails.

    Args:
        program: A program without a cache.
        passes: At least one.
        prober: Of `program`.
        limits: Those of the last pass; see `require_limits`.
    """
    *first, last = passes
    for planned in first:
        found = attempt(program, planned, prober, {})
        if found.program is None or found.failure is not None:
            return None
        program, prober = found.program, found.prober
    return attempt(program, last, prober, limits)


def _our_failure(error: KvxformError) -> Failure:
    """Return an error as the failure of a pass, or raise it if no pass is to blame."""
    if error.code not in FAULTS:
        raise error
    return Failure(error.code, error.rule, str(error))


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)
