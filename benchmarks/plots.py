"""Plots of result files: decode attention by shape, and decode steps of a whole model.

    python benchmarks/plots.py --results benchmarks/results -o docs/images

Needs matplotlib, the extra `bench`. No GPU is needed. The same results give the same files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from performance_page import RESULTS, ROOT, Results, read_results
from results import Row
from tables import best_bf16

IMAGES = ROOT / "docs" / "images"
OURS, OTHERS, FLOOR = "#1f6f8b", "#b8bfc6", "#c0392b"
BAR_INCHES = 0.26
CUT = 1.4  # bars end here, in times of the best bf16; their numbers go on


def main() -> None:
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("-o", "--output", type=Path, default=IMAGES, help="folder of images")
    options = parser.parse_args()
    for path in draw_all(read_results(options.results), options.output):
        print(f"wrote {path}", file=sys.stderr)


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw every plot that there are rows for; return the files."""
    mpl.rcParams["svg.hashsalt"] = "kvxform"  # ids in the file, random otherwise
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for benchmark, draw in {"decode_attention": draw_decode, "end_to_end": draw_steps}.items():
        figure = draw(results[benchmark]) if benchmark in results else None
        if figure is not None:
            path = folder / f"{benchmark}.svg"
            figure.savefig(path, metadata={"Date": None})
            written.append(path)
    return written


def draw_decode(file: Any) -> Figure | None:
    """Draw microseconds of attention, one panel a shape; the red line is what reading takes."""
    rows = [row for row in file["rows"] if "us" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return None
    groups = {shape: by_time(rows, shape) for shape in shapes}
    heights = [len(group) + 2 for group in groups.values()]
    figure = Figure(figsize=(8, BAR_INCHES * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shapes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (shape, group) in zip(panels, groups.items(), strict=True):
        times = [row["us"] for row in group]
        is_ours = [row["name"].startswith("ours-") for row in group]
        names = [row["name"] for row in group]
        panel.barh(names, times, color=[OURS if own else OTHERS for own in is_ours])
        end = min(max(times), CUT * (best_bf16(rows, shape) or max(times)))
        panel.set_xlim(0, end * 1.1)
        for place, row in enumerate(group):
            floor, tip = row["us"] * row["stream_share"], min(row["us"], end)
            panel.plot([floor, floor], [place - 0.4, place + 0.4], color=FLOOR, linewidth=1.5)
            panel.text(tip + 0.01 * end, place, f"{row['us']:.0f}", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.set_title(f"{shape}: microseconds a layer and step", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def by_time(rows: list[Row], shape: str) -> list[Row]:
    """Return the rows of one shape, quickest first."""
    return sorted((row for row in rows if row["shape"] == shape), key=lambda row: row["us"])


def draw_steps(file: Any) -> Figure | None:
    """Draw milliseconds of a decode step of a whole model; the red line is what reading takes."""
    rows = sorted((row for row in file["rows"] if "step_ms" in row), key=lambda r: r["step_ms"])
    if not rows:
        return None
    figure = Figure(figsize=(8, BAR_INCHES * (len(rows) + 3)), layout="constrained")
    panel = figure.subplots()
    names = [row["name"].removeprefix("step/") for row in rows]
    colors = [OTHERS if "huggingface" in name else OURS for name in names]
    bars = panel.barh(names, [row["step_ms"] for row in rows], color=colors)
    labels = [f"{row['step_ms']:.1f} ms, {row['tokens_per_s']:.0f} tokens/s" for row in rows]
    panel.bar_label(bars, labels, padding=3, fontsize=8)
    for place, row in enumerate(rows):
        floor = row["floor_ms"]
        panel.plot([floor, floor], [place - 0.4, place + 0.4], color=FLOOR, linewidth=1.5)
    panel.invert_yaxis()
    panel.margins(x=0.3)
    panel.set_title("milliseconds a decode step", fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
