"""Prefill of one layer: ours over quantised pages, beside bfloat16 attention and a plain write.

    python benchmarks/prefill.py --json out/prefill.json
    python benchmarks/prefill.py --only 8k/ --quick

One sequence, 32 query heads, 8 KV heads, head_dim 128, bfloat16, causal. `8k` is a first prefill of
8192 tokens at once; `8k/2k` the same in chunks of 2048, each of which reads what was stored before.

Ours appends (rotates, quantises, packs, writes pages), gathers all stored tokens into dense K and
V, rotates q and attends over these: every query reads keys and values as later steps will. The
baselines write K and V to pages as they are, and attend over them as they were. A turn is one CUDA
graph.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import torch
from gpu_timing import time_calls
from prefill_ways import (
    SDPA,
    FlashAttention3Prefill,
    Inputs,
    OurPrefill,
    Part,
    SdpaPrefill,
    make_inputs,
)
from problems import DEVICE, NUM_KV_HEADS, SCALE
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    is_wanted,
)
from tables import prefill_table
from torch import Tensor

# name -> (tokens, tokens a chunk)
SHAPES = {
    "2k": (2048, 2048),
    "8k": (8192, 8192),
    "32k": (32768, 32768),
    "8k/2k": (8192, 2048),
    "32k/2k": (32768, 2048),
}
FORMAT_NAMES = ("bf16", "int8", "int4", "int2")
CHECKED_QUERIES = 8  # of the last chunk


def main() -> None:
    """Measure, write JSON, print a table."""
    options = parse_options()
    file = ResultFile(options.json, "prefill")
    file.start_run(describe_run(options))
    for shape in options.shapes.split(","):
        measure_shape(shape, file, options)
    print(prefill_table(file.this_run()))


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names of shapes")
    parser.add_argument("--page-size", type=int, default=64, help="tokens a page")
    return parser.parse_args()


def measure_shape(shape: str, file: ResultFile, options: argparse.Namespace) -> None:
    """Measure all rows of one shape; what fails becomes a row with an error."""
    inputs = make_inputs(*SHAPES[shape])
    makers = {
        f"{name} + write": functools.partial(SdpaPrefill, backend) for name, backend in SDPA.items()
    }
    makers["fa3 + write"] = FlashAttention3Prefill
    makers |= {f"ours-{name}": functools.partial(OurPrefill, name) for name in FORMAT_NAMES}
    for name, make in makers.items():
        key = f"{shape}/{name}"
        if not is_wanted(key, options.only):
            continue
        try:
            row = measure(make(inputs, options), inputs, options)
        except Exception as error:  # one library must not end the run
            row = {"error": first_line(error)}
        file.add(key, {"shape": shape, "name": name, **row})
        print(f"{key:28} {row.get('us', row.get('error'))}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()


def measure(prefill: Any, inputs: Inputs, options: argparse.Namespace) -> Row:
    """Time all parts together and each alone, and compare the output."""
    parts = prefill.parts()
    together = [part for step in zip(*parts.values(), strict=True) for part in step]
    timing = time_calls([lambda: run_all(together)], turns=options.turns)
    alone = {
        name: time_calls([lambda c=calls: run_all(c)], turns=10).median_us
        for name, calls in parts.items()
    }
    run_all(together)
    return {
        "us": timing.median_us,
        "us_low": timing.low_us,
        "us_high": timing.high_us,
        "turns": timing.turns,
        "captured": timing.captured,
        "parts_us": alone,
        "format_error": error_of(prefill.out, inputs),
        "config": {name: c._asdict() for name, c in prefill.chosen.items()},
    }


def run_all(calls: list[Part]) -> None:
    """Call everything in order."""
    for call in calls:
        call()


def error_of(out: Tensor, inputs: Inputs) -> float:
    """Return the relative 2-norm of the error of some of the last queries, against float64."""
    picked = torch.linspace(0, inputs.chunk - 1, CHECKED_QUERIES).long().to(DEVICE)
    first = inputs.length - inputs.chunk
    q = inputs.q[0][:, first + picked].double().unflatten(0, (NUM_KV_HEADS, -1))  # [Hk, G, n, D]
    k, v = inputs.k[0].double(), inputs.v[0].double()  # [Hk, T, D]
    scores = q @ k[:, None].transpose(-1, -2) * SCALE
    position = torch.arange(inputs.length, device=DEVICE)
    scores = scores.masked_fill(position > (first + picked)[:, None], float("-inf"))
    wanted = (torch.softmax(scores, -1) @ v[:, None]).flatten(0, 1)
    found = out[0][:, picked].double()
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
