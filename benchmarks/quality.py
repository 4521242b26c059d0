r"""Quality per true bit of caches of SmolLM2-135M: recipes, and Hugging Face's QuantizedCache.

    python benchmarks/quality.py --text wikitext2/test.txt --calibration wikitext2/valid.txt \
        --json benchmarks/results/quality.json
    python benchmarks/quality.py --only 'kv4$,hf-quanto' --json ...  # some rows; others stay
    python benchmarks/quality.py --missing --json ...                # what the file does not have
    python benchmarks/quality.py --device cuda --jobs 4 --json ...   # rows side by side
    python benchmarks/quality_page.py                                # docs/quality.md and the plot

Rows are measured in the order of `--formats`. Each part of a row is written as soon as it is
measured, so that an interrupted run loses nothing. Protocol `decode` scores the first
`--decode-window` tokens of each window.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_command,
    describe_run,
    first_line,
    format_table,
    is_wanted,
)

from kvxform.evaluate.scorecard import Effort, Subject
from kvxform.evaluate.tables import HEADINGS, table_rows
from kvxform.quality import ALL, QualityRun, expand_names

MODEL = "smollm2-135m"
BENCHMARK = "quality"
PHASES = (("prefill", "attention"), ("passkeys",), ("decode",), ("encoding",))


def main() -> None:
    """Measure the rows that are asked for."""
    options = parse_options()
    names = wanted_rows(options)
    book = Book(options.json, options.benchmark)
    number = book.start_run({**describe_run(options), "command": public_command(sys.argv)})
    end = time.monotonic() + options.seconds
    if options.jobs == 1:
        measure_rows(names, book, number, options, end)
    else:
        run_side_by_side(names, book, number, options, end)
    keys = list(map(row_key, names))
    print_rows([row for key, row in book.read().rows.items() if key in keys])


def wanted_rows(options: argparse.Namespace) -> list[str]:
    """Return the names of the rows that are asked for."""
    return [name for name in expand_names(options.formats) if is_wanted(name, options.only)]


def row_key(name: str) -> str:
    """Return what a row is called: the name of a recipe, without folder and ending of its file."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def run_side_by_side(
    names: Sequence[str], book: Book, number: int, options: argparse.Namespace, end: float
) -> None:
    """Let processes take one row after another; end them when time is up.

    They are new interpreters: a fork of this one could not use CUDA if anything here, or in what
    it imports, has asked for a device.
    """
    spawn = multiprocessing.get_context("spawn")
    waiting = spawn.SimpleQueue()
    for name in [*names, *[None] * options.jobs]:  # each process ends at a None
        waiting.put(name)
    workers = [
        spawn.Process(target=take_rows, args=(waiting, book, number, options, end))
        for _ in range(options.jobs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end + options.grace - time.monotonic()))
        if worker.is_alive():
            worker.terminate()


def take_rows(waiting: SimpleQueue[str | None], *rest: Any) -> None:
    """Measure rows of a queue up to a None, as one of several processes."""
    torch.set_num_threads(1)
    measure_rows(iter(waiting.get, None), *rest)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokenizer", type=Path, help="folder; default: that of the model")
    parser.add_argument("--formats", default=ALL, help="comma separated names or files, or all")
    parser.add_argument("--benchmark", default=BENCHMARK, help="name that the results go by")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--calibration", type=Path, help="text for statistics; likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure side by side")
    parser.add_argument("--missing", action="store_true", help="only parts that are not there yet")
    parser.add_argument("--parts", default="", help="comma separated parts of rows; default: all")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--decode-window", type=int, default=256)
    parser.add_argument("--passkey", default="1024,2048,4096", help="lengths of prompts")
    parser.add_argument("--keys", type=int, default=1, help="numbers hidden at each depth")
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a prefill")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no part after so many")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds to finish what began")
    return parser.parse_args()


