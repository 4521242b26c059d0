"""Bar charts over layers as inline SVG; colours come from CSS classes, so they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 8, 12, 40  # room for axes
MAX_BAR = 34  # widest group of bars, so that two layers do not become two walls
MAX_LABELS = 16  # layer numbers under the axis


@dataclass(frozen=True)
class Series:
    """One set of bars: a name, a CSS class and one value a layer."""

    name: str
    css: str
    values: Sequence[float]


def bar_chart(
    title: str,
    layers: Sequence[int],
    series: Sequence[Series],
    label: Callable[[float], str],
    *,
    stacked: bool = False,
    outline: Sequence[float] | None = None,
) -> Markup:
    """Return a chart with one group of bars a layer.

    Args:
        title: What is shown, for screen readers.
        layers: Layer indices, left to right.
        series: Bars of each group, side by side or stacked.
        label: Text of a value, for the axis and for the tips of bars.
        stacked: Put the series of a layer on top of each other.
        outline: A hollow bar behind each group, for instance the size before.
    """
    tops = [sum(column) if stacked else max(column) for column in _columns(series)]
    highest = max([*tops, *(outline or ())], default=0.0)
    ticks = nice_ticks(highest)
    scale = (HEIGHT - TOP - BOTTOM) / (ticks[-1] or 1.0)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(layers))
    parts = [_axis(ticks, scale, label), _layer_labels(layers, step)]
    for i, layer in enumerate(layers):
        group = min(MAX_BAR, step * 0.8)
        x = LEFT + (i + 0.5) * step - group / 2
        if outline:
            tip = f"layer {layer}, before: {label(outline[i])}"
            parts.append(_bar(x - 1.5, group + 3, 0, outline[i], scale, "outline", tip))
        width = group if stacked else group / len(series)
        base = 0.0
        for j, one in enumerate(series):
            tip = f"layer {layer}, {one.name}: {label(one.values[i])}"
            left = x if stacked else x + j * width
            parts.append(_bar(left, width, base, one.values[i], scale, one.css, tip))
            base += one.values[i] if stacked else 0.0
    body = Markup("").join(parts)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">{}</svg>'
    ).format(WIDTH, HEIGHT, title, body)


def nice_ticks(highest: float, count: int = 4) -> list[float]:
    """Return about `count` round steps from 0 to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    raw = highest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _columns(series: Sequence[Series]) -> list[tuple[float, ...]]:
    return list(zip(*(one.values for one in series), strict=True))


def _bar(
    x: float, width: float, base: float, value: float, scale: float, css: str, tip: str
) -> Markup:
    y, height = HEIGHT - BOTTOM - (base + value) * scale, value * scale
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
        "<title>{}</title></rect>"
    ).format(css, x, y, max(width - 1, 0.5), max(height, 0.0), tip)


def _axis(ticks: Sequence[float], scale: float, label: Callable[[float], str]) -> Markup:
    lines = []
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick * scale
        css = "grid base" if tick == 0 else "grid"
        lines.append(
            Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(css, LEFT, WIDTH - RIGHT, y, y, LEFT - 8, y + 4, label(tick) if tick else "0")
        )
    return Markup("").join(lines)


def _layer_labels(layers: Sequence[int], step: float) -> Markup:
    every = math.ceil(len(layers) / MAX_LABELS)
    texts = [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            LEFT + (i + 0.5) * step, HEIGHT - BOTTOM + 17, layer
        )
        for i, layer in enumerate(layers)
        if i % every == 0
    ]
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    caption = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        middle, HEIGHT - 6, escape("layer")
    )
    return Markup("").join([*texts, caption])
