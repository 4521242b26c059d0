"""Decode of a model of the shape of Llama-3-8B: tokens a second, memory, and the largest batch.

    python benchmarks/end_to_end.py --json out/end_to_end.json
    python benchmarks/end_to_end.py --only step/kv4,step/exact --quick
    python benchmarks/end_to_end.py --capture-only  # on any machine; later runs find the graph
    python benchmarks/end_to_end.py --tiny --lowering eager --budget-gb 0.001 --length 600  # a test

Weights are random, seeded, in bfloat16, and made on the device. The graph is captured on the CPU
from a model whose layers share one set of weights, and kept in kvxform's cache folder. Caches are
not prefilled with all their tokens: 512 tokens a row are, and their pages are copied to the others.
A step decodes one token for each row through `Session.decode`, picks the likeliest, and feeds it
back; its time is that between two steps, host work included. The baseline is transformers' static
cache with `torch.compile(mode="reduce-overhead", fullgraph=True)`.

The goal of a step is 1.18 times the bytes that it must read (weights and cache) over the rate of a
read-only stream measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import WARM_STEPS, measure_read_stream, peak_bytes, time_steps
from llama import (
    Step,
    fill_weights,
    free_memory,
    make_config,
    make_huggingface_step,
    make_model,
    make_session_step,
    make_shared_model,
    preload,
    read_weight_bytes,
)
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    is_wanted,
)
from tables import steps_table

from kvxform.capture import capture
from kvxform.ir.capture_cache import load_capture, save_capture
from kvxform.ir.program import Program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.runtime.model import OptimizedModel

GOAL = 1.18
# name of a row -> recipe, with passes added to it, and options of its target
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "int8": ("int8", {}),
    "kv4": ("kv4", {}),
    "exact-compiled": ("exact", {"compile": True}),
    "int8-compiled": ("int8", {"compile": True}),
    "kv4-compiled": ("kv4", {"compile": True}),
    "exact-fused": ("exact+fuse-projections", {"compile": True}),
    "int8-fused": ("int8+fuse-projections", {"compile": True}),
    "kv4-fused": ("kv4+fuse-projections", {"compile": True}),
}
HUGGINGFACE = "step/huggingface-static"
LARGEST = ("exact", "kv4")


def main() -> None:
    """Measure, write JSON, print a table."""
    options = parse_options()
    if options.capture_only:
        find_program(options)
        return
    file = ResultFile(options.json, "end_to_end")
    on_gpu = options.device.type == "cuda"
    stream = measure_read_stream() if on_gpu else None
    file.start_run(describe_run(options, read_stream_gb_s=stream))
    bench = Bench(options, file, stream)
    bench.run()
    print_table(file)


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=32768, help="cached tokens at the end")
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    parser.add_argument("--lowering", default="triton", choices=("triton", "eager"))
    parser.add_argument("--budget-gb", type=float, help="memory for `largest`; all by default")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--capture-only", action="store_true", help="keep the graph, then end")
    return parser.parse_args()


def find_program(options: argparse.Namespace) -> Program:
    """Return the program of the model, without weights: from the cache folder, else captured."""
    name = f"llama-{'tiny' if options.tiny else '3-8b'}-shape-{options.length}"
    program = load_capture(name)
    if program is None:
        config = make_config(tiny=options.tiny, context=options.length)
        save_capture(name, capture(make_shared_model(config), name=name).program)
        program = load_capture(name)
    assert program is not None, "the cache folder can be written"
    return program


def extended_recipe(name: str) -> Recipe:
    """Return a bundled recipe, with more passes at its end: `kv4+fuse-projections`."""
    base, *passes = name.split("+")
    data = load_recipe(base).to_data()
    return load_recipe({**data, "passes": [*data["passes"], *passes]})


def row_keys(only: str) -> list[str]:
    """Return the keys of rows that `--only` asks for."""
    keys = [HUGGINGFACE, *(f"step/{name}" for name in STEPS), *(f"largest/{n}" for n in LARGEST)]
    return [key for key in keys if is_wanted(key, only)]


class Bench:
    """One run.

    Args:
        options: The command line.
        file: Where rows go.
        stream: GB/s of the read-only stream, or None where it is unknown.
    """

    def __init__(self, options: argparse.Namespace, file: ResultFile, stream: float | None) -> None:
        self.options, self.file, self.stream = options, file, stream
        self.keys = row_keys(options.only)
        self.steps = 16 if options.quick else max(options.turns, 50)
        self.room = self.steps + WARM_STEPS

    def run(self) -> None:
        """Measure all rows that are asked for."""
        config = make_config(tiny=self.options.tiny, context=self.options.length)
        start = time.monotonic()
        if HUGGINGFACE in self.keys:
            model: Any = make_model(config, self.options.device)
            self.tell(f"model made, {time.monotonic() - start:.0f} s")
            self.measure(HUGGINGFACE, functools.partial(self.huggingface, model))
            del model
            free_memory()
        recipes = self.wanted_recipes()
        base = self.captured() if recipes else None
        for recipe in recipes:
            assert base is not None
            self.program = self.rewritten(base, recipe)
            for name, (source, target) in STEPS.items():
                if source == recipe and f"step/{name}" in self.keys:
                    self.measure(f"step/{name}", lambda r=recipe, t=target: self.step(r, t))
            if f"largest/{recipe}" in self.keys:
                self.measure(f"largest/{recipe}", lambda r=recipe: self.largest(r))
            del self.program
            free_memory()

    def wanted_recipes(self) -> list[str]:
        """Return the recipes that rows need, each once."""
        wanted = [source for name, (source, _) in STEPS.items() if f"step/{name}" in self.keys]
        wanted += [name for name in LARGEST if f"largest/{name}" in self.keys]
        return list(dict.fromkeys(wanted))

    def measure(self, key: str, function: Callable[[], Row]) -> None:
        """Add a row; what fails becomes a row with an error."""
        free_memory()
        start = time.monotonic()
        try:
            row = function()
        except Exception as error:  # one configuration must not end the run
            row = {"error": first_line(error)}
        row["seconds"] = time.monotonic() - start
        self.file.add(key, {"name": key, **row})
        self.tell(describe(key, row))

    def tell(self, text: str) -> None:
        """Say something on stderr."""
        print(text, file=sys.stderr, flush=True)

    def captured(self) -> Program:
        """Return the captured program; its large weights have no values yet."""
        start = time.monotonic()
        program = find_program(self.options)
        self.tell(f"program found, {time.monotonic() - start:.0f} s")
        return program

    def rewritten(self, base: Program, recipe: str) -> Program:
        """Return the program of a recipe, on the device."""
        start = time.monotonic()
        program = fill_weights(base, self.options.device)
        loaded = extended_recipe(recipe)
        program, _ = run_pipeline(program, loaded, executor=OptimizedModel, verify="none")
        self.tell(f"{recipe} applied, {time.monotonic() - start:.0f} s")
        return program

    def optimized(self, recipe: str, target: dict[str, Any]) -> OptimizedModel:
        """Return the runnable model of the present program."""
        is_triton = self.options.lowering == "triton"
        chosen = {"lowering": "triton", **target} if is_triton else {"lowering": "eager"}
        loaded = load_recipe({**extended_recipe(recipe).to_data(), "target": chosen})
        return OptimizedModel(self.program, recipe=loaded)

    def huggingface(self, model: Any) -> Row:
        """Measure transformers."""
        batch_size, start = self.options.batch_size, self.options.length - self.room
        on_gpu = self.options.device.type == "cuda"
        step, cache_bytes = make_huggingface_step(
            model, batch_size, start, self.room, compiled=on_gpu
        )
        weights = read_weight_bytes(list(model.named_parameters()))
        return self.timed(step, batch_size, weights, cache_bytes)

    def step(self, recipe: str, target: dict[str, Any]) -> Row:
        """Measure steps of one recipe."""
        batch_size, length = self.options.batch_size, self.options.length
        model = self.optimized(recipe, target)
        session = model.new_session(batch_size, length)
        preload(session, batch_size, length - self.room)
        step = make_session_step(session, batch_size, self.program.info.vocab_size)
        plan = self.program.plan
        assert plan is not None
        cache_bytes = plan.read_bytes_per_step(batch_size, length - self.room // 2)
        weights = read_weight_bytes(list(self.program.weights.items()))
        return {
            "recipe": recipe,
            "target": target,
            "bits_per_value": plan.bits_per_value,
            **self.timed(step, batch_size, weights, cache_bytes),
        }

    def timed(self, step: Step, batch_size: int, weight_bytes: int, cache_bytes: float) -> Row:
        """Take and time steps."""
        timing = time_steps(step, self.steps, self.options.device)
        rate = self.stream or float("inf")
        floor_ms = (weight_bytes + cache_bytes) / rate / 1e6
        return {
            "batch_size": batch_size,
            "length": self.options.length,
            "step_ms": timing.median_us / 1e3,
            "step_ms_low": timing.low_us / 1e3,
            "step_ms_high": timing.high_us / 1e3,
            "steps": timing.turns,
            "tokens_per_s": batch_size / timing.median_us * 1e6,
            "weight_bytes": weight_bytes,
            "cache_bytes": cache_bytes,
            "floor_ms": floor_ms,
            "times_floor": timing.median_us / 1e3 / floor_ms if floor_ms else None,
            "goal": GOAL,
            "peak_bytes": peak_bytes(self.options.device),
        }

    def largest(self, recipe: str) -> Row:
        """Find the largest batch that decodes a step at full length within the budget."""
        length = self.options.length
        plan = self.program.plan
        assert plan is not None
        budget = self.budget()
        weights = sum(w.nbytes for w in self.program.weights.values())
        row_bytes = plan.bytes_at([length], length)
        tried: dict[int, str] = {}
        guess = max(1, (budget - weights) // row_bytes)
        while guess > 0 and tried.get(guess) is None:
            tried[guess] = outcome = self.fits(recipe, guess, budget)
            self.tell(f"largest/{recipe}: {guess} rows: {outcome}")
            if outcome == "fits" and guess + 1 in tried:
                break
            guess += 1 if outcome == "fits" else -1
        return {
            "recipe": recipe,
            "length": length,
            "budget_bytes": budget,
            "weight_bytes": weights,
            "row_bytes": row_bytes,
            "largest_batch": max((n for n, o in tried.items() if o == "fits"), default=0),
            "tried": {str(n): outcome for n, outcome in sorted(tried.items())},
        }

    def budget(self) -> int:
        """Return the bytes that `largest` may use."""
        if self.options.budget_gb is not None:
            return int(self.options.budget_gb * 1e9)
        if self.options.device.type != "cuda":
            raise ValueError("--budget-gb is needed where there is no GPU")
        return torch.cuda.get_device_properties(0).total_memory

    def fits(self, recipe: str, batch_size: int, budget: int) -> str:
        """Return `fits` if a step with so many rows works, or why not."""
        free_memory()
        try:
            model = self.optimized(recipe, {})
            session = model.new_session(batch_size, self.options.length)
            preload(session, batch_size, self.options.length - 1)
            step = make_session_step(session, batch_size, self.program.info.vocab_size)
            finite = bool(step().isfinite().all())
        except RuntimeError as error:  # cuBLAS and CUDA graphs have errors of their own for it
            text = str(error)
            if "out of memory" not in text and "ALLOC_FAILED" not in text:
                raise
            return "out of memory"
        weights = sum(w.nbytes for w in self.program.weights.values())
        peak = max(peak_bytes(self.options.device), session.cache_bytes() + weights)
        if peak > budget:
            return f"{peak / 1e9:.1f} GB"
        return "fits" if finite else "logits are not finite"


def describe(key: str, row: Row) -> str:
    """Return one line for the terminal."""
    if "error" in row:
        return f"{key:26} {row['error']}"
    if "largest_batch" in row:
        return f"{key:26} {row['largest_batch']} rows"
    return f"{key:26} {row['step_ms']:8.2f} ms  {row['tokens_per_s']:8.1f} tokens/s"


def print_table(file: ResultFile) -> None:
    """Print the rows of this run."""
    rows = file.this_run()
    print(steps_table(rows))
    for row in rows:
        if "largest_batch" in row:
            print(f"{row['name']}: {row['largest_batch']} rows of {row['length']} tokens")
        elif "error" in row:
            print(f"{row['name']}: {row['error']}")


if __name__ == "__main__":
    main()
