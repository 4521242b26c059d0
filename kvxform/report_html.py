"""Report as one HTML page: no network, no scripts, readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvxform.formats import format_bytes, format_number, format_percent
from kvxform.page import render_page
from kvxform.recipe_text import format_yaml
from kvxform.report import LayerRecord, Report
from kvxform.report_svg import Series, bar_chart


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


def render_report(report: Report) -> str:
    """Return the page of a report."""
    return render_page(
        "report.html.jinja",
        report=report,
        exact=[p for p in report.passes if p.exactness == "exact"],
        lossy=[p for p in report.passes if p.exactness != "exact"],
        verdict=verdict(report),
        recipe_text=format_yaml(report.recipe),
        error_chart=error_chart(report.layers),
        bytes_chart=bytes_chart(report.layers),
        layer_runs=layer_runs(report.layers),
    )


def verdict(report: Report) -> str:
    """Return what the report says in one sentence."""
    if report.verify == "none":
        return "Nothing was measured: the figures below are arithmetic on the plan of the cache."
    lossy = [p.name for p in report.passes if p.exactness != "exact"]
    kept = "Every exact step kept its promise"
    if not lossy:
        return f"{kept}: the model computes what it computed before, up to rounding."
    assert report.final is not None, "a verified run has been measured"
    names = " and ".join(lossy)
    return (
        f"{kept}. What {names} costs was measured: a divergence of "
        f"{format_number(report.final.kl)} nats per token, and "
        f"{format_percent(report.final.top1)} of next tokens unchanged."
    )


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
