"""What is wrong with the caches of B, layer by layer, when they are handed what A hands to its own.

Every layer is asked: were the tokens where they should be, did the model hand in the same, does the
cache hold the same, and does attention over it return the same? What a cache holds is told apart
further by `stored_faults`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvxform.diffing.input_faults import explain_inputs, relative_error
from kvxform.diffing.lockstep import Lockstep, Read
from kvxform.diffing.stored_faults import Holding, Planes, find_stored, same_values
from kvxform.diffing.symptoms import Symptom
from kvxform.ir.scoring import Scoring
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import Action, Prefill
from kvxform.verify.shadow import StepTokens
from kvxform.verify.tolerances import Tolerance

RANKS = ("page-order", "owner", "rewritten", "sink", "token-order")
"""Kinds that explain every other difference of what a layer holds, the strongest first."""
HELD = (*RANKS, "recent", "plane-shifted", "plane-scaled", "plane", "codes", "decoded", "state")


class FaultFinder:
    """Collects symptoms action by action; the first of a kind in a layer is kept.

    Args:
        pairs: Layers that are compared, (layer of A, layer of B).
        tolerance: What is rounding.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], tolerance: Tolerance) -> None:
        self._pairs, self._tolerance = pairs, tolerance
        self._found: dict[tuple[str, int, str, str, str], Symptom] = {}
        self._before: dict[tuple[str, int, int], Planes] = {}

    def look(self, run: Lockstep, action: Action) -> None:
        """Compare both sides after an action of a run in which A leads B."""
        padded = _padded_rows(action)
        holdings = {layer: Holding.of(run.a, layer) for layer, _ in self._pairs}
        for layer, own in self._pairs:
            self._look_at_inputs(run, layer, own, padded)
            held = Holding.of(run.b, own)
            led = own in run.tape_b.leaders
            found = self._rewritten(run, layer, own, holdings[layer], held)
            if led:
                found += find_stored(layer, held, holdings, run.a.plan, self._tolerance.state)
            for symptom in found:
                self._keep(symptom)
            if led and not found:
                self._look_at_reads(run, layer, own)

    def symptoms(self) -> tuple[Symptom, ...]:
        """Return what was found, by layer; consequences of a stronger kind left out."""
        by_layer: dict[int, list[Symptom]] = {}
        for symptom in self._found.values():
            by_layer.setdefault(symptom.layer, []).append(symptom)
        kept = [s for layer in sorted(by_layer) for s in _causes(by_layer[layer])]
        return tuple(kept)

    def _keep(self, symptom: Symptom) -> None:
        key = (symptom.kind, symptom.layer, symptom.stream, symptom.plane, symptom.side)
        self._found.setdefault(key, symptom)

    def _look_at_inputs(self, run: Lockstep, layer: int, own: int, padded: set[int]) -> None:
        reads = list(
            zip(run.tape_a.reads.get(layer, []), run.tape_b.reads.get(own, []), strict=False)
        )
        for (mine, theirs), step in zip(reads, run.passes, strict=False):
            for symptom in _positions(layer, mine, theirs, step, padded):
                self._keep(symptom)
            for what in _scoring_changes(mine.scoring, theirs.scoring):
                self._keep(Symptom("scoring", layer, what=what))
        if own not in run.tape_b.leaders:
            return
        appended = zip(
            run.tape_a.appended.get(layer, []), run.tape_b.appended.get(own, []), strict=False
        )
        for (mine_kv, theirs_kv), step in zip(appended, run.passes, strict=False):
            for stream, x, y in zip(("key", "value"), mine_kv, theirs_kv, strict=True):
                if x is not None and y is not None:
                    self._compare_inputs(layer, stream, x, y, step)
        for (mine, theirs), step in zip(reads, run.passes, strict=False):
            self._compare_inputs(layer, "query", mine.q, theirs.q, step)

    def _compare_inputs(
        self, layer: int, stream: str, x: Tensor, y: Tensor, step: StepTokens
    ) -> None:
        if x.shape != y.shape:
            return
        errors = {
            row: relative_error(y[entry, :, :count], x[entry, :, :count])
            for entry, (row, count) in enumerate(step)
        }
        wrong = {row: e for row, e in errors.items() if not e <= self._tolerance.inputs}
        if not wrong:
            return
        rows = tuple(sorted(wrong)) if len(wrong) < len(errors) else ()
        what = explain_inputs(x, y, stream, self._tolerance.inputs)
        self._keep(Symptom("inputs", layer, stream, "", what, max(wrong.values()), rows))

    def _rewritten(
        self, run: Lockstep, layer: int, own: int, mine: Holding, theirs: Holding
    ) -> list[Symptom]:
        """Compare planes with those after the last action; remember them for the next one."""
        found = []
        sides: list[tuple[Literal["a", "b"], int, Holding, Replay]]
        sides = [("a", layer, mine, run.a), ("b", own, theirs, run.b)]
        for side, where, held, replay in sides:
            changed: dict[str, set[str]] = {}
            for row, planes in held.planes.items():
                sequence, length = replay.rows[row]
                if held.decoded[row]["key"].shape[-2] != length:
                    continue  # not the tokens that it should be
                old = self._before.get((side, where, sequence), {})
                for stream, names in _changed_planes(old, planes).items():
                    changed.setdefault(stream, set()).update(names)
                self._before[side, where, sequence] = planes
            for stream, names in changed.items():
                what = f"{' and '.join(sorted(names))} changed after being stored"
                found.append(Symptom("rewritten", layer, stream, "", what, side=side))
        return found

    def _look_at_reads(self, run: Lockstep, layer: int, own: int) -> None:
        reads = zip(run.tape_a.reads.get(layer, []), run.tape_b.reads.get(own, []), strict=False)
        for (mine, theirs), step in zip(reads, run.passes, strict=False):
            if mine.out.shape != theirs.out.shape:
                continue
            first, worst = None, 0.0
            for entry, (_, count) in enumerate(step):
                x, y = mine.out[entry, :, :count], theirs.out[entry, :, :count].to(mine.out)
                off = (x - y).abs().amax((0, 2)) / x.abs().max().clamp_min(1e-30)
                wrong = (~(off <= self._tolerance.reads)).nonzero()[:, 0].tolist()
                places = [int(mine.positions[entry, i]) for i in wrong]
                if places:
                    first = min(places) if first is None else min(first, *places)
                    worst = max(worst, float(off.max()))
            if first is not None:
                what = f"from position {first} on"
                self._keep(Symptom("reads", layer, what=what, value=worst))


