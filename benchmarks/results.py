"""Result files of benchmarks: rows with the run that made them, and tables on the terminal.

A file keeps what earlier runs measured, so that a benchmark can be run part by part. A row replaces
the older row of the same key; ratios are only ever taken between rows of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "kvxform", "torch", "triton", "transformers", "numpy", "flashinfer-python", "xformers",
    "optimum-quanto", "hqq", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
)  # fmt: skip
Row = dict[str, Any]


class ResultFile:
    """Rows in a JSON file, written after each of them.

    Args:
        path: The file; None keeps the rows in memory only.
        benchmark: Name of the benchmark.
    """

    def __init__(self, path: Path | None, benchmark: str) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if old and old["benchmark"] != benchmark:
            raise SystemExit(f"{path} holds results of {old['benchmark']}, not of {benchmark}")
        self.benchmark = benchmark
        self.runs: list[Row] = old.get("runs", [])
        self.rows: dict[str, Row] = {row["key"]: row for row in old.get("rows", [])}

    def start_run(self, run: Row) -> None:
        """Say where the rows that follow come from."""
        self.runs.append(run)

    def add(self, key: str, row: Mapping[str, Any]) -> Row:
        """Store a row, and write the file."""
        stored = {"key": key, "run": len(self.runs) - 1, **row}
        self.rows[key] = stored
        self.write()
        return stored

    def this_run(self) -> list[Row]:
        """Return the rows of the current run."""
        return [row for row in self.rows.values() if row["run"] == len(self.runs) - 1]

    def write(self) -> None:
        """Write the file; an interrupted write leaves the old one."""
        if self.path is None:
            return
        data = {"benchmark": self.benchmark, "runs": self.runs, "rows": list(self.rows.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(self.path)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark takes."""
    parser.add_argument("--json", type=Path, help="result file; rows of earlier runs stay in it")
    parser.add_argument("--only", default="", help="comma separated parts of keys of rows to run")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, turns and choices")
    parser.add_argument("--turns", type=int, default=60, help="timed turns of a row")
    parser.add_argument("--commit", default="", help="commit to record, where git does not know it")


def is_wanted(key: str, only: str) -> bool:
    """Return whether `--only` asks for the row: any of its parts lies in the key.

    A part that ends in `$` must be at the end of the key.
    """
    return not only or any(part in f"{key}$" for part in only.split(","))


def _plain(value: Any) -> str | float:
    """Return a value of the command line for a file: of paths the last part alone."""
    if isinstance(value, Path):
        return value.name
    return value if isinstance(value, str | int | float) else str(value)


def describe_run(options: argparse.Namespace, **measured: Any) -> Row:
    """Return what the numbers of a run depend on."""
    plain = {key: _plain(value) for key, value in vars(options).items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": describe_command(sys.argv),
        "commit": options.commit or _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": _driver(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "options": plain,
        **measured,
    }


def describe_command(arguments: Sequence[str]) -> str:
    """Return a command line as it would be typed in the root of the repository.

    Files and the commit are left out: they change nothing of what is measured.
    """
    kept, is_dropped = [f"benchmarks/{Path(arguments[0]).name}"], False
    for argument in arguments[1:]:
        if not is_dropped and argument not in ("--json", "--commit"):
            kept.append(argument)
        is_dropped = argument in ("--json", "--commit")
    return shlex.join(["python", *kept])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns; None is an empty cell."""
    cells = [[_cell(value) for value in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.1e}"
            if 0 < abs(value) < 0.01
            else f"{value:.3g}"
            if abs(value) < 10
            else f"{value:.1f}"
        )
    return str(value).replace("|", "/")


def first_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]