def open_run(options: argparse.Namespace) -> QualityRun:
    """Return the captured source model on the device, told of all rows that will come."""
    lengths = [int(word) for word in options.passkey.split(",") if word]
    effort = Effort(
        window=options.window,
        windows=options.windows,
        decode_window=options.decode_window,
        batch_size=options.batch_size,
        passkey_lengths=tuple(lengths),
        passkey_keys=options.keys,
    )
    run = QualityRun(
        options.model,
        effort,
        text=options.text,
        calibration=options.calibration,
        tokenizer=options.tokenizer,
    )
    run.expect(wanted_rows(options))
    run.move(options.device)
    return run


class Book:
    """A result file that several processes write parts of rows into.

    Args:
        path: The file; None keeps the rows of one process in memory.
        benchmark: What is measured: the tables of a page ask for it by this name.
    """

    def __init__(self, path: Path | None, benchmark: str = BENCHMARK) -> None:
        self._path, self._benchmark = path, benchmark
        self._memory = ResultFile(None, benchmark)

    def read(self) -> ResultFile:
        """Return the file as it is."""
        return self._memory if self._path is None else ResultFile(self._path, self._benchmark)

    def start_run(self, run: Row) -> int:
        """Say where the parts that follow come from; return the number of the run."""
        with self._changing() as file:
            file.start_run(run)
            return len(file.runs) - 1

    def add(self, name: str, number: int, parts: Row) -> None:
        """Put parts of a row into the file; `made_by` says which run made each of them."""
        with self._changing() as file:
            self._put(file, name, number, parts)

    @contextmanager
    def _changing(self) -> Iterator[ResultFile]:
        """Give the file to change, to one process at a time, and write it."""
        if self._path is None:
            yield self._memory
            return
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.read()
            yield file
            file.write()

    @staticmethod
    def _put(file: ResultFile, name: str, number: int, parts: Row) -> None:
        old = file.rows.get(name, {"key": name, "run": number, "made_by": {}})
        made_by = old["made_by"] | dict.fromkeys(parts, number)
        row = {**old, **parts, "made_by": made_by}
        for part in parts:  # what failed once is there now
            row.pop(f"error {part}", None)
            made_by.pop(f"error {part}", None)
        file.rows[name] = row


def measure_rows(
    names: Iterable[str], book: Book, number: int, options: argparse.Namespace, end: float
) -> None:
    """Measure rows part by part; one that fails says why and stops no other row."""
    run = open_run(options)
    say(f"ready on {options.device}")
    wanted = options.parts.split(",") if options.parts else [part for few in PHASES for part in few]
    for name in names:
        key = row_key(name)
        have = book.read().rows.get(key, {}).get("made_by", {}) if options.missing else {}
        left = [[p for p in few if p in wanted and p not in have] for few in PHASES]
        subject: Subject | None = None
        for parts in filter(None, left):
            if time.monotonic() > end:
                break
            start = time.perf_counter()
            try:
                subject = subject or run.open(name)
                book.add(key, number, {**run.measure(subject, *parts), "name": key})
            except Exception as error:  # other rows are worth having
                traceback.print_exc()
                book.add(key, number, {"name": key, f"error {parts[0]}": first_line(error)})
                continue
            say(f"{key}: {', '.join(parts)}: {time.perf_counter() - start:.1f} s")


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def public_command(arguments: Sequence[str]) -> str:
    """Return the command as a reader would type it: what belongs to this machine left out."""
    dropped = ("--model", "--tokenizer", "--seconds", "--grace")
    kept, skip = [arguments[0]], False
    for argument in arguments[1:]:
        if not skip and argument not in dropped:
            kept.append(Path(argument).name if "/" in argument else argument)
        skip = argument in dropped
    return describe_command(kept)


def print_rows(rows: Sequence[Row]) -> None:
    """Print one table, and what failed."""
    print(format_table(HEADINGS, table_rows([row for row in rows if "footprint" in row])))
    for row in rows:
        for key, value in row.items():
            if key.startswith("error"):
                print(f"{row['key']}: {key}: {value}")


if __name__ == "__main__":
    main()
