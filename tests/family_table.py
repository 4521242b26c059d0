"""The coverage table as text: rows to Markdown and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import transformers
from families import ALL, NAMED, OTHERS, PLAIN
from family_rows import COLUMNS, Row

SECTIONS = {"Named families": NAMED, "Plain PyTorch": PLAIN, "Others": OTHERS}
WHY, LEFT = "## Why not", "## What stays as the source has it"
ABOUT = """\
# Families

Each family is built small (2 to 4 layers, hidden size 48 or 64) from its `transformers`
configuration with seeded random weights, captured, optimised and compared with the unrewritten
model. Written by `make coverage-table`; do not edit. {versions}
"""
MEANING = {
    "sites": "attentions raised, of those that the unrewritten model runs",
    "exact": "recipe `exact`: logits within 1e-8 of the largest in float64, where whatever asks for"
    " float32 gets float64, and 1e-4 in float32; all schedules of the cache-state checker; 48"
    " greedy tokens of a ragged batch equal `transformers` with its own cache",
    "kv4": "recipe `kv4` without bounds: every pass keeps its contract, and all schedules of the"
    " cache-state checker",
    "ONNX": "packages of `exact` and `kv4` give the logits of the eager lowering, padded rows too;"
    " 48 greedy tokens of `exact` equal `transformers`",
}


def render(rows: Mapping[str, Row]) -> str:
    """Return the whole page; families that were not measured are left out."""
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}."
    parts = [ABOUT.format(versions=versions), *_table(["column", "what `yes` means"], MEANING)]
    present = [rows[name] for name in ALL if name in rows]
    for title, families in SECTIONS.items():
        cells = {row.name: " | ".join(row.cells) for row in present if row.name in families}
        parts += ["", f"## {title}", "", *_table(["family", *COLUMNS], cells)]
    parts += ["", WHY, ""]
    for row in present:
        columns: dict[str, list[str]] = {}
        for column in COLUMNS:
            if column in row.reasons:
                columns.setdefault(row.reasons[column], []).append(column)
        parts += [f"- {row.name}, {', '.join(names)}: {why}" for why, names in columns.items()]
    parts += ["", LEFT, ""]
    parts += [f"- {row.name}: {note}" for row in present for note in row.notes]
    return "\n".join(parts) + "\n"


def _table(head: list[str], rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return [*lines, *(f"| {name} | {cells} |" for name, cells in rows.items())]


def read(text: str) -> dict[str, Row]:
    """Return the rows of a page that `render` wrote, in its order."""
    rows: dict[str, Row] = {}
    tables, _, rest = text.partition(WHY)
    for name, sites in re.findall(r"^\| (.+?) \| (\d+ of \d+) \|", tables, re.MULTILINE):
        rows[name] = Row(name, sites)
    why, _, left = rest.partition(LEFT)
    for name, columns, reason in re.findall(r"^- (.+?), (.+?): (.+)$", why, re.MULTILINE):
        rows[name].reasons |= dict.fromkeys(columns.split(", "), reason)
    for name, note in re.findall(r"^- (.+?): (.+)$", left, re.MULTILINE):
        rows[name].notes.append(note)
    return rows
