"""One side of a numeric diff: a program run on a probe, held behind each of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from kvxform.diffing.walking import Stop, WalkingExecutable, layer_ends, walk
from kvxform.ir.execution import CacheSizes, StepInputs
from kvxform.ir.logical import unrotate_pair
from kvxform.ir.plan import Layout
from kvxform.ir.program import Program, default_positions
from kvxform.verify.probe import Probe

LogicalRows = list[tuple[Tensor, Tensor]]  # K and V `[Hk, T, D]` of each row


class LayerRun:
    """A program, fed with a probe in one prefill.

    Args:
        program: With or without a cache; its weights are looked up one by one.
        probe: What to feed.
    """

    def __init__(self, program: Program, probe: Probe) -> None:
        plan = program.plan
        if plan is not None and plan.layout.kind == "checkpoint":
            # What is computed anew in every step is the same as what is kept.
            plan = dataclasses.replace(plan, layout=Layout())
            program = dataclasses.replace(program, plan=plan)
        self.program, self._probe = program, probe
        self._operands: dict[int, tuple[Tensor, Tensor]] = {}
        if plan is not None:
            rows, width = probe.input_ids.shape
            size = plan.page_size(width)
            count = -(-width // size)
            sizes = CacheSizes(1 + rows * count, size, rows, width)
            self._table = 1 + torch.arange(rows * count, dtype=torch.int32).view(rows, count)
            self._executable = WalkingExecutable(program)
            self._cache = self._executable.new_cache(sizes)

    @property
    def layers(self) -> set[int]:
        """Layers that the run can be held behind."""
        return set(layer_ends(self.program).values())

    def stops(self) -> Iterator[Stop]:
        """Run, and stop behind each layer and at the logits, `[B, S, ...]` each."""
        plan, ids = self.program.plan, self._probe.input_ids
        if plan is None:
            positions = default_positions(ids)
            yield from walk(self.program, ids, positions, operands=self._operands)
            return
        chunk = plan.max_step_tokens or ids.shape[1]
        if chunk >= ids.shape[1]:
            yield from self._chunk(0, ids.shape[1])
            return
        starts = range(0, ids.shape[1], chunk)
        parts = [list(self._chunk(start, start + chunk)) for start in starts]
        for stops in zip(*parts, strict=True):
            yield Stop(stops[0].layer, torch.cat([stop.value for stop in stops], 1))

    def logical(self, layer: int) -> LogicalRows:
        """Return K and V of a layer as the source has them, once the run has ended."""
        lengths = self._probe.lengths
        if self.program.plan is None:
            k, v = self._operands[layer]
            return [(k[row, :, :n], v[row, :, :n]) for row, n in enumerate(lengths)]
        found = []
        for row, length in enumerate(lengths):
            pages, dtype = self._table[row].tolist(), self.program.dtype
            stored = self._cache.stored(layer, row, length, pages, dtype)
            found.append(unrotate_pair(self.program, layer, *stored))
        return found

    def _chunk(self, start: int, end: int) -> Iterator[Stop]:
        """Feed the tokens `start` to `end` - 1 of all rows that are so long."""
        ids = self._probe.input_ids[:, start:end]
        fed = [row for row, n in enumerate(self._probe.lengths) if n > start]
        counts = [min(self._probe.lengths[row], end) - start for row in fed]
        begun = [start] * len(fed)
        inputs = StepInputs(fed, begun, counts, begun, self._table[fed], _check_nothing)
        for stop in self._executable.stops(ids[fed], inputs, self._cache):
            whole = stop.value.new_zeros(len(ids), *stop.value.shape[1:])
            whole[fed] = stop.value
            yield Stop(stop.layer, whole)


def _check_nothing() -> None:
    """Do nothing: a probe has tokens of the vocabulary."""
