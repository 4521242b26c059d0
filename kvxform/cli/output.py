"""Data on stdout, talk and progress on stderr; rich on a terminal, plain text in a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def talk(text: str) -> None:
    """Print a line for people on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text))


def print_data(text: str) -> None:
    """Print text that is the result on stdout, exactly as it is."""
    sys.stdout.write(text + "\n")


def print_json(data: Any) -> None:
    """Print `data` on stdout as JSON."""
    print_data(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """Print a table on stdout: drawn on a terminal, aligned plain columns otherwise.

    Args:
        columns: Headings.
        rows: Cells.
        right: Indices of columns with numbers, which are aligned to the right.
    """
    if not sys.stdout.isatty():
        print_data(plain_table(columns, rows, right=right))
        return
    table = Table()
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Return a table as text: two spaces between columns, no lines."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(text)


def format_bytes(count: float) -> str:
    """Return a size for people: `23 040 B` below 64 KiB, then KiB, MiB, GiB with 3 digits."""
    if count < 64 * 1024:
        return f"{count:,.0f} B".replace(",", " ")
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1000 or unit == "GiB":
            break
    digits = 0 if count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {unit}"


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal.

    Args:
        label: What is counted.
        total: Count at the end.

    Yields:
        A function to call with the count so far.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