def _positions(
    layer: int, mine: Read, theirs: Read, step: StepTokens, padded: set[int]
) -> list[Symptom]:
    wrong: dict[int, int] = {}
    for entry, (row, count) in enumerate(step):
        offset = theirs.positions[entry, :count].cpu() - mine.positions[entry, :count].cpu()
        if bool((offset != 0).any()):
            wrong[row] = int(offset[offset.abs().argmax()])
    if not wrong:
        return []
    rows = tuple(sorted(wrong))
    offsets = ", ".join(f"{wrong[row]:+d}" for row in rows)
    only = bool(padded) and set(rows) == padded
    what = f"positions are off by {offsets}"
    return [Symptom("positions", layer, "", "", what, float(wrong[rows[0]]), rows, only)]


def _scoring_changes(mine: Scoring, theirs: Scoring) -> list[str]:
    changes = []
    for field in dataclasses.fields(Scoring):
        x, y = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape or not torch.equal(x.cpu(), y.to(x).cpu()):
                changes.append(f"{field.name} has other values")
        elif isinstance(x, Tensor) or isinstance(y, Tensor) or x != y:
            changes.append(f"{field.name} {_word(x)} -> {_word(y)}")
    return changes


def _word(value: object) -> str:
    if value is None:
        return "none"
    return "a tensor" if isinstance(value, Tensor) else f"{value}"


def _changed_planes(old: Planes, new: Planes) -> dict[str, set[str]]:
    """Return planes by stream in which tokens that were there before have changed."""
    changed: dict[str, set[str]] = {}
    for stream, planes in old.items():
        for name, plane in planes.items():
            later = new.get(stream, {}).get(name)
            if later is None or later.shape[1] < plane.shape[1]:
                continue  # the row was cropped
            if not same_values(later[:, : plane.shape[1]], plane):
                changed.setdefault(stream, set()).add(name)
    return changed


def _padded_rows(action: Action) -> set[int]:
    if not isinstance(action, Prefill):
        return set()
    longest = max(action.tokens.values())
    return {row for row, count in action.tokens.items() if count < longest}


def _causes(symptoms: list[Symptom]) -> list[Symptom]:
    """Leave out what follows from a stronger kind in the same layer, and join both streams."""
    kinds = {s.kind for s in symptoms}
    strongest = next((kind for kind in RANKS if kind in kinds), None)
    if strongest is not None:
        symptoms = [s for s in symptoms if s.kind == strongest or s.kind not in HELD]
    dropped = {"reads"} if kinds & {*HELD, "scoring"} else set()
    dropped |= {"inputs"} if "positions" in kinds else set()
    symptoms = [s for s in symptoms if s.kind not in dropped]
    joined: list[Symptom] = []
    for symptom in symptoms:
        twin = next(
            (
                o
                for o in joined
                if o.stream
                and o.stream != symptom.stream
                and dataclasses.replace(o, stream="", value=0.0)
                == dataclasses.replace(symptom, stream="", value=0.0)
            ),
            None,
        )
        if twin is None:
            joined.append(symptom)
        elif {twin.stream, symptom.stream} == {"key", "value"}:
            joined[joined.index(twin)] = dataclasses.replace(twin, stream="")
        else:
            joined.append(symptom)
    return joined
