"""What a pass changes on a small program, in words."""

from __future__ import annotations

from collections.abc import Iterator

from kvxform.bisecting.shrinking import Case
from kvxform.diffing.align import align
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.plans import compare_plans
from kvxform.diffing.records import NodeChange, PlanChange, WeightChange
from kvxform.diffing.structure import compare_outlines
from kvxform.diffing.weights import compare_weights
from kvxform.ir.program import Program
from kvxform.pipeline import apply_pass


def given_program(case: Case) -> Program:
    """Return the program that the failing pass of a case is given."""
    program = case.program
    for planned in case.steps[:-1]:
        program, _ = apply_pass(program, planned)
    return program


def describe_changes(case: Case) -> tuple[str, ...]:
    """Return a line for every operation, weight and field that the failing pass changes.

    Nothing if it broke down or left a program that cannot be read.
    """
    after = case.found.program
    return () if after is None else tuple(dict.fromkeys(_lines(given_program(case), after)))


def _lines(before: Program, after: Program) -> Iterator[str]:
    a, b = outline_program(before), outline_program(after)
    alignment = align(a, b)
    for node in compare_outlines(a, b, alignment).nodes:
        yield _node_line(node)
    for weight in compare_weights(before, after, (a, b), alignment):
        yield _weight_line(weight)
    for field in compare_plans(a, b, alignment.layers):
        yield _plan_line(field)


def _node_line(change: NodeChange) -> str:
    where = f" in {change.module}" if change.module else ""
    return f"{change.op}: {change.what}{where}"


def _weight_line(change: WeightChange) -> str:
    where = "" if change.layer is None else f" of layer {change.layer}"
    detail = f", {change.detail}" if change.detail else f", by {change.relative:.2g}"
    return f"weight {change.role}{where}: {change.cause}{detail}"


def _plan_line(change: PlanChange) -> str:
    where = "" if change.layer is None else f" of layer {change.layer}"
    field = " ".join(word for word in (change.stream, change.field) if word)
    return f"{field}{where}: {change.before or 'nothing'} -> {change.after or 'nothing'}"
