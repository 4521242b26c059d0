"""`kvxform diff`: what differs between two models, graphs or builds, in which layers, and why."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvxform.cli.options import Json
from kvxform.cli.output import print_data, talk
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.diffing.records import DiffResult


class Format(enum.StrEnum):
    """How a diff is written."""

    text = "text"
    json = "json"
    markdown = "markdown"
    junit = "junit"
    sarif = "sarif"
    html = "html"


SUFFIXES = {
    ".txt": Format.text,
    ".json": Format.json,
    ".md": Format.markdown,
    ".xml": Format.junit,
    ".sarif": Format.sarif,
    ".html": Format.html,
}
SIDE = "Artifact, ONNX package or file, .pt2 file, lock, MODEL, or MODEL@RECIPE."
SideA = Annotated[str, typer.Argument(metavar="A", help=SIDE)]
SideB = Annotated[str, typer.Argument(metavar="B", help="The same.")]
FormatOption = Annotated[Format, typer.Option("--format", help="What stdout gets.")]
OutFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--out",
        "-o",
        help="File to write, in the format of its ending: .txt, .json, .md, .xml (JUnit), .sarif "
        "or .html. May be given more than once.",
    ),
]
Thresholds = Annotated[
    Path | None,
    typer.Option("--thresholds", help="YAML or JSON with limits; within them the exit code is 0."),
]
NoNumeric = Annotated[bool, typer.Option("--no-numeric", help="Run neither side.")]
Text = Annotated[
    str | None, typer.Option("--text", help="Text to run both on; default: text that A writes.")
]
Generate = Annotated[
    int, typer.Option("--generate", min=0, help="Tokens that both write after the same prompt.")
]


def run(
    a: SideA,
    b: SideB,
    format_: FormatOption = Format.text,
    out: OutFiles = None,
    thresholds: Thresholds = None,
    no_numeric: NoNumeric = False,
    text: Text = None,
    generate: Generate = 0,
    json: Json = False,
) -> int:
    """Say what differs between A and B. Exit code 0: the same, 1: different, 2: an error."""
    files = [(path, format_of(path)) for path in out or ()]
    from kvxform.differ.comparing import diff

    result = diff(
        a,
        b,
        inputs=text,
        thresholds=thresholds,
        numeric=not no_numeric,
        generate=generate,
    )
    wanted = Format.json if json else format_
    if wanted is Format.text:
        from kvxform.diffing.render_text import render_text

        print_data(render_text(result, colour=sys.stdout.isatty()).rstrip("\n"))
    else:
        print_data(render(result, wanted).rstrip("\n"))
    write_files(result, files)
    return result.exit_code


def format_of(path: Path) -> Format:
    """Return the format of a file by its ending; KVX801 if that is none."""
    if path.suffix not in SUFFIXES:
        rule = "the name of a file for a diff must tell its format"
        hint = f"end it in {', '.join(SUFFIXES)}"
        raise KvxformError("KVX801", rule, got=repr(path.name), hint=hint)
    return SUFFIXES[path.suffix]


def write_files(result: DiffResult, files: list[tuple[Path, Format]]) -> None:
    """Write a diff to files; their folders are made."""
    for path, kind in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(result, kind), encoding="utf-8")
        except OSError as error:
            rule = "a file for a diff must be writable"
            raise KvxformError("KVX801", rule, got=f"'{path}' ({error.strerror})") from error
        talk(f"wrote {path}")


def render(result: DiffResult, kind: Format) -> str:
    """Return a diff in one of the formats."""
    return _renderer(kind)(result)


def _renderer(kind: Format) -> Callable[[DiffResult], str]:
    from kvxform.diffing.render_html import render_html
    from kvxform.diffing.render_json import render_json
    from kvxform.diffing.render_junit import render_junit
    from kvxform.diffing.render_markdown import render_markdown
    from kvxform.diffing.render_sarif import render_sarif
    from kvxform.diffing.render_text import render_text

    return {
        Format.text: render_text,
        Format.json: render_json,
        Format.markdown: render_markdown,
        Format.junit: render_junit,
        Format.sarif: render_sarif,
        Format.html: render_html,
    }[kind]
