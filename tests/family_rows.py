"""One row of the coverage table: everything in `family_checks` for one family, and why not."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from families import Family
from family_checks import (
    Subject,
    check_export,
    check_logits,
    check_sites,
    check_tokens,
    count_attentions,
)

from kvxform.runtime.model import OptimizedModel

COLUMNS = ("sites", "exact", "kv4", "ONNX")
T = TypeVar("T")


@dataclass
class Row:
    """What one family showed.

    Attributes:
        name: The family.
        sites: Raised attentions, of how many.
        reasons: By column, the first thing that failed; a column that is missing has passed.
        notes: What was left as it was although the family works.
    """

    name: str
    sites: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of `COLUMNS`."""
        rest = ("no" if column in self.reasons else "yes" for column in COLUMNS[1:])
        return (self.sites, *rest)

    def attempt(self, column: str, check: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """Return what `check` returns; note why it failed if it did."""
        try:
            return check(*args, **options)
        except Exception as error:  # a table must be able to quote any failure
            text = re.sub(r"/tmp/\S*/", "", str(error).strip())  # a folder of this run alone
            lines = text.splitlines() or [type(error).__name__]
            self.reasons.setdefault(column, lines[0])
            return None


def measure(family: Family) -> Row:
    """Run all checks of one family."""
    row = Row(family.name)
    double = row.attempt("exact", Subject.of, family, torch.float64)
    if double is None:
        there = row.attempt("sites", lambda: count_attentions(family.build(torch.float64)))
        row.sites = f"0 of {there}"
        row.reasons |= dict.fromkeys(("sites", "kv4", "ONNX"), row.reasons["exact"])
        return row
    _count_sites(row, double)
    exact = row.attempt("exact", double.optimise, "exact", "full")
    if exact is not None:
        row.attempt("exact", check_logits, double, exact)
    row.attempt("kv4", double.optimise, "kv4", "full")
    single = row.attempt("exact", Subject.of, family, torch.float32)
    if single is None:
        row.reasons["ONNX"] = row.reasons["exact"]
        return row
    exact = row.attempt("exact", single.optimise, "exact")
    if exact is None:
        row.reasons["ONNX"] = row.reasons["exact"]
    else:
        row.attempt("exact", check_logits, single, exact)
        row.attempt("exact", check_tokens, single, [exact])
        row.attempt("ONNX", _check_onnx, single, exact)
    return row


def _count_sites(row: Row, subject: Subject) -> None:
    row.attempt("sites", check_sites, subject)
    there = count_attentions(subject.model)
    row.sites = f"{len(subject.program.sites)} of {there}"
    for site in subject.program.rejected:
        if site.kind == "attention":
            row.reasons.setdefault("sites", site.reason)
        else:
            row.notes.append(f"left alone: {site.reason}")
    row.notes += [note for site in subject.program.sites for note in site.notes]
    row.notes = list(dict.fromkeys(row.notes))


def _check_onnx(subject: Subject, exact: OptimizedModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        session = check_export(exact, Path(folder, "exact"), lossy=False)
        check_tokens(subject, [session])
        check_export(subject.optimise("kv4"), Path(folder, "kv4"), lossy=True)
