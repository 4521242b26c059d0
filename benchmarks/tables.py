"""Tables of result files, as Markdown; nothing here needs a GPU or a model."""

from __future__ import annotations

from results import Row, format_table

OURS = "ours-"  # begins the names of our rows
PLAIN_WRITE = "plain bf16 write"  # what append is compared with
PLAIN_PREFILL = "sdpa-flash + write"  # what prefill is compared with

DECODE_HEADER = (
    "what", "bits", "us", "low", "high", "GB/s", "of stream", "vs bf16", "kernel err",
    "format err", "graph",
)  # fmt: skip


def decode_table(rows: list[Row], shape: str) -> str:
    """Return the table of one shape, quickest first; rows that failed come last."""
    best = best_bf16(rows, shape)
    here = [row for row in rows if row["shape"] == shape]
    done = sorted((row for row in here if "us" in row), key=lambda row: row["us"])
    lines = [
        (
            row["name"], f"{row['bits_per_value']:.2f}", f"{row['us']:.1f}",
            f"{row['us_low']:.1f}", f"{row['us_high']:.1f}", f"{row['gb_s']:.0f}",
            f"{row['stream_share']:.0%}", f"{best / row['us']:.2f}x" if best else None,
            row.get("kernel_error"), row["format_error"], "yes" if row["captured"] else "no",
        )
        for row in done
    ]  # fmt: skip
    lines += [(row["name"], *[None] * 9, row["error"]) for row in here if "error" in row]
    return format_table(DECODE_HEADER, lines)


def best_bf16(rows: list[Row], shape: str) -> float | None:
    """Return the time of the quickest 16-bit library but ours, in one run at one shape."""
    times = [
        row["us"]
        for row in rows
        if row["shape"] == shape
        and row.get("stored") == "bf16"
        and not is_ours(row)
        and "us" in row
    ]
    return min(times, default=None)


def is_ours(row: Row) -> bool:
    """Return whether a row is one of our kernels."""
    return row["name"].startswith(OURS)


APPEND_HEADER = ("sequences", "what", "us", "low", "high", "of the plain write")


def append_table(rows: list[Row]) -> str:
    """Return the table of all rows."""
    lines: list[tuple[object, ...]] = []
    for row in rows:
        if "error" in row:
            lines.append((row["batch_size"], row["name"], None, None, None, row["error"]))
            continue
        ratio = f"{row['us'] / row['plain_us']:.2f}"
        times = [f"{row[field]:.2f}" for field in ("us", "us_low", "us_high")]
        lines.append((row["batch_size"], row["name"], *times, ratio))
    return format_table(APPEND_HEADER, lines)


PREFILL_HEADER = (
    "shape",
    "what",
    "us",
    "low",
    "high",
    f"of {PLAIN_PREFILL}",
    "format err",
    "parts, us",
)


def prefill_table(rows: list[Row]) -> str:
    """Return the table of all rows."""
    base = {row["shape"]: row["us"] for row in rows if row["name"] == PLAIN_PREFILL and "us" in row}
    lines: list[tuple[object, ...]] = []
    for row in rows:
        if "error" in row:
            lines.append((row["shape"], row["name"], *[None] * 5, row["error"]))
            continue
        plain = base.get(row["shape"])
        times = [f"{row[field]:.0f}" for field in ("us", "us_low", "us_high")]
        parts = ", ".join(f"{name} {time:.0f}" for name, time in row["parts_us"].items())
        ratio = f"{row['us'] / plain:.3f}" if plain else None
        lines.append((row["shape"], row["name"], *times, ratio, row["format_error"], parts))
    return format_table(PREFILL_HEADER, lines)


STEPS_HEADER = (
    "what", "ms a step", "low", "high", "tokens/s", "weights GB", "cache GB", "floor ms",
    "times floor", "peak GB",
)  # fmt: skip


def steps_table(rows: list[Row]) -> str:
    """Return the table of decode steps."""
    lines: list[tuple[object, ...]] = [
        (
            row["name"].removeprefix("step/"), f"{row['step_ms']:.2f}", f"{row['step_ms_low']:.2f}",
            f"{row['step_ms_high']:.2f}", f"{row['tokens_per_s']:.0f}",
            f"{row['weight_bytes'] / 1e9:.1f}", f"{row['cache_bytes'] / 1e9:.1f}",
            f"{row['floor_ms']:.2f}", row["times_floor"], f"{row['peak_bytes'] / 1e9:.1f}",
        )
        for row in rows
        if "step_ms" in row
    ]  # fmt: skip
    lines += [
        (row["name"].removeprefix("step/"), *[None] * 8, row["error"])
        for row in rows
        if "error" in row
    ]
    return format_table(STEPS_HEADER, lines)


def largest_table(rows: list[Row], part: str) -> str:
    """Return the table of largest batches."""
    header = ("recipe", "tokens a row", "rows that fit", "MB a row", "weights GB", "budget GB")
    lines = [
        (
            row["recipe"], row["length"], row["largest_batch"], f"{row['row_bytes'] / 1e6:.0f}",
            f"{row['weight_bytes'] / 1e9:.1f}", f"{row['budget_bytes'] / 1e9:.1f}",
        )
        for row in rows
        if "largest_batch" in row
    ]  # fmt: skip
    return format_table(header, lines)


STORED = (("bf16",), ("fp8", "int8"), ("int4",))
SUMMARY = ("ours-bf16", "ours-int8", "ours-int4", "ours-int2")


def summary_table(rows: list[Row], part: str) -> str:
    """Return one line a shape: the best of others by what they store, then ours."""
    header = ("sequences x tokens", "best bf16", "best 8-bit", "best int4", *SUMMARY)
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape and "us" in row]
        others = [row for row in here if not is_ours(row)]
        cells = [best_of([r for r in others if r["stored"] in kinds]) for kinds in STORED]
        cells += [best_of([r for r in here if r["name"] == name]) for name in SUMMARY]
        lines.append((shape, *cells))
    return format_table(header, lines)


def best_of(rows: list[Row]) -> str | None:
    """Return the shortest time, and whose it is if not ours; None without rows."""
    if not rows:
        return None
    best = min(rows, key=lambda row: row["us"])
    name = "" if is_ours(best) else f" ({best['name']})"
    return f"{best['us']:.1f}{name}"
