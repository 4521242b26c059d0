"""Quality against true bits, as an SVG. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvxform.errors import KvxformError
from kvxform.evaluate.tables import change

OURS, OTHERS = "#1f6f8b", "#8a939b"
PANEL_HEIGHT, LINE = 360, 8  # of the axis and of a label, in points
LABEL_WIDTH = 0.55  # bits that a label covers
LOWEST = 1e-4  # changes below it, negative ones too, are drawn here
LEAST_RANGE = 12  # of the axis: a whole decade, so that two of its lines have a label
MOST_BITS = 16.0  # formats at or above it save nothing, and would stretch the axis
Card = Mapping[str, Any]


def draw_quality(cards: Sequence[Card], path: Path, *, highlight: Sequence[str] = ()) -> None:
    """Draw the change of perplexity against true bits at 1024 tokens; the same input, same file.

    Args:
        cards: What `QualityRun.measure` returned; those without bits or perplexity, and those of
            16 bits or more, are left out.
        path: Where to write the SVG.
        highlight: Beginnings of names that are drawn bold and joined by a line.

    Raises:
        KvxformError: KVX801 if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'kvxform[bench]'"
        raise KvxformError("KVX801", "a plot needs matplotlib", where="eval", hint=hint) from error
    mpl.rcParams["svg.hashsalt"] = "kvxform"  # ids in the file, random otherwise
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    points = sorted(filter(None, map(_point, cards)))
    ours = [p for p in points if any(p[2].startswith(name) for name in highlight)]
    if ours:
        panel.plot([p[0] for p in ours], [p[1] for p in ours], color=OURS, linewidth=1)
    shifts = _label_shifts(points)
    for bits, worse, name in points:
        is_ours = (bits, worse, name) in ours
        color = OURS if is_ours else OTHERS
        marker = "s" if name.startswith("hf-") else "o"
        panel.plot(bits, worse, marker, color=color, markersize=5)
        weight = "bold" if is_ours else "normal"
        panel.annotate(
            name, (bits, worse), xytext=(5, 3 + shifts[name]), textcoords="offset points",
            fontsize=7, color=color, weight=weight,
        )  # fmt: skip
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(top=max(high, LEAST_RANGE * low))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}")
    panel.yaxis.set_minor_formatter(lambda value, _: "")
    panel.set_xlabel("true bits per cached value at 1024 tokens, metadata and exact tokens counted")
    panel.set_ylabel("perplexity above that of the source")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, which="both", linewidth=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _label_shifts(points: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    """Return how far each label moves, in points of the page, so that it clears those above it."""
    heights = [math.log10(worse) for _, worse, _ in points]
    scale = PANEL_HEIGHT / max(1.0, max(heights) - min(heights)) if heights else 1.0
    placed: list[tuple[float, float]] = []  # bits and height, from the top
    shifts = {}
    for bits, worse, name in sorted(points, key=lambda point: -point[1]):
        wanted = height = math.log10(worse) * scale
        for other_bits, other in placed:
            if abs(bits - other_bits) < LABEL_WIDTH and other - height < LINE:
                height = other - LINE
        placed.append((bits, height))
        shifts[name] = height - wanted
    return shifts


def _point(card: Card) -> tuple[float, float, str] | None:
    worse = change(card.get("prefill") or card.get("decode"))
    if card["footprint"] is None or worse is None:
        return None
    bits = card["footprint"]["bits_short"]
    return (bits, max(worse, LOWEST), card["name"]) if bits < MOST_BITS else None
