"""Fill the tables of docs/performance.md and docs/onnx-performance.md from results of benchmarks.

    python benchmarks/performance_page.py            # reads benchmarks/results/*.json
    python benchmarks/performance_page.py --check    # says whether the pages are up to date

A page is written by hand but for the blocks between `<!-- table: NAME -->` and `<!-- end -->`.
Each block gets the rows of its benchmark, one table for each run, with the command, the device, the
versions and the date of the run below it. A block without results says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_tables
import tables
from results import Row

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(ROOT / "docs" / name for name in ("performance.md", "onnx-performance.md"))
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w/ -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MISSING = "Not measured yet.\n"
Results = Mapping[str, Mapping[str, Any]]


def main() -> int:
    """Rewrite the pages, or compare them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    results, stale = read_results(options.results), False
    for page in options.page:
        old = page.read_text(encoding="utf-8")
        new = fill_page(old, results)
        stale |= new != old
        if options.check:
            print(page.name, "up to date" if new == old else "out of date", file=sys.stderr)
        else:
            page.write_text(new, encoding="utf-8")
    return int(options.check and stale)


def read_results(folder: Path) -> Results:
    """Return runs and rows of all result files of a folder by benchmark.

    Several files of one benchmark are joined; rows of later ones replace those of the same key.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        joined = results.setdefault(file["benchmark"], {"runs": [], "rows": []})
        first = len(joined["runs"])
        joined["runs"] += file["runs"]
        rows = {row["key"]: row for row in joined["rows"]}
        rows |= {row["key"]: row | {"run": row["run"] + first} for row in file["rows"]}
        joined["rows"] = list(rows.values())
    return results


def fill_page(page: str, results: Results) -> str:
    """Return the page with its blocks filled anew."""
    return BLOCK.sub(
        lambda found: f"{found[1]}{fill_block(found['name'], results)}{found[4]}", page
    )


def fill_block(name: str, results: Results) -> str:
    """Return the content of one block.

    Raises:
        ValueError: If no table is called `name`.
    """
    benchmark, _, part = name.partition("/")
    if benchmark not in TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
    source, belongs, make_table = TABLES[benchmark]
    file = results.get(source)
    rows = [row for row in file["rows"] if belongs(row, part)] if file else []
    if file is None or not rows:
        return MISSING
    blocks = []
    for index in sorted({row["run"] for row in rows}):
        own = [row for row in rows if row["run"] == index]
        blocks.append(f"{make_table(own, part)}\n\n{describe_source(file['runs'][index])}\n")
    return "\n".join(blocks)


def describe_source(run: Row) -> str:
    """Return where numbers come from, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    driver = [f"driver {run['driver']}"] if run["driver"] else []
    parts = [f"`{run['command']}`", run["device"], *driver, versions]
    if run.get("read_stream_gb_s"):
        parts.append(f"read-only stream {run['read_stream_gb_s']:.0f} GB/s")
    parts += [f"commit {run['commit']}", run["date"]]
    return f"Measured by {'; '.join(parts)}."


# name of a block -> benchmark, whether a row belongs to it, and its table
TABLES: dict[str, tuple[str, Callable[[Row, str], bool], Callable[[list[Row], str], str]]] = {
    "summary": ("decode_attention", lambda row, part: True, tables.summary_table),
    "decode": (
        "decode_attention",
        lambda row, part: row["shape"] == part,
        tables.decode_table,
    ),
    "append": ("append", lambda row, part: True, lambda rows, part: tables.append_table(rows)),
    "prefill": ("prefill", lambda row, part: True, lambda rows, part: tables.prefill_table(rows)),
    "steps": (
        "end_to_end",
        lambda row, part: row["key"].startswith("step/"),
        lambda rows, part: tables.steps_table(rows),
    ),
    "onnx-cpu": (
        "onnx_cpu",
        lambda row, part: True,
        lambda rows, part: onnx_tables.cpu_table(rows),
    ),
    "onnx-gpu": (
        "onnx_gpu",
        lambda row, part: row["model"] == part,
        lambda rows, part: onnx_tables.gpu_table(rows),
    ),
    "largest": (
        "end_to_end",
        lambda row, part: row["key"].startswith("largest/"),
        tables.largest_table,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
