"""The flags are frozen: docs/cli.md and the program say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from kvxform.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = ["| argument | default | meaning |", "| --- | --- | --- |"]


def described(command: Any) -> list[str]:
    """Return the table that the page must have for a command, without its heading."""
    rows = []
    for p in command.params:
        if p.name == "help":
            continue
        is_option = p.param_type_name == "option"
        names = ", ".join(f"`{name}`" for name in p.opts) if is_option else f"`{p.metavar}`"
        value = getattr(p.default, "value", p.default)
        if p.required:
            cell = " required "
        else:
            cell = " " if value is None or value is False else f" `{value}` "
        rows.append(f"| {names} |{cell}| {p.help} |")
    return rows


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


def documented() -> dict[str, list[str]]:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = {}
    for section in sections:
        title, *lines = section.splitlines()
        tables[title] = [line for line in lines if line.startswith("|") and line not in HEAD]
    return tables


def test_the_page_has_every_command_and_every_argument():
    program = {
        path: described(command)
        for path, command in commands(typer.main.get_command(app), "kvxform")
    }
    assert documented() == program


def test_every_verb_has_json():
    for path, command in commands(typer.main.get_command(app), "kvxform"):
        names = {name for p in command.params for name in p.opts}
        assert "--json" in names or path in ("kvxform", "kvxform recipes schema"), path
