"""Prober: measures each stage of a pipeline against the stage before and against the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.errors import VerifyError
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.verify.cache_state import StateCheck, check_schedule, is_lossy
from kvxform.verify.probe import (
    Difference,
    Reference,
    make_probe,
    pick,
    run_source,
    write_probe,
)
from kvxform.verify.protocols import ModelLike
from kvxform.verify.schedules import full_schedules, probe_schedule
from kvxform.verify.tolerances import Tolerance, tolerance_for

PROBE_LENGTHS = (65, 31)  # ragged, over the end of a page of 64, no multiple of a group
FULL_STEPS = 64  # decode steps of a full check
Executor = Callable[[Program], ModelLike]


@dataclass(frozen=True)
class StageMeasure:
    """What one stage showed.

    Attributes:
        vs_before: Logits against the stage before.
        vs_source: Logits against the source.
        is_lossy: Whether the cache of the stage loses precision.
        state: Check of the cache, or None before there is one.
    """

    vs_before: Difference
    vs_source: Difference
    is_lossy: bool
    state: StateCheck | None


class Prober:
    """Measures stages, each against the last one and against the source.

    Args:
        program: The source, without a cache.
        executor: Makes a runnable model of a program.
        plan: The plan that the recipe ends with: probes must be long enough to fill its body.
    """

    def __init__(self, program: Program, executor: Executor, plan: CachePlan | None) -> None:
        self.executor, self.dtype = executor, program.dtype
        self.tolerance: Tolerance = tolerance_for(program.dtype)
        self._source_program = program
        self._context = program.info.context_length or 1 << 30
        self._needed = first_encoded_length(plan)
        longest = self._needed + self._needed // 4 + 8 if self._needed > 1 else 0
        lengths = (max(PROBE_LENGTHS[0], longest), PROBE_LENGTHS[1])
        self.probe = write_probe(program, [min(n, self._context) for n in lengths])
        self._source = run_source(program, self.probe)
        self._reference = self._before = Reference(pick(self._source.logits, self.probe))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the probe sequences."""
        return self.probe.lengths

    def measure(self, program: Program) -> StageMeasure:
        """Run `program` on the probe; the next call compares with it."""
        model = self.executor(program)
        state: StateCheck | None = None
        if program.plan is None:
            logits = pick(model(self.probe.input_ids), self.probe)
        else:
            schedule = probe_schedule(self.lengths)
            state = check_schedule(model, schedule, self.probe, self._source, self.dtype)
            logits = self._arrange(state)
        lossy = program.plan is not None and is_lossy(program.plan, self.dtype)
        found = Reference(logits)
        before = self._before.compare(found)
        source = self._reference.compare(found)
        self._before = found
        return StageMeasure(before, source, lossy, state)

    def check_full(self, program: Program) -> list[StateCheck]:
        """Run all schedules of the cache-state checker on a cached program.

        Raises:
            VerifyError: KVX502 at the first schedule with a wrong state or wrong logits.
        """
        assert program.plan is not None, "the program has a cache"
        base = max(40, self._needed + 8)
        lengths = (base + FULL_STEPS + 2, base // 2 + FULL_STEPS + 2, 24)
        sequences = make_probe(program.info.vocab_size, [min(n, self._context) for n in lengths])
        source = run_source(self._source_program, sequences)
        model = self.executor(program)
        lossy = is_lossy(program.plan, self.dtype)
        reference = model(sequences.input_ids) if lossy else source.logits
        checks = []
        for schedule in full_schedules(sequences.lengths, FULL_STEPS):
            check = check_schedule(model, schedule, sequences, source, self.dtype)
            check.require(self.tolerance, "cache state")
            self._require_logits(check, reference)
            checks.append(check)
        return checks

    def _require_logits(self, check: StateCheck, reference: Tensor) -> None:
        found = check.compare(reference)
        error, bound, metric = found.relative, self.tolerance.logits, "relative error"
        if check.is_lossy:
            error, bound, metric = found.kl, self.tolerance.lossy_kl, "KL"
        if not error <= bound:
            raise VerifyError(
                "KVX502",
                f"{metric} of logits must be at most {bound:.0e} however tokens arrive",
                where="cache state",
                got=f"{error:.2e}",
                at=check.schedule,
            )

    def _arrange(self, state: StateCheck) -> Tensor:
        """Return the logits of a schedule in the order of `pick`, `[positions, vocab]`."""
        places = self.probe.real.nonzero().tolist()
        return torch.stack([state.logits[sequence, position] for sequence, position in places])


def first_encoded_length(plan: CachePlan | None) -> int:
    """Return the shortest sequence that has encoded tokens in every stream of `plan`."""
    lengths = [1]
    for site in plan.owners if plan else ():
        for stream in site.streams.values():
            keep, chunk = stream.keep_and_chunk
            lengths.append(stream.regions.sink + keep + chunk)
    return max(lengths)
