"""Prober: measures each stage of a pipeline against the stage before and against the source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.errors import VerifyError
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.rounding import rounding_dtype
from kvxform.pass_base import PASSES
from kvxform.verify.cache_state import StateCheck, check_schedule, is_lossy
from kvxform.verify.probe import (
    Difference,
    Probe,
    Reference,
    SourceRun,
    pick,
    run_source,
    write_probe,
)
from kvxform.verify.protocols import ModelLike
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import probe_schedule
from kvxform.verify.suites import LONG, SCHEDULES, Fit, make_suites
from kvxform.verify.tolerances import Tolerance, tolerance_for

PROBE_LENGTHS = (65, 31)  # ragged, over the end of a page of 64, no multiple of a group
FULL_CHECK = [key for key in SCHEDULES if key != LONG]  # which takes too long here
Executor = Callable[[Program], ModelLike]


@dataclass(frozen=True)
class StageMeasure:
    """What one stage showed.

    Attributes:
        vs_before: Logits against the stage before.
        vs_source: Logits against the source.
        cost: KL divergence of the stage before from the source, in nats.
        is_lossy: Whether the cache of the stage loses precision.
        state: Check of the cache, or None before there is one.
    """

    vs_before: Difference
    vs_source: Difference
    cost: float
    is_lossy: bool
    state: StateCheck | None


class Prober:
    """Measures stages, each against the last one and against the source.

    Args:
        program: The source, without a cache.
        executor: Makes a runnable model of a program.
        plan: The plan that the recipe ends with: probes must be long enough to fill its body.
        probe: Inputs to measure on, instead of text that the source writes.
    """

    def __init__(
        self,
        program: Program,
        executor: Executor,
        plan: CachePlan | None,
        probe: Probe | None = None,
    ) -> None:
        self.executor, self.dtype = executor, program.dtype
        self.tolerance: Tolerance = tolerance_for(rounding_dtype(program))
        self._source_program = program
        self._context = program.info.context_length or 1 << 30
        self._needed = first_encoded_length(plan)
        longest = self._needed + self._needed // 4 + 8 if self._needed > 1 else 0
        lengths = (max(PROBE_LENGTHS[0], longest), PROBE_LENGTHS[1])
        fitting = [min(n, self._context) for n in lengths]
        self.probe = write_probe(program, fitting) if probe is None else probe
        self._source = run_source(program, self.probe)
        self._reference = self._before = Reference(pick(self._source.logits, self.probe))
        self._cost = 0.0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the probe sequences."""
        return self.probe.lengths

    def measure(self, program: Program, *, state: bool = True) -> StageMeasure:
        """Run `program` on the probe; the next call compares with it.

        After a pass that changes the model itself, caches are held to the model it leaves.

        Args:
            program: The stage.
            state: Check its cache too, if it has one; without, one prefill is all that runs.
        """
        if program.plan is None and _is_changed(program):
            self._source_program = program
            self._source = run_source(program, self.probe)
        model = self.executor(program)
        check: StateCheck | None = None
        if program.plan is None or not state:
            logits = pick(model(self.probe.input_ids), self.probe)
        else:
            schedule = probe_schedule(self.lengths)
            check = check_schedule(model, schedule, self.probe, self._source, self.dtype)
            logits = self._arrange(check.logits)
        lossy = program.plan is not None and is_lossy(program.plan, self.dtype)
        found = Reference(logits)
        before = self._before.compare(found)
        source = self._reference.compare(found)
        measure = StageMeasure(before, source, self._cost, lossy, check)
        self._before, self._cost = found, source.kl
        return measure

    def measure_lowering(self, program: Program, executor: Executor) -> StageMeasure:
        """Compare another lowering of the program that was measured last with that measurement.

        The schedule of the probe runs twice: watched, and as it is without a watch, for a lowering
        may hide more from a watch.
        """
        assert program.plan is not None, "other lowerings need a cache"
        model, schedule = executor(program), probe_schedule(self.lengths)
        state = check_schedule(model, schedule, self.probe, self._source, self.dtype)
        replay = Replay(model, self.probe)
        with torch.inference_mode():
            for action in schedule.actions:
                replay.act(action)
        found = Reference(self._arrange(replay.logits))
        before, source = self._before.compare(found), self._reference.compare(found)
        return StageMeasure(before, source, self._cost, is_lossy(program.plan, self.dtype), state)

    def check_full(self, program: Program, executor: Executor | None = None) -> list[StateCheck]:
        """Run all schedules of the cache-state checker on a cached program.

        Args:
            program: The finished program.
            executor: Makes the model that is checked, if not the one of all other stages.

        Raises:
            VerifyError: KVX502 at the first schedule with a wrong state or wrong logits.
        """
        assert program.plan is not None, "the program has a cache"
        fit = Fit(program.plan, self._source_program.sites, self._needed, self._context)
        (suite,) = make_suites(
            fit, functools.partial(write_probe, self._source_program), FULL_CHECK
        )
        sequences = suite.sequences
        source = run_source(self._source_program, sequences)
        model = (executor or self.executor)(program)
        checks = []
        for schedule in suite.schedules.values():
            check = check_schedule(model, schedule, sequences, source, self.dtype)
            check.require(self.tolerance, "cache state")
            if not check.is_lossy:
                found = check.compare(source.logits)
                self._require(found.relative, self.tolerance.logits, "relative", check.schedule)
            checks.append(check)
        if checks[0].is_lossy:
            self._require_lossy(checks, sequences, source, model(sequences.input_ids))
        return checks

    def _require_lossy(
        self, checks: list[StateCheck], sequences: Probe, source: SourceRun, whole: Tensor
    ) -> None:
        """Compare the logits of all schedules with those of the program in one piece.

        Together, because a moved code changes single positions by far more than the mean.
        """
        one_piece = Reference(pick(whole, sequences))
        cost = Reference(pick(source.logits, sequences)).compare(one_piece).kl
        pairs = [(whole[place], got) for check in checks for place, got in check.logits.items()]
        expected, got = (torch.stack(side) for side in zip(*pairs, strict=True))
        found = Reference(expected).compare(Reference(got))
        self._require(found.kl, self.tolerance.lossy_bound(cost), "KL", "all schedules")

    def _require(self, error: float, bound: float, metric: str, at: str) -> None:
        if not error <= bound:
            rule = f"{metric} of logits must be at most {bound:.1e} however tokens arrive"
            raise VerifyError("KVX502", rule, where="cache state", got=f"{error:.2e}", at=at)

    def _arrange(self, logits: Mapping[tuple[int, int], Tensor]) -> Tensor:
        """Return the logits of a schedule in the order of `pick`, `[positions, vocab]`."""
        places = self.probe.real.nonzero().tolist()
        return torch.stack([logits[sequence, position] for sequence, position in places])


def _is_changed(program: Program) -> bool:
    """Whether the last pass of `program` promised no identity."""
    return bool(program.passes) and not PASSES[program.passes[-1]].numerics.is_exact


def first_encoded_length(plan: CachePlan | None) -> int:
    """Return the shortest sequence that has encoded tokens in every stream of `plan`."""
    lengths = [1]
    if plan is not None and plan.layout.kind == "checkpoint":
        lengths.append(plan.layout.hot_window + 1)
    for site in plan.owners if plan else ():
        for stream in site.streams.values():
            keep, chunk = stream.keep_and_chunk
            lengths.append(stream.regions.sink + keep + chunk)
    return max(lengths)
