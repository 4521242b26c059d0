"""The table of ONNX forms as text: rows to Markdown and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnxruntime
import torch
import transformers
from families import ALL
from family_table import SECTIONS
from onnx_rows import CASES, COLUMNS, NEW_TOKENS, OnnxRow

WHY, ILLEGAL = "## Why not", "## Not legal"
ABOUT = """\
# Families as ONNX packages

The families of [coverage.md](coverage.md), with the same small models: exported in every form, and
run by ONNX Runtime on the CPU. `yes`: the package continues a ragged batch of three prompts with
the {count} greedy tokens of the eager lowering; with a lossy cache up to where a token led by less
than 1 % of the largest logit. `-`: the form is not legal for the family, as told below.
Written by `make onnx-table`; do not edit. {versions}
"""
RECIPES = {
    "exact": "an unquantised cache",
    "kv4": "recipe `kv4`",
    "int8": "codec `static-int` with 8 bits, calibrated",
}


def render(rows: Mapping[str, OnnxRow]) -> str:
    """Return the whole page; families that were not measured are left out."""
    packages = {"torch": torch, "transformers": transformers, "onnxruntime": onnxruntime}
    found = ", ".join(f"{name} {m.__version__.split('+')[0]}" for name, m in packages.items())
    forms = {case.name: f"{case.level} | {case.opset} | {RECIPES[case.recipe]}" for case in CASES}
    parts = [
        ABOUT.format(count=NEW_TOKENS, versions=f"{found}."),
        *_table(["column", "level", "opset", "cache"], forms),
    ]
    present = [rows[name] for name in ALL if name in rows]
    for title, families in SECTIONS.items():
        cells = {row.name: " | ".join(row.cells) for row in present if row.name in families}
        parts += ["", f"## {title}", "", *_table(["family", *COLUMNS], cells)]
    parts += ["", ILLEGAL, "", *(x for row in present for x in _reasons(row.name, row.illegal))]
    parts += ["", WHY, "", *(x for row in present for x in _reasons(row.name, row.failed))]
    return "\n".join(parts).rstrip("\n") + "\n"


def _reasons(name: str, reasons: Mapping[str, str]) -> list[str]:
    columns: dict[str, list[str]] = {}
    for column in COLUMNS:
        if column in reasons:
            columns.setdefault(reasons[column], []).append(column)
    return [f"- {name}; {', '.join(names)}: {why}" for why, names in columns.items()]


def _table(head: list[str], rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return [*lines, *(f"| {name} | {cells} |" for name, cells in rows.items())]


def read(text: str) -> dict[str, OnnxRow]:
    """Return the rows of a page that `render` wrote, in its order."""
    tables, _, rest = text.partition(ILLEGAL)
    names = re.findall(r"^\| (.+?) \| (?:(?:yes|no|-) \| )*(?:yes|no|-) \|$", tables, re.MULTILINE)
    rows = {name: OnnxRow(name) for name in names}
    illegal, _, failed = rest.partition(WHY)
    for part, field in ((illegal, "illegal"), (failed, "failed")):
        for name, columns, reason in re.findall(r"^- (.+?); (.+?): (.+)$", part, re.MULTILINE):
            getattr(rows[name], field).update(dict.fromkeys(columns.split(", "), reason))
    return rows
