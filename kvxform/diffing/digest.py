"""What every renderer says of a diff: the verdict, one cell a layer, figures of the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvxform.diffing.blocks import FindingGroup, group_findings
from kvxform.diffing.records import (
    SEVERITIES,
    DiffResult,
    Finding,
    LayerDiff,
    MetricChange,
    NodeChange,
    SideSummary,
    Violation,
)
from kvxform.formats import plain_bytes, plain_count, plain_number, plain_percent
from kvxform.ir.text import format_ranges

Tone = Literal["good", "warn", "bad"]
SIGNS = {"added": "+", "removed": "-"}  # every other kind of change is `~`
FIGURES = {
    "kv_bytes_per_token": "cache, one token",
    "bits_per_value": "true bits per cached value",
    "read_bytes": "cache read by one decode step",
    "flops_per_token": "FLOPs per token",
    "parameters": "parameters",
    "parameter_bytes": "bytes of parameters",
}
_GENERAL = ("operations",)  # rules that name what differs in the graph, but no cause
_MANY_TIMES = 1.5  # above this a factor says more than a percentage


@dataclass(frozen=True)
class Verdict:
    """The answer: `word` is one of `same`, `different`, `within limits`, `over limits`."""

    word: str
    sentence: str
    tone: Tone


@dataclass(frozen=True)
class LayerCell:
    """One layer at a glance.

    Attributes:
        layer: Layer index.
        graph: `+`, `-` or `~` if operations were only added, only removed, or anything else;
            empty if none differ.
        operations: How many operations differ.
        plan: How many fields of the plan differ.
        weights: How many weights differ.
        numbers: Errors on the same inputs, or None.
        findings: Findings that name this layer and are more than notes.
    """

    layer: int
    graph: str
    operations: int
    plan: int
    weights: int
    numbers: LayerDiff | None
    findings: tuple[Finding, ...]

    @property
    def is_same(self) -> bool:
        """Whether graph, plan and weights of the layer are the same."""
        return not (self.operations or self.plan or self.weights)

    @property
    def error(self) -> float | None:
        """Largest error of what the layer computes or stores; None if none was measured."""
        found = self.numbers
        errors = [found.hidden, found.key, found.value] if found else []
        return max((e for e in errors if e is not None), default=None)


@dataclass(frozen=True)
class FigureRow:
    """A figure of the whole model as text."""

    label: str
    before: str
    after: str
    change: str


def verdict(result: DiffResult) -> Verdict:
    """Return the answer in one word and one sentence."""
    if result.violations:
        return Verdict("over limits", _over(result.violations), "bad")
    if result.is_same:
        return Verdict("same", _same(result), "good")
    top = [f for f in ranked(result.findings) if f.severity != "note"]
    groups = group_findings(top)
    sentence = group_sentence(groups[0], layer_count(result))
    more = sum(len(group.messages) for group in groups) - 1
    if more:
        sentence += f"; and {more} more"
    if result.numeric is not None and result.numeric.logits is not None:
        sentence += f"; {plain_percent(result.numeric.logits.top1)} of next tokens stay"
    if result.thresholds:
        return Verdict("within limits", sentence, "warn")
    return Verdict("different", sentence, "bad" if top[0].severity == "error" else "warn")


def _over(violations: Sequence[Violation]) -> str:
    words = [limit_sentence(violation) for violation in violations]
    return "; ".join(words)


def limit_sentence(violation: Violation) -> str:
    """Return which limit is exceeded and by what."""
    limit, got = plain_number(violation.limit), plain_number(violation.measured)
    return f"limit {violation.name} {limit} is exceeded: got {got}"


def _same(result: DiffResult) -> str:
    parts = {"graphs": result.structure, "outputs": result.numeric}
    compared = [name for name, part in parts.items() if part is not None]
    if not compared:
        return "nothing differs, but neither graphs nor outputs were compared"
    return f"{' and '.join(compared)} are equal but for rounding and names"


def group_sentence(group: FindingGroup, count: int) -> str:
    """Return the first of some findings with its layers: `layer 7: RoPE theta 1 -> 2`."""
    where = f"{layer_words(group.layers, count)}: " if group.layers else ""
    return f"{where}{group.messages[0]}"


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings, errors first and notes last; what says little stands behind its equals."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.rule in _GENERAL))


def layer_words(layers: Iterable[int], count: int) -> str:
    """Return `layer 3`, `layers 0-4, 6`, `all 30 layers` or `outside of layers`."""
    found = sorted(layers)
    if not found:
        return "outside of layers"
    if len(found) == 1:
        return f"layer {found[0]}"
    return f"all {count} layers" if len(found) == count else f"layers {format_ranges(found)}"


def layer_count(result: DiffResult) -> int:
    """Return the number of layers of the side that has more."""
    named = [f.layers for f in result.findings] + [_layers_of(result)]
    highest = max((layer for layers in named for layer in layers), default=-1)
    return max(result.a.layers, result.b.layers, highest + 1)


def _layers_of(result: DiffResult) -> tuple[int, ...]:
    nodes = result.structure.nodes if result.structure else ()
    numbers = result.numeric.layers if result.numeric else ()
    found = [c.layer for part in (nodes, result.plan, result.weights, numbers) for c in part]
    return tuple(layer for layer in found if layer is not None)


def layer_cells(result: DiffResult) -> list[LayerCell]:
    """Return one cell for every layer."""
    count = layer_count(result)
    nodes: list[list[NodeChange]] = [[] for _ in range(count)]
    for node in result.structure.nodes if result.structure else ():
        if node.layer is not None:
            nodes[node.layer].append(node)
    numbers = {n.layer: n for n in result.numeric.layers} if result.numeric else {}
    return [
        LayerCell(
            layer=layer,
            graph=sign_of(nodes[layer]),
            operations=len(nodes[layer]),
            plan=sum(change.layer == layer for change in result.plan),
            weights=sum(change.layer == layer for change in result.weights),
            numbers=numbers.get(layer),
            findings=tuple(
                f for f in ranked(result.findings) if layer in f.layers and f.severity != "note"
            ),
        )
        for layer in range(count)
    ]


def sign_of(changes: Iterable[NodeChange]) -> str:
    """Return `+`, `-` or `~` for what all `changes` are, or nothing without any."""
    signs = {SIGNS.get(change.kind, "~") for change in changes}
    return signs.pop() if len(signs) == 1 else "~" if signs else ""


def figure_rows(result: DiffResult) -> list[FigureRow]:
    """Return the figures of the whole model; those that neither side can tell are left out."""
    return [
        FigureRow(
            FIGURES.get(m.name, m.name.replace("_", " ")),
            format_metric(m.name, m.before),
            format_metric(m.name, m.after),
            _metric_change(m),
        )
        for m in result.metrics
        if m.before is not None or m.after is not None
    ]


def format_metric(name: str, value: float | None) -> str:
    """Return a figure with its unit, or `unknown`."""
    if value is None:
        return "unknown"
    if "bytes" in name:
        return plain_bytes(value)
    is_whole = float(value).is_integer() and "bits" not in name
    return plain_count(value) if is_whole else f"{value:.2f}"


def _metric_change(metric: MetricChange) -> str:
    before, after = metric.before, metric.after
    if before is None or after is None:
        return ""
    if before == after:
        return "same"
    if not (before and after and math.isfinite(before) and math.isfinite(after)):
        return ""
    factor = max(after / before, before / after)
    if factor >= _MANY_TIMES:
        return f"{factor:.2f}x {'more' if after > before else 'less'}"
    return f"{100 * (after / before - 1):+.3g} %"


def side_words(side: SideSummary) -> str:
    """Return what a side is: `smollm2-135m, kv4 (artifact): 30 layers, 1 204 operations`."""
    known = ", ".join(filter(None, (side.model, side.recipe)))
    kind = f"{known} ({side.kind})" if known else side.kind
    counts = [(side.layers, "layer"), (side.nodes, "operation")]
    sizes = [f"{plain_count(n)} {word}{'' if n == 1 else 's'}" for n, word in counts if n]
    return f"{kind}: {', '.join(sizes)}" if sizes else kind
