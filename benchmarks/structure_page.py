"""Fill docs/structure.md from benchmarks/results/structure*.json.

    python benchmarks/structure_page.py            # the page
    python benchmarks/structure_page.py --check    # says whether it is up to date

Text is written by hand but for blocks: `<!-- table: NAME -->` to `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from performance_page import ROOT, Results, describe_source, read_results
from results import Row, format_table

PAGE = ROOT / "docs" / "structure.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MISSING = "Not measured yet.\n"
PLAIN = ("int8", "kv4", "kvx-4", "kvx-3", "kvx-2", "fibquant-1.5")  # rows without structure
SLACK = 1.05  # bytes that count as no more
HEADING = (
    "recipe", "bytes a token", "bits", "layers with a cache", "perplexity", "healed", "KL",
    "healed", "same token", "healed", "training, s", "note",
)  # fmt: skip


def main() -> int:
    """Rewrite the page, or compare it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = fill_page(old, read_results(RESULTS))
    if options.check:
        print("up to date" if new == old else "out of date", file=sys.stderr)
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def fill_page(page: str, results: Results) -> str:
    """Return the page with its blocks filled."""
    rows = rows_of(results)

    def fill(found: re.Match[str]) -> str:
        body = TABLES[found["name"]](rows, results) if rows else MISSING
        return f"{found[1]}{body}{found[4]}"

    return BLOCK.sub(fill, page)


def rows_of(results: Results) -> list[Row]:
    """Return the rows that were measured, by falling bytes."""
    file = results.get("structure")
    rows = [row for row in file["rows"] if "before" in row] if file else []
    return sorted(rows, key=lambda row: (-row["bytes_per_token"], row["name"]))


def quality_table(rows: Sequence[Row], results: Results) -> str:
    """Return the table of everything, and where its numbers come from."""
    source = rows[0]["before"]["reference_perplexity"]
    lines = [("source", None, 16, None, f"{source:.3f}", *[None] * 7)]
    lines += [_line(row) for row in rows]
    return f"{format_table(HEADING, lines)}\n\n{_sources(rows, results)}\n"


def _sources(rows: Sequence[Row], results: Results) -> str:
    """Return where rows come from; runs that differ in the rows they were asked for are one."""
    runs = results["structure"]["runs"]
    found: dict[str, str] = {}
    for run in (runs[index] for index in sorted({row["run"] for row in rows})):
        command = re.sub(r" --rows \S+", "", run["command"])
        line = describe_source({**run, "command": command})
        found.setdefault(line.removesuffix(f"{run['date']}."), line)
    return "\n\n".join(found.values())


def _line(row: Row) -> tuple[object, ...]:
    before, after = row["before"], row.get("after") or {}
    figures = (("perplexity", ".3f"), ("kl", ".4f"), ("top1_agreement", ".1%"))
    pairs = [
        None if part.get(name) is None else format(part[name], form)
        for name, form in figures
        for part in (before, after)
    ]
    size, bits = row["bytes_per_token"], row["bits_per_source_value"]
    seconds = row.get("healing_seconds")
    return (
        f"`{row['name']}`",
        f"{size:,.0f}".replace(",", " "),
        f"{bits:.2f}",
        row["owners"],
        *pairs,
        None if seconds is None else f"{seconds:.0f}",
        row.get("note"),
    )


def verdict(rows: Sequence[Row], results: Results) -> str:
    """Say for every row with structure whether quantisation of as few bytes does better."""
    plain = [row for row in rows if row["name"] in PLAIN]
    lines = []
    for row in rows:
        limit = SLACK * row["bytes_per_token"]
        rivals = [p for p in plain if p["bytes_per_token"] <= limit]
        if row in plain or not rivals:
            continue
        best = min(rivals, key=_kl)
        word = "loses to" if _kl(best) < _kl(row) else "beats"
        share = row["bytes_per_token"] / best["bytes_per_token"]
        lines.append(
            f"- `{row['name']}` {word} `{best['name']}`: KL {_kl(row):.4f} and {_kl(best):.4f}"
            f" nats, at {share:.1f} times its bytes."
        )
    unmatched = [
        f"`{row['name']}`"
        for row in rows
        if row not in plain
        and all(p["bytes_per_token"] > SLACK * row["bytes_per_token"] for p in plain)
    ]
    if unmatched:
        lines.append(f"- Nothing here without structure is as small as {', '.join(unmatched)}.")
    return "\n".join(lines) + "\n"


def _kl(row: Row) -> float:
    """Return the divergence of a row, after healing if it was healed."""
    kl: float = (row.get("after") or row["before"])["kl"]
    return kl


def training_table(rows: Sequence[Row], results: Results) -> str:
    """Return how rows were healed."""
    lines = []
    for row in rows:
        healing = row.get("healing")
        if healing:
            errors = [[layer[part] for layer in healing["layers"]] for part in ("before", "after")]
            means = [f"{sum(e) / len(e):.3f}" if e else None for e in errors]
            steps = f"{healing['steps_local']} + {healing['steps']}"
            size = f"{healing['batch_size']} x {healing['window']}"
            numbers = f"{healing['parameters'] / 1e6:.2f} M"
            lines.append((f"`{row['name']}`", numbers, steps, size, *means, *healing["notes"][:1]))
    header = ("recipe", "trained", "steps", "tokens", "attention error", "healed", "note")
    padded = [(*line, *[None] * (len(header) - len(line))) for line in lines]
    return f"{format_table(header, padded)}\n" if lines else MISSING


TABLES: dict[str, Callable[[Sequence[Row], Results], str]] = {
    "quality": quality_table,
    "verdict": verdict,
    "training": training_table,
}

if __name__ == "__main__":
    sys.exit(main())
