"""From everything that differs to what a reader must know: causes in words, with their layers.

What follows from a cause that is known is left out: a changed window explains other outputs of
attention, a permuted weight other keys in the cache. The effect on the results comes after the
causes, and what is no change at all comes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvxform.diffing.cache_causes import cache_causes
from kvxform.diffing.causes import (
    Cause,
    metric_causes,
    plan_causes,
    structure_causes,
    weight_causes,
)
from kvxform.diffing.records import (
    SEVERITIES,
    Finding,
    MetricChange,
    NumericDiff,
    PlanChange,
    Severity,
    StructureDiff,
    WeightChange,
)
from kvxform.diffing.rules import RULES

# Rules that say least come after those that name a cause, and effects after both.
GENERAL = ("plan", "layout", "operations", "operands", "signature")
EFFECTS = ("results", "cost")


def diagnose(
    structure: StructureDiff | None,
    plan: Sequence[PlanChange],
    weights: Sequence[WeightChange],
    metrics: Sequence[MetricChange],
    numeric: NumericDiff | None,
) -> tuple[Finding, ...]:
    """Return findings, most important first.

    Args:
        structure: What differs between the graphs, or None.
        plan: What differs between the plans.
        weights: Weights with other values.
        metrics: Figures of the whole model.
        numeric: Both sides on the same inputs, or None.
    """
    planned = list(plan_causes(plan))
    owners = {cause.layer for cause in planned if cause.rule == "layer-owner"}
    causes = [
        cause
        for cause in (structure_causes(structure) if structure is not None else ())
        if cause.rule != "layer-owner" or cause.layer not in owners
    ]
    causes += [*planned, *weight_causes(weights)]
    explained = frozenset((cause.rule, cause.layer) for cause in causes)
    if numeric is not None:
        causes += cache_causes(numeric.symptoms, explained)
        causes += [Cause("account", "error", line) for line in numeric.complaints]
        causes += _results(numeric, is_explained=bool(causes))
    causes += metric_causes(metrics)
    if structure is not None:
        causes += _names(structure)
    return _findings(causes)


def _results(numeric: NumericDiff, *, is_explained: bool) -> Iterator[Cause]:
    """Yield what became of the results."""
    found = numeric.logits
    if found is None:
        return
    words = f"logits differ by {found.relative:.2g} of the largest"
    # Codes that move by rounding explain what nothing else does, and no more than that.
    if found.relative <= numeric.tolerance or (numeric.is_rounding and not is_explained):
        if found.relative:
            yield Cause("rounding", "note", f"{words}, which is rounding")
        return
    where = "" if numeric.first_layer is None else f", first in layer {numeric.first_layer}"
    measure = f"{words}, KL {found.kl:.2g} nats, same token {found.top1:.1%}{where}"
    if is_explained:
        yield Cause("results", "warning", measure)
    else:
        yield Cause("unexplained", "error", f"{measure}, and nothing else differs")


def _names(structure: StructureDiff) -> Iterator[Cause]:
    if structure.renamed:
        yield Cause("renamed", "note", f"{structure.renamed} names differ, which is no change")
    if structure.moved:
        moved = f"{structure.moved} source lines differ, which is no change"
        yield Cause("moved", "note", moved)


def _findings(causes: Iterable[Cause]) -> tuple[Finding, ...]:
    """Join causes that differ in their layer alone, and put them in order; the sort is stable."""
    layers: dict[tuple[Severity, str, str], list[int]] = {}
    origins: dict[tuple[Severity, str, str], str] = {}
    for cause in causes:
        assert cause.rule in RULES, "every rule is documented"
        key = (cause.severity, cause.rule, cause.message)
        found = layers.setdefault(key, [])
        origins.setdefault(key, cause.origin)
        if cause.layer is not None and cause.layer not in found:
            found.append(cause.layer)
    ordered = sorted(layers, key=lambda key: (SEVERITIES.index(key[0]), _rank(key[1])))
    return tuple(
        Finding(rule, severity, message, tuple(sorted(layers[key])), origins[key])
        for key in ordered
        for severity, rule, message in [key]
    )


def _rank(rule: str) -> int:
    return 2 if rule in EFFECTS else int(rule in GENERAL)
