"""The coverage table: which decoder families work, measured by running each, and why others do not.

    python benchmarks/coverage.py                        # all families: make coverage-table
    python benchmarks/coverage.py llama "falcon alibi"   # only these rows of docs/coverage.md
    python benchmarks/coverage.py --page onnx            # every ONNX form: make onnx-table

Every family runs in a process of its own with a time limit, so that none can stop the table.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import family_rows  # noqa: E402  what is measured is part of the tests
import family_table  # noqa: E402
import onnx_rows  # noqa: E402
import onnx_table  # noqa: E402
from families import ALL, Family  # noqa: E402


@dataclass(frozen=True)
class Page:
    """A page with a row for every family.

    Attributes:
        path: The file.
        measure: Returns the row of a family: `name`, `cells`, and what failed by column.
        failed: Returns a row for a family that could not be measured, from name and reason.
        reasons: Returns what failed by column.
        read: Returns the rows of the page by name.
        render: Returns the page.
    """

    path: Path
    measure: Callable[[Family], Any]
    failed: Callable[[str, str], Any]
    reasons: Callable[[Any], Mapping[str, str]]
    read: Callable[[str], dict[str, Any]]
    render: Callable[[Mapping[str, Any]], str]


PAGES = {
    "families": Page(
        ROOT / "docs" / "coverage.md",
        family_rows.measure,
        lambda name, why: family_rows.Row(name, "0 of 0", dict.fromkeys(family_rows.COLUMNS, why)),
        lambda row: row.reasons,
        family_table.read,
        family_table.render,
    ),
    "onnx": Page(
        ROOT / "docs" / "onnx-coverage.md",
        onnx_rows.measure,
        lambda name, why: onnx_rows.OnnxRow(name, dict.fromkeys(onnx_rows.COLUMNS, why)),
        lambda row: row.failed,
        onnx_table.read,
        onnx_table.render,
    ),
}


def main() -> None:
    """Measure families and write the table."""
    options = parse_options()
    page = PAGES[options.page]
    rows = page.read(page.path.read_text(encoding="utf-8")) if options.families else {}
    for row in measure_all(options):
        rows[row.name] = row
        page.path.write_text(page.render(rows), encoding="utf-8")
    print(f"wrote {page.path.relative_to(ROOT)}", file=sys.stderr)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names; all by default")
    parser.add_argument("--page", choices=PAGES, default="families", help="what is measured")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a family may take")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(ALL))
    if unknown:
        parser.error(f"no family is called {unknown[0]!r}; there are {', '.join(ALL)}")
    return options


def measure_all(options: argparse.Namespace) -> Iterator[Any]:
    """Measure families, each in a process of its own; tell on stderr as they end."""
    names: Iterable[str] = options.families or ALL
    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(lambda name: run_one(name, options.page, options.timeout), names)


def run_one(name: str, page: str, timeout: float) -> Any:
    """Measure one family in a new process, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["family_rows", "onnx_rows", "torch._dynamo"])
    start = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_row, args=(name, page, sender))
    process.start()
    sender.close()
    row, failure = None, f"it took more than {timeout:g} s"
    if receiver.poll(timeout):
        try:
            row = receiver.recv()
        except EOFError:
            failure = "its process died"
    process.kill()
    process.join()
    if row is None:
        row = PAGES[page].failed(name, failure)
    seconds = time.monotonic() - start
    lines = [f"{name:20} {' | '.join(row.cells):28} {seconds:5.1f} s"]
    lines += [f"    {column}: {why}" for column, why in PAGES[page].reasons(row).items()]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return row


def send_row(name: str, page: str, sender: Connection) -> None:
    """Measure one family in this process, on one thread, and send its row."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sender.send(PAGES[page].measure(ALL[name]))


if __name__ == "__main__":
    main()
