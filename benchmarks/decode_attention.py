"""Decode attention of one layer: ours in every format, beside other libraries, in one run.

    python benchmarks/decode_attention.py --json out/decode_attention.json
    python benchmarks/decode_attention.py --only 8x32k/ --quick
    python benchmarks/decode_attention.py --list

32 query heads, 8 KV heads, head_dim 128, one new token a sequence, bfloat16 queries and outputs;
ours over pages in random order, with the Hadamard of q in the kernel for integer formats. Caches of
at least 400 MB take turns, so that none is in L2; a turn is one CUDA graph. A row of the result is
`shape/what`, and `--only` takes parts of that.

Two errors, relative 2-norms over some sequences and heads: `kernel` against float64 attention over
the cache as it is stored, `format` against float64 attention over K and V as they were.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import Timing, copies_for, measure_read_stream, time_calls
from peers import PEERS, bits_per_value
from problems import MEASURED, SHAPES, Problem, checked_part, make_problem, relative_error
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    is_wanted,
)
from tables import OURS, decode_table

FORMAT_NAMES = ("bf16", "int8", "int4", "int2")
QUICK_CONFIGS = 2


def main() -> None:
    """Measure, write JSON, print tables."""
    options = parse_options()
    if options.list:
        print("\n".join(row_keys(options)))
        return
    file = ResultFile(options.json, "decode_attention")
    stream = measure_read_stream()
    file.start_run(describe_run(options, read_stream_gb_s=stream))
    print(f"read-only stream: {stream:.0f} GB/s", file=sys.stderr)
    for shape in options.shapes.split(","):
        measure_shape(shape, file, options)
    print_tables(file)


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--shapes", default=",".join(MEASURED), help="names of shapes")
    parser.add_argument("--formats", default=",".join(FORMAT_NAMES), help="formats of ours")
    parser.add_argument("--peers", default=",".join(PEERS), help="other libraries; may be empty")
    parser.add_argument("--page-size", type=int, default=64, help="tokens a page of ours")
    parser.add_argument("--list", action="store_true", help="print keys of rows and stop")
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        if shape not in SHAPES:
            parser.error(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
    return options


def row_keys(options: argparse.Namespace) -> list[str]:
    """Return the keys of the rows that the options ask for."""
    names = [name for name in options.peers.split(",") if name]
    names += [OURS + name for name in options.formats.split(",") if name]
    keys = [f"{shape}/{name}" for shape in options.shapes.split(",") for name in names]
    return [key for key in keys if is_wanted(key, options.only)]


def measure_shape(shape: str, file: ResultFile, options: argparse.Namespace) -> None:
    """Measure all rows of one shape; what fails becomes a row with an error."""
    keys = [key for key in row_keys(options) if key.startswith(f"{shape}/")]
    if not keys:
        return
    problem = make_problem(shape)
    stream = file.runs[-1]["read_stream_gb_s"]
    for key in keys:
        name = key.removeprefix(f"{shape}/")
        measure: Callable[..., Row] = measure_ours if name.startswith(OURS) else measure_peer
        try:
            row = measure(name.removeprefix(OURS), problem, options)
            row["stream_share"] = row["gb_s"] / stream
        except Exception as error:  # libraries raise anything, and one must not end the run
            row = {"error": first_line(error)}
        file.add(key, {"shape": shape, "name": name, **row})
        print(describe(key, row), file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def measure_peer(name: str, problem: Problem, options: argparse.Namespace) -> Row:
    """Measure one other library."""
    prepared = PEERS[name].prepare(problem)
    out = prepared.calls[0]().reshape(problem.q.shape)
    error = relative_error(checked_part(out, problem.checked_rows), problem.exact)
    timing = time_calls(prepared.calls, turns=options.turns)
    row = {
        "stored": PEERS[name].stored,
        "bits_per_value": bits_per_value(prepared, problem),
        "format_error": error,
        "note": prepared.note,
    }
    return row | timing_row(timing, prepared.cache_bytes)


def measure_ours(name: str, problem: Problem, options: argparse.Namespace) -> Row:
    """Measure one format of ours with the best of its launch parameters."""
    from caches import Decoder, attend_stored, fill

    filled = fill(name, problem, options.page_size)
    decoder = Decoder(filled, problem)
    copies = [filled.tensors] + [filled.copy() for _ in range(copies_for(filled.cache_bytes) - 1)]
    configs = decoder.module.CONFIGS[: QUICK_CONFIGS if options.quick else None]
    tried, failures = {}, {}
    for config in configs:
        try:
            tried[config] = time_calls(decoder.calls(copies, config), turns=20).median_us
        except Exception as error:  # one choice that does not compile must not hide the others
            failures[str(tuple(config))] = first_line(error)
    if not tried:
        raise RuntimeError(f"no launch parameters work: {next(iter(failures.values()))}")
    best = min(tried, key=tried.__getitem__)
    calls = decoder.calls(copies, best)
    decoder.out.fill_(float("nan"))
    out = checked_part(calls[0](), problem.checked_rows)
    row: dict[str, Any] = {
        "stored": name,
        "bits_per_value": filled.site.bytes_per_token * 8 / (2 * 8 * 128),
        "kernel_error": relative_error(out, attend_stored(filled, problem)),
        "format_error": relative_error(out, problem.exact),
        "layout": filled.site.layout,
        "page_size": options.page_size,
        "config": best._asdict(),
        "tried_us": {str(tuple(config)): time for config, time in tried.items()},
        "failed_configs": failures,
        "prepare_us": decoder.prepare_us(best),
    }
    timing = time_calls(calls, turns=options.turns)
    return row | timing_row(timing, filled.cache_bytes)


def timing_row(timing: Timing, cache_bytes: float) -> Row:
    """Return the fields that every row has."""
    return {
        "us": timing.median_us,
        "us_low": timing.low_us,
        "us_high": timing.high_us,
        "turns": timing.turns,
        "captured": timing.captured,
        "cache_bytes": cache_bytes,
        "gb_s": cache_bytes / timing.median_us / 1e3,
    }


def describe(key: str, row: Row) -> str:
    """Return one line for the terminal."""
    if "error" in row:
        return f"{key:26} {row['error']}"
    errors = [row.get(name) for name in ("kernel_error", "format_error")]
    shown = " ".join("-" if e is None else f"{e:.1e}" for e in errors)
    mark = "" if row["captured"] else "  (not captured)"
    return f"{key:26} {row['us']:8.1f} us {row['gb_s']:7.0f} GB/s  errors {shown}{mark}"


def print_tables(file: ResultFile) -> None:
    """Print one table a shape, of rows of this run."""
    rows = file.this_run()
    for shape in dict.fromkeys(row["shape"] for row in rows):
        print(f"\n{shape}, microseconds a layer and step\n\n{decode_table(rows, shape)}")


if __name__ == "__main__":
    main()
