"""`kvxform check`: build what locks name and compare."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from kvxform.cli.options import Json
from kvxform.cli.output import print_data, talk


class Form(enum.StrEnum):
    """How checks are printed."""

    text = "text"
    json = "json"
    markdown = "markdown"
    junit = "junit"
    sarif = "sarif"
    html = "html"


Locks = Annotated[
    list[str], typer.Argument(metavar="LOCK...", help="Files that `kvxform lock` wrote.")
]
Source = Annotated[
    str | None,
    typer.Option("--source", help="Artifact or MODEL to check, instead of what the lock names."),
]
Update = Annotated[
    bool, typer.Option("--update", help="Write locks anew whose builds differ; exit with 0.")
]
Format = Annotated[Form, typer.Option("--format", help="How the answer is written.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="File for the answer, instead of stdout.")
]


def run(
    locks: Locks,
    source: Source = None,
    update: Update = False,
    format_: Format = Form.text,
    out: Out = None,
    json: Json = False,
) -> int:
    """Build what locks name, and show how it differs; exits with 1 if it does."""
    from kvxform.locks.rendering import render_checks
    from kvxform.locks.runs import check_files

    checks = check_files(locks, source=source, update=update, talk=talk)
    text = render_checks(checks, Form.json if json else format_)
    if out is None:
        print_data(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
        talk(f"kvxform: wrote {out}")
    for check in checks:
        if check.error and out is not None:
            talk(check.error)
    return max(check.exit_code for check in checks)
