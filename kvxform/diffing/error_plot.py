"""Errors over layers as inline SVG, on a scale of powers of ten; colours come from CSS classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from kvxform.diffing.records import LayerDiff
from kvxform.formats import format_number, power_of_ten

WIDTH, HEIGHT = 760, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 40  # room for axes
LOWEST = -9  # power of ten of the axis; what is smaller lies on it
_SERIES = (("hidden", "hidden state"), ("key", "cached keys"), ("value", "cached values"))
_MOST_LABELS = 16


def error_plot(layers: Sequence[LayerDiff], tolerance: float) -> Markup | None:
    """Return the plot of every error that was measured, or None if none was.

    Args:
        layers: The layers, left to right.
        tolerance: Relative error that is rounding; a dashed line.
    """
    found = {
        name: [(i, getattr(layer, name)) for i, layer in enumerate(layers)] for name, _ in _SERIES
    }
    points = {
        name: [(i, e) for i, e in pairs if e is not None and not math.isnan(e)]
        for name, pairs in found.items()
    }
    values = [e for pairs in points.values() for _, e in pairs]
    if not values or not any(values):
        return None
    scale = _Scale(len(layers), values)
    parts = [*_axis(scale, [layer.layer for layer in layers]), _rounding(scale, tolerance)]
    for name, words in _SERIES:
        parts.append(_line(scale, name, points[name]))
        parts += [_dot(scale, name, words, layers[i].layer, i, e) for i, e in points[name]]
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="Error by layer" class="chart">{}</svg>'
    ).format(WIDTH, HEIGHT, Markup("").join(parts))


class _Scale:
    """Where a layer and an error lie."""

    def __init__(self, layers: int, errors: Sequence[float]) -> None:
        """Choose powers of ten that hold all `errors`."""
        powers = [math.ceil(math.log10(e)) for e in errors if e and math.isfinite(e)]
        self.top = max([0, *powers])
        self.bottom = LOWEST
        self.step = (WIDTH - LEFT - RIGHT) / max(1, layers)

    def x(self, index: int) -> float:
        return LEFT + (index + 0.5) * self.step

    def y(self, error: float) -> float:
        power = math.log10(error) if error > 0 and math.isfinite(error) else self.bottom
        if error == math.inf:
            power = self.top
        share = (min(max(power, self.bottom), self.top) - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axis(scale: _Scale, layers: Sequence[int]) -> Iterator[Markup]:
    for power in range(scale.bottom, scale.top + 1, 3):
        y = scale.y(10.0**power)
        label = "0" if power == scale.bottom else power_of_ten(power)
        yield Markup(
            '<line class="grid{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(
            " base" if power == scale.bottom else "",
            LEFT,
            WIDTH - RIGHT,
            y,
            y,
            LEFT - 8,
            y + 4,
            label,
        )
    every = math.ceil(len(layers) / _MOST_LABELS)
    for i, layer in list(enumerate(layers))[::every]:
        yield Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            scale.x(i), HEIGHT - BOTTOM + 17, layer
        )
    yield Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">layer</text>').format(
        (LEFT + WIDTH - RIGHT) // 2, HEIGHT - 6
    )


def _rounding(scale: _Scale, tolerance: float) -> Markup:
    y = scale.y(tolerance)
    return Markup(
        '<line class="rounding" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">below: rounding</text>'
    ).format(LEFT, WIDTH - RIGHT, y, y, WIDTH - RIGHT, y - 5)


def _line(scale: _Scale, name: str, points: Sequence[tuple[int, float]]) -> Markup:
    path = " ".join(f"{scale.x(i):.1f},{scale.y(e):.1f}" for i, e in points)
    return Markup('<polyline class="line {}" points="{}"/>').format(name, path)


def _dot(scale: _Scale, name: str, words: str, layer: int, index: int, error: float) -> Markup:
    return Markup(
        '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>layer {}, {}: {}</title></circle>'
    ).format(name, scale.x(index), scale.y(error), layer, words, format_number(error))
