"""Append of one token a sequence: ours in every format, beside a plain bfloat16 write to pages.

    python benchmarks/append.py --json out/append.json
    python benchmarks/append.py --only 32/ --quick

8 KV heads, head_dim 128, K and V in one launch. A turn is one CUDA graph of 20 launches, one for
each layer of a model with 20, so the launch of the graph itself does not count; what is left is
mostly the launch of a kernel, which the row `nothing` shows. Each row takes turns with the plain
write, since clocks and launches vary by more than what is measured.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import torch
from gpu_timing import Call, time_calls, time_turn_about
from problems import DEVICE, HEAD_DIM, NUM_KV_HEADS, make_block_table
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    is_wanted,
)
from tables import PLAIN_WRITE, append_table
from torch import Tensor

LAYERS = 20
CACHED = 500  # tokens of the longest sequence
BATCH_SIZES = (1, 8, 32)
FORMAT_NAMES = ("bf16", "int8", "int4", "int2")
METHODS = ("oscar2", "turboquant4", "turboquant2", "fibquant2")  # always with a Hadamard
LAUNCH = "nothing"


def main() -> None:
    """Measure, write JSON, print a table."""
    options = parse_options()
    file = ResultFile(options.json, "append")
    file.start_run(describe_run(options))
    for batch_size in BATCH_SIZES:
        measure_batch(batch_size, file, options)
    print(append_table(file.this_run()))


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--page-size", type=int, default=64, help="tokens a page")
    return parser.parse_args()


def row_names() -> list[str]:
    """Return the names of rows, without their batch sizes."""
    ours = [f"ours-{name}" for name in FORMAT_NAMES]
    rotated = [f"ours-{name}-hadamard" for name in FORMAT_NAMES if name != "bf16"]
    methods = [f"ours-{name}-hadamard" for name in METHODS]
    return [LAUNCH, PLAIN_WRITE, *ours, *rotated, *methods]


def measure_batch(batch_size: int, file: ResultFile, options: argparse.Namespace) -> None:
    """Measure all rows of one batch size; what fails becomes a row with an error."""
    new = torch.randn(LAYERS, 2, batch_size, NUM_KV_HEADS, 1, HEAD_DIM, device=DEVICE).bfloat16()
    for name in row_names():
        key = f"{batch_size}/{name}"
        if not is_wanted(key, options.only):
            continue
        try:
            row = measure(name, new, options)
        except Exception as error:  # one format must not end the run
            row = {"error": first_line(error)}
        file.add(key, {"batch_size": batch_size, "name": name, **row})
        print(f"{key:28} {row.get('us', row.get('error'))}", file=sys.stderr, flush=True)


def measure(name: str, new: Tensor, options: argparse.Namespace) -> Row:
    """Measure one row; `new` is K and V of all layers, `[LAYERS, 2, B, Hk, 1, D]`."""
    batch_size = new.shape[2]
    lengths = tuple(CACHED - 7 * row for row in range(batch_size))
    table = make_block_table(tuple(n + 1 for n in lengths), options.page_size, first_page=1)
    num_pages, pages = int(table.max()) + 1, table.to(DEVICE)
    starts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    plain = plain_calls(new, num_pages, pages, starts, options.page_size)
    if name == LAUNCH:
        from plain_write import launch_nothing

        return timed([functools.partial(launch_nothing, starts)] * LAYERS, plain, options)
    if name == PLAIN_WRITE:
        return timed(plain, plain, options)
    return measure_ours(name, new, (num_pages, pages, starts), plain, options)


def plain_calls(
    new: Tensor, num_pages: int, pages: Tensor, starts: Tensor, page_size: int
) -> list[Call]:
    """Return the plain writes of all layers."""
    from plain_write import make_pages, write

    size = (num_pages, NUM_KV_HEADS, page_size, HEAD_DIM)
    return [functools.partial(write, k, v, make_pages(*size), pages, starts) for k, v in new]


def measure_ours(
    name: str,
    new: Tensor,
    where: tuple[int, Tensor, Tensor],
    plain: list[Call],
    options: argparse.Namespace,
) -> Row:
    """Measure one format of ours with the best of its launch parameters."""
    from caches import FORMATS, make_cache, make_tensors, module_of, row_options

    from kvxform.codegen.triton.spec import AppendSpec

    num_pages, pages, starts = where
    _, kind, *rotated = name.split("-")
    site = FORMATS[kind].site(options.page_size, new.dtype)
    module = module_of(AppendSpec(site, key_block=HEAD_DIM if rotated else 0))
    size = (num_pages, len(starts))
    caches = [make_cache(module, make_tensors(site, *size)) for _ in range(LAYERS)]
    counts, rows = torch.ones_like(starts), row_options(site, len(starts))

    def append(k: Tensor, v: Tensor, cache: Any, config: Any) -> None:
        module.append(k, v, cache, pages, starts, counts, **rows, config=config)

    def calls(config: Any) -> list[Call]:
        return [
            functools.partial(append, k, v, cache, config)
            for (k, v), cache in zip(new, caches, strict=True)
        ]

    configs = module.CONFIGS[: 2 if options.quick else None]
    times = {config: time_calls(calls(config), turns=20).median_us for config in configs}
    best = min(times, key=times.__getitem__)
    return {
        "layout": site.layout,
        "config": best._asdict(),
        "tried_us": {str(tuple(config)): time for config, time in times.items()},
        **timed(calls(best), plain, options),
    }


def timed(calls: list[Call], plain: list[Call], options: argparse.Namespace) -> Row:
    """Time a graph of all layers, turn about with one of plain writes."""
    timing, beside = time_turn_about([calls, plain], turns=options.turns, warm_turns=20)
    return {
        "us": timing.median_us,
        "us_low": timing.low_us,
        "us_high": timing.high_us,
        "plain_us": beside.median_us,
        "turns": timing.turns,
        "captured": timing.captured,
    }


if __name__ == "__main__":
    main()
