"""Report as one HTML page: no network, no scripts, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from kvxform.recipe_text import format_yaml
from kvxform.report import LayerRecord, Report
from kvxform.report_svg import Series, bar_chart

THIN = "\N{NARROW NO-BREAK SPACE}"
TIMES = f"{THIN}\N{MULTIPLICATION SIGN}{THIN}10"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvxform", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        bytes=format_bytes, number=format_number, percent=format_percent, ratio=format_ratio
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
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


def format_bytes(count: float) -> str:
    """Return a size: bytes below 64 KiB, then KiB, MiB, GiB with three digits."""
    if count < 64 * 1024:
        text = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
        return text.replace(",", THIN) + f"{THIN}B"
    power = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**power:.3g}{THIN}{('B', 'KiB', 'MiB', 'GiB')[power]}"


def format_number(value: float | None) -> str:
    """Return three digits: `0.0123`, or `4.71 x 10^-7` in type below 1e-3."""
    if value is None:
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}{TIMES}{str(int(power)).translate(SUPERSCRIPTS)}"


def format_percent(value: float | None) -> str:
    """Return a share as a percentage: `4.2 %`."""
    if value is None:
        return "\N{EN DASH}"
    return f"{100 * value:.3g}{THIN}%"


def format_ratio(value: float) -> str:
    """Return how many times smaller or larger: `3.56`."""
    return f"{value:.2f}"
