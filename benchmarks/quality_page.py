"""Fill docs/quality.md, the plot and the method pages from benchmarks/results/quality.json.

    python benchmarks/quality_page.py            # pages, and the plot if matplotlib is there
    python benchmarks/quality_page.py --check    # says whether pages are up to date

Text is written by hand but for blocks: `<!-- table: NAME -->` to `<!-- end -->` in docs/quality.md,
and `<!-- measured -->` to `<!-- /measured -->` in docs/methods/*.md. A method page gets the rows of
the recipes that it names in backquotes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from performance_page import ROOT, Results, describe_source, read_results
from results import Row, format_table

from kvxform.evaluate.plotting import draw_quality
from kvxform.evaluate.tables import HEADINGS, change, order, table_rows

PAGE = ROOT / "docs" / "quality.md"
METHODS = ROOT / "docs" / "methods"
PLOT = ROOT / "docs" / "images" / "quality.svg"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MEASURED = re.compile(r"(<!-- measured -->\n)(.*?)(<!-- /measured -->)", re.DOTALL)
MISSING = "Not measured yet.\n"
OWN = ("kvx-",)


def main() -> int:
    """Rewrite the pages, or compare them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    results = read_results(options.results)
    stale = [path for path, new in fill_all(results).items() if new != read(path)]
    if options.check:
        print(f"out of date: {[str(path) for path in stale]}" if stale else "up to date")
        return int(bool(stale))
    for path in stale:
        path.write_text(fill_all(results)[path], encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    if rows_of(results):
        draw_quality(rows_of(results), PLOT, highlight=OWN)
    return 0


def read(path: Path) -> str:
    """Return the text of a page."""
    return path.read_text(encoding="utf-8")


def fill_all(results: Results) -> dict[Path, str]:
    """Return all pages filled anew."""
    pages = {PAGE: fill_page(read(PAGE), results)}
    methods = sorted(METHODS.glob("*.md")) if METHODS.is_dir() else []
    return pages | {path: fill_method(read(path), results) for path in methods}


def rows_of(results: Results, benchmark: str = "quality") -> list[Row]:
    """Return the rows that were measured, the source first, then by falling bits."""
    file = results.get(benchmark)
    rows = [row for row in file["rows"] if "footprint" in row] if file else []
    return sorted(rows, key=order)


def fill_page(page: str, results: Results) -> str:
    """Return docs/quality.md with its blocks filled."""
    rows = rows_of(results)

    def fill(found: re.Match[str]) -> str:
        body = TABLES[found["name"]](rows, results) if rows else MISSING
        return f"{found[1]}{body}{found[4]}"

    return BLOCK.sub(fill, page)


def fill_method(page: str, results: Results) -> str:
    """Return a method page with the rows of the recipes that it names."""
    named = set(re.findall(r"`([\w.-]+)`", page))
    rows = [row for row in rows_of(results) if row["name"] in named]
    body = method_table(rows) if rows else MISSING
    return MEASURED.sub(lambda found: f"{found[1]}{body}{found[3]}", page)


def summary_table(rows: Sequence[Row], results: Results) -> str:
    """Return the table of everything, and where its numbers come from."""
    return f"{format_table(HEADINGS, table_rows(rows))}\n\n{sources(rows, results)}"


def method_table(rows: Sequence[Row]) -> str:
    """Return the table of a method page: fewer columns."""
    columns = [HEADINGS.index(name) for name in METHOD_COLUMNS]
    cells = [[line[i] for i in columns] for line in table_rows(rows)]
    return f"{format_table(METHOD_COLUMNS, cells)}\n\nMeasured as in [quality.md](../quality.md).\n"


METHOD_COLUMNS = (
    "format", "bits", "bits at 1k", "perplexity", "change", "KL", "attention", "passkey",
)  # fmt: skip


def passkey_table(rows: Sequence[Row], results: Results) -> str:
    """Return found numbers of the longest prompts by depth; a cell is the share, and nats."""
    lengths = sorted({p["length"] for row in rows for p in row.get("passkeys") or ()})
    depths = sorted({d for row in rows for p in row.get("passkeys") or () for d in p["depths"]})
    if not lengths:
        return MISSING
    length = lengths[-1]
    lines = []
    for row in rows:
        for passkey in row.get("passkeys") or ():
            if passkey["length"] == length:
                cells = zip(passkey["found"], passkey["nll"], strict=True)
                by_depth = [f"{share:.0%} ({nats:.2f})" for share, nats in cells]
                digits = sum(passkey["chosen"]) / len(passkey["chosen"])
                lines.append((row["name"], f"{passkey['rate']:.0%}", f"{digits:.0%}", *by_depth))
    places = (f"{depth:.0%}" for depth in depths)
    header = (f"{length} tokens", "found", "digits", *places)
    return f"{format_table(header, lines)}\n"


def retrieval_list(rows: Sequence[Row], results: Results) -> str:
    """Return which formats keep retrieval in the longest prompts, which break, which are open."""
    found = [p | {"name": row["name"]} for row in rows for p in row.get("passkeys") or ()]
    if not found:
        return MISSING
    length = max(one["length"] for one in found)
    groups: dict[str, list[str]] = {words: [] for _, words in RETRIEVAL}
    for one in (one for one in found if one["length"] == length and one["name"] != "source"):
        words = next(words for least, words in RETRIEVAL if one["rate"] >= least)
        groups[words].append(f"`{one['name']}` ({one['rate']:.0%})")
    measured = {one["name"] for one in found if one["length"] == length}
    groups["Not measured"] = [f"`{r['name']}`" for r in rows if r["name"] not in measured]
    return "".join(f"- {words}: {', '.join(names) or 'none'}.\n" for words, names in groups.items())


RETRIEVAL = (
    (0.95, "They keep it, 95 % or more"),
    (0.5, "They lose a part, 50 % to 94 %"),
    (0.0, "They break, less than half is found"),
)


def encode_table(rows: Sequence[Row], results: Results) -> str:
    """Return seconds of building tables and tokens per second of encoding."""
    lines = []
    for row in rows:
        cost = row.get("encoding")
        if cost:
            gpu = cost["gpu_tokens_per_s"]
            device = None if gpu is None else f"{gpu:.0f}"
            built = f"{cost['build_s']:.2f}"
            lines.append((row["name"], built, f"{cost['cpu_tokens_per_s']:.0f}", device))
    if not lines:
        return MISSING
    header = ("format", "tables, seconds", "tokens a second, CPU", "GPU")
    return f"{format_table(header, lines)}\n"


def decode_table(rows: Sequence[Row], results: Results) -> str:
    """Return both protocols over the tokens of protocol `decode`, where there are both."""
    lines = [
        (
            row["name"],
            str(row["decode"]["window"]),
            f"{row['decode']['perplexity']:.3f}",
            f"{change(row['decode']):+.2%}",
            f"{row['decode']['kl']:.4f}",
            f"{row['decode']['top1_agreement']:.1%}",
        )
        for row in rows
        if row.get("decode")
    ]
    if not lines:
        return MISSING
    header = ("format", "tokens", "perplexity", "change", "KL", "top-1")
    return f"{format_table(header, lines)}\n"


def transfer_table(rows: Sequence[Row], results: Results) -> str:
    """Return changes of perplexity with statistics of another text beside those of the table."""
    usual = {row["name"]: change(row.get("prefill")) for row in rows}
    moved = rows_of(results, "transfer")
    lines = [
        (row["name"], f"{usual[row['name']]:+.2%}", f"{change(row['prefill']):+.2%}")
        for row in moved
        if row["footprint"] and row.get("prefill") and usual.get(row["name"]) is not None
    ]
    if not lines:
        return MISSING
    header = ("format", "statistics of WikiText-2 valid", "of help topics of Python")
    return f"{format_table(header, lines)}\n\n{sources(moved, results, 'transfer')}"


def sources(rows: Sequence[Row], results: Results, benchmark: str = "quality") -> str:
    """Return one line for each state of machine and code that rows come from.

    Runs have long lists of rows in their commands; the result file has them.
    """
    runs = results[benchmark]["runs"]
    used = sorted({number for row in rows for number in row["made_by"].values()})
    command = f"python benchmarks/quality.py --json benchmarks/results/{benchmark}.json"
    states = {(run["device"], run["commit"]): run for run in (runs[i] for i in reversed(used))}
    lines = [describe_source({**run, "command": command}) for run in reversed(states.values())]
    return "".join(f"{line}\n" for line in lines)


TABLES: dict[str, Callable[[Sequence[Row], Results], str]] = {
    "summary": summary_table,
    "passkey": passkey_table,
    "retrieval": retrieval_list,
    "encode": encode_table,
    "decode": decode_table,
    "transfer": transfer_table,
}


if __name__ == "__main__":
    sys.exit(main())
