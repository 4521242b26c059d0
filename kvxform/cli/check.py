"""`kvxform check`: build what locks name, and show how it differs from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.cli.diff import Format, FormatOption, OutFiles, format_of
from kvxform.cli.options import Json
from kvxform.cli.output import print_data, talk
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.locks.runs import Checked

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
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Revision of git: show what changed since its locks, updated or not."
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Processes that work on several locks.")]


def run(
    locks: Locks,
    source: Source = None,
    update: Update = False,
    base: Base = None,
    jobs: Jobs = 1,
    format_: FormatOption = Format.text,
    out: OutFiles = None,
    json: Json = False,
) -> int:
    """Build what locks name and compare. Exit code 0: the same, 1: different, 2: no build."""
    files = [(path, format_of(path)) for path in out or ()]
    from kvxform.locks.rendering import render_checks
    from kvxform.locks.runs import check_files

    checks = check_files(locks, source=source, update=update, base=base, jobs=jobs, talk=talk)
    print_data(render_checks(checks, Format.json if json else format_))
    _write_files(checks, files)
    return max(check.exit_code for check in checks)


def _write_files(checks: list[Checked], files: list[tuple[Path, Format]]) -> None:
    from kvxform.locks.rendering import render_checks

    for path, form in files:
        text = render_checks(checks, form) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            rule = "a file for a check must be writable"
            raise KvxformError("KVX801", rule, got=f"'{path}' ({error.strerror})") from error
        talk(f"wrote {path}")
