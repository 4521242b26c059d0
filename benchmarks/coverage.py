"""The coverage table: which decoder families work, measured by running each, and why others do not.

    python benchmarks/coverage.py                        # all families: make coverage-table
    python benchmarks/coverage.py llama "falcon alibi"   # only these rows of docs/coverage.md

Every family runs in a process of its own with a time limit, so that none can stop the table.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import ALL  # noqa: E402  the registry is part of the tests
from family_rows import COLUMNS, Row, measure  # noqa: E402
from family_table import read, render  # noqa: E402

TABLE = ROOT / "docs" / "coverage.md"


def main() -> None:
    """Measure families and write the table."""
    options = parse_options()
    rows = read(TABLE.read_text(encoding="utf-8")) if options.families else {}
    for row in measure_all(options.families or list(ALL), options.timeout, options.jobs):
        rows[row.name] = row
        TABLE.write_text(render(rows), encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}", file=sys.stderr)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names; all by default")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a family may take")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(ALL))
    if unknown:
        parser.error(f"no family is called {unknown[0]!r}; there are {', '.join(ALL)}")
    return options


def measure_all(names: Iterable[str], timeout: float, jobs: int) -> Iterator[Row]:
    """Measure families, each in a process of its own; tell on stderr as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: run_one(name, timeout), names)


def run_one(name: str, timeout: float) -> Row:
    """Measure one family in a new process, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["family_rows", "torch._dynamo"])
    start = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_row, args=(name, sender))
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
        row = Row(name, "0 of 0", dict.fromkeys(COLUMNS, failure))
    seconds = time.monotonic() - start
    lines = [f"{name:20} {' | '.join(row.cells):28} {seconds:5.1f} s"]
    lines += [f"    {column}: {why}" for column, why in row.reasons.items()]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return row


def send_row(name: str, sender: Connection) -> None:
    """Measure one family in this process, on one thread, and send its row."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sender.send(measure(ALL[name]))


if __name__ == "__main__":
    main()
