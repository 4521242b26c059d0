"""The coverage table: which decoder families work, measured by running each, and why others do not.

    python benchmarks/coverage.py                        # all families; writes docs/coverage.md
    python benchmarks/coverage.py llama "falcon alibi"   # these; prints what they showed

Every family runs in a process of its own with a time limit, so that none can stop the table.
`make coverage-table` does the first.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import ALL, NAMED, OTHERS, PLAIN  # noqa: E402  the registry is part of the tests
from family_rows import COLUMNS, Row, measure  # noqa: E402

TABLE = ROOT / "docs" / "coverage.md"
SECTIONS = (("Named families", NAMED), ("Plain PyTorch", PLAIN), ("Others", OTHERS))
ABOUT = """\
# Families

Each family is built small (2 to 4 layers, hidden size 48 or 64) from its `transformers`
configuration with seeded random weights, captured, optimised and compared with the unrewritten
model. Written by `make coverage-table`; do not edit. {versions}

"""
MEANING = {
    "sites": "attentions raised, of those that the unrewritten model runs",
    "exact": "recipe `exact`: logits within 1e-8 of the largest in float64 and 1e-4 in float32;"
    " all schedules of the cache-state checker (chunks, decode, page reuse, windows that wrap);"
    " 48 greedy tokens of a ragged batch equal `transformers` with its own cache",
    "kv4": "recipe `kv4` without bounds: every pass keeps its contract, and all schedules of the"
    " cache-state checker",
    "ONNX": "packages of `exact` and `kv4` give the logits of the eager lowering, padded rows too;"
    " 48 greedy tokens of `exact` equal `transformers`",
}


def main() -> None:
    """Measure families; write the table if no family was named."""
    options = parse_options()
    rows = measure_all(options.families or list(ALL), options.timeout, options.jobs)
    if options.families:
        print("\n".join([*table(rows), *reasons(rows)]))
    else:
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


def measure_all(names: Iterable[str], timeout: float, jobs: int) -> list[Row]:
    """Measure families, each in a process of its own; tell on stderr as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda name: run_one(name, timeout), names))


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
        row = Row(name, "0", dict.fromkeys(COLUMNS, failure))
    seconds = time.monotonic() - start
    print(f"{name:20} {' | '.join(row.cells):28} {seconds:5.1f} s", file=sys.stderr, flush=True)
    return row


def send_row(name: str, sender: Connection) -> None:
    """Measure one family in this process, on one thread, and send its row."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sender.send(measure(ALL[name]))


def render(rows: list[Row]) -> str:
    """Return the whole page."""
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}."
    about = ["| column | what `yes` means |", "| --- | --- |"]
    about += [f"| {column} | {meaning} |" for column, meaning in MEANING.items()]
    parts = [ABOUT.format(versions=versions) + "\n".join([*about, ""])]
    for title, families in SECTIONS:
        chosen = [row for row in rows if row.name in families]
        parts.append("\n".join([f"## {title}", "", *table(chosen), ""]))
    return "\n".join([*parts, *reasons(rows)]) + "\n"


def table(rows: list[Row]) -> list[str]:
    """Return the lines of one table."""
    head = f"| family | {' | '.join(COLUMNS)} |"
    lines = [f"| {row.name} | {' | '.join(row.cells)} |" for row in rows]
    return [head, "| --- " * (len(COLUMNS) + 1) + "|", *lines]


def reasons(rows: list[Row]) -> list[str]:
    """Return the lines that say why: failures by column, then what was left as it was."""
    lines = ["## Why not", ""]
    for row in rows:
        columns: dict[str, list[str]] = {}
        for column in COLUMNS:
            if column in row.reasons:
                columns.setdefault(row.reasons[column], []).append(column)
        lines += [f"- {row.name}, {', '.join(names)}: {why}" for why, names in columns.items()]
    lines += ["", "## What stays as the source has it", ""]
    lines += [f"- {row.name}: {note}" for row in rows for note in row.notes]
    return lines


if __name__ == "__main__":
    main()
