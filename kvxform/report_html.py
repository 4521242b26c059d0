"""Report as one HTML page: no network, no scripts, readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvxform.formats import THIN, format_bytes, format_number, format_percent
from kvxform.page import render_page
from kvxform.recipe_text import format_yaml
from kvxform.report import Report
from kvxform.report_claims import claims
from kvxform.report_records import LayerRecord, PassCost, PassRecord
from kvxform.report_svg import Series, bar_chart
from kvxform.report_verdict import verdict


@dataclass(frozen=True)
class LayerRun:
    """Neighbouring layers that are stored the same way."""

    first: LayerRecord
    last: LayerRecord

    @property
    def title(self) -> str:
        """Which layers: `3` or `0 to 29`."""
        same = self.first.layer == self.last.layer
        return str(self.first.layer) if same else f"{self.first.layer} to {self.last.layer}"


@dataclass(frozen=True)
class Step:
    """A pass, and what it cost in words.

    Attributes:
        record: The pass.
        costs: What it changed of graph, weights and work; nothing if none.
        share: Its cache as a share of the largest of all steps, or None before there is a cache.
    """

    record: PassRecord
    costs: tuple[str, ...]
    share: float | None


def render_report(report: Report) -> str:
    """Return the page of a report."""
    return render_page(
        "report.html.jinja",
        report=report,
        verdict=verdict(report),
        steps=steps(report),
        notes=notes,
        claims=claims(report),
        recipe_text=format_yaml(report.recipe),
        error_chart=error_chart(report.layers),
        bytes_chart=bytes_chart(report.layers),
        layer_runs=layer_runs(report.layers),
    )


def steps(report: Report) -> list[Step]:
    """Return the passes in order, each with what it cost."""
    sizes = [p.cost.kv_bytes_per_token for p in report.passes if p.cost] or [None]
    largest = max((size for size in sizes if size), default=0.0)
    found, flops = [], 0
    for record in report.passes:
        cost = record.cost
        size = cost.kv_bytes_per_token if cost else None
        words = _cost_words(cost, flops) if cost else ()
        found.append(Step(record, words, size / largest if size else None))
        flops = cost.extra_flops_per_token if cost else flops
    return found


def notes(record: PassRecord) -> list[str]:
    """Return what a pass did or left, with the number of places."""
    done = [f"at {count}: {note}" for note, count in record.notes]
    return done + [f"not at {count}: {reason}" for reason, count in record.skipped]


def _cost_words(cost: PassCost, flops: int) -> tuple[str, ...]:
    words = []
    if cost.operations:
        changes = (f"{_signed(n)} {name}" for name, n in cost.operations)
        words.append(f"graph: {', '.join(changes)}")
    if cost.parameters:
        words.append(f"weights: {_signed(cost.parameters)} numbers")
    if cost.extra_flops_per_token != flops:
        words.append(f"work: {_signed(cost.extra_flops_per_token - flops)} additions per token")
    return tuple(words)


def _signed(count: int) -> str:
    sign = "+" if count > 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(count):,}".replace(",", THIN)


def error_chart(layers: Sequence[LayerRecord]) -> Markup | None:
    """Return the chart of K and V errors, or None if they were not measured."""
    pairs = [(r.key_error, r.value_error) for r in layers]
    keys = [k for k, _ in pairs if k is not None]
    values = [v for _, v in pairs if v is not None]
    if not layers or len(keys) < len(layers) or len(values) < len(layers):
        return None
    is_visible = max(*keys, *values) >= 1e-3
    return bar_chart(
        "Relative error of cached K and V by layer",
        [r.layer for r in layers],
        [Series("K", "key", keys), Series("V", "value", values)],
        format_percent if is_visible else format_number,
    )


def bytes_chart(layers: Sequence[LayerRecord]) -> Markup | None:
    """Return the chart of bytes per token, or None without layers."""
    if not layers:
        return None
    return bar_chart(
        "Bytes per token by layer",
        [r.layer for r in layers],
        [
            Series("K", "key", [r.key_bytes for r in layers]),
            Series("V", "value", [r.value_bytes for r in layers]),
        ],
        format_bytes,
        stacked=True,
        outline=[r.baseline_bytes for r in layers],
    )


def layer_runs(layers: Sequence[LayerRecord]) -> list[LayerRun]:
    """Group neighbouring layers with the same codecs and sizes."""
    runs: list[LayerRun] = []
    for record in layers:
        if runs and _storage(runs[-1].last) == _storage(record):
            runs[-1] = LayerRun(runs[-1].first, record)
        else:
            runs.append(LayerRun(record, record))
    return runs


def _storage(record: LayerRecord) -> tuple[str, str, float, float]:
    return record.key_codec, record.value_codec, record.key_bytes, record.value_bytes
