"""Decode steps of ONNX packages on CUDA, beside our Triton kernels, in one run.

    python benchmarks/onnx_gpu.py --json out/onnx_gpu.json
    python benchmarks/onnx_gpu.py --models layer --shapes 8x32k --only l3,triton
    python benchmarks/onnx_gpu.py --tiny --models layer --shapes 2x64  # a test on the CPU

`layer` is one layer of the shape of Llama-3-8B (32 query heads, 8 KV heads, head_dim 128) with a
small vocabulary and seeded random weights; `smollm2` is the whole of SmolLM2-135M. All in float16.
Packages are exported first, and run by `OnnxSession`: past and present are bound to the same
memory, decode steps are a CUDA graph, and a session whose nodes would not all run on CUDA is
refused. Caches are not prefilled: they get random contents. A step decodes one token for each row,
picks the likeliest, and feeds it back; its time is that between two steps, host work included.
Shapes are rows x tokens that are cached before the first step.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import WARM_STEPS, time_steps
from llama import Step, free_memory, make_config, make_session_step, preload
from onnx_tables import gpu_table, parse_shape
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    is_wanted,
)
from transformers import LlamaForCausalLM

from kvxform.api import optimize_captured
from kvxform.capture import Captured, capture
from kvxform.onnx_options import Level, OnnxOptions
from kvxform.recipe import load_recipe
from kvxform.runtime.loading import move_program
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

VOCABULARY = 1024  # of the single layer, so that its head does not count
CONTEXT = 32768 + 256  # the longest shape, and the tokens that steps add
# Random tokens do, since what a step reads does not change its time.
CALIBRATION = {"tokens": 2048, "window": 256}
# name of a row -> recipe and emission level
PACKAGES: dict[str, tuple[str, Level]] = {
    "l1-fp16": ("onnx-fp16", "L1"),
    "l2-int4": ("kv4", "L2"),
    "l3-fp16": ("onnx-fp16", "L3"),
    "l3-int8": ("onnx-int8", "L3"),
    "l3-int4": ("onnx-int4", "L3"),
    "l4-fp16": ("onnx-fp16", "L4"),
    "l4-int8": ("onnx-paged-int8", "L4"),
    "l4-int4": ("onnx-int4", "L4"),
}
# name of a row -> recipe of our own kernels
KERNELS = {"triton-fp16": "exact", "triton-int8": "int8", "triton-int4": "kv4"}
SHAPES = {"layer": "1x8k,1x32k,8x8k,8x32k", "smollm2": "1x2k,8x2k,8x4k"}


class Bench:
    """One run.

    Args:
        options: The command line.
        file: Where rows go.
        folder: Where packages go.
    """

    def __init__(self, options: argparse.Namespace, file: ResultFile, folder: Path) -> None:
        self.options, self.file, self.folder = options, file, folder
        on_gpu = torch.cuda.is_available() and not options.tiny
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.steps = 12 if options.quick or options.tiny else max(options.turns, 50)

    def run(self) -> None:
        """Measure all rows that are asked for."""
        for model in self.options.models.split(","):
            shapes = (self.options.shapes or SHAPES[model]).split(",")
            names = [n for n in (*PACKAGES, *KERNELS) if is_wanted(n, self.options.only)]
            captured = self.capture(model)
            for name in names:
                self.measure_all(model, name, captured, shapes)

    def capture(self, model: str) -> Captured:
        """Return the program of a model."""
        if model == "smollm2":
            return capture(self.options.smollm2, dtype=torch.float16)
        config = make_config(tiny=self.options.tiny, context=CONTEXT)
        config.num_hidden_layers, config.vocab_size = 1, VOCABULARY
        torch.manual_seed(0)
        module = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        return capture(module.to(dtype), name="llama-3-8b-layer")

    def measure_all(self, model: str, name: str, captured: Captured, shapes: list[str]) -> None:
        """Measure one way of running a model at all shapes; it is made once."""
        make = self.make_package if name in PACKAGES else self.make_kernels
        try:
            steps: Callable[[int, int], tuple[Step, int]] = make(model, name, captured)
        except Exception as error:  # one way that cannot be made must not end the run
            for shape in shapes:
                self.add(model, shape, name, {"error": first_line(error)})
            return
        for shape in shapes:
            rows, tokens = parse_shape(shape)
            free_memory()
            try:
                row = self.measure(functools.partial(steps, rows, tokens), rows, tokens)
            except Exception as error:  # and one shape must not end the others
                row = {"error": first_line(error)}
            self.add(model, shape, name, row)

    def add(self, model: str, shape: str, name: str, row: Row) -> None:
        """Store a row and say it."""
        key = f"{model}/{shape}/{name}"
        self.file.add(key, {"model": model, "shape": shape, "name": name, **row})
        text = row.get("error") or f"{row['step_us']:9.1f} us  {row['tokens_per_s']:9.1f} tokens/s"
        print(f"{key:32} {text}", file=sys.stderr, flush=True)

    def make_package(
        self, model: str, name: str, captured: Captured
    ) -> Callable[[int, int], tuple[Step, int]]:
        """Export a package; return what makes a step of it."""
        recipe, level = PACKAGES[name]
        provider = "cuda" if self.device.type == "cuda" else "cpu"
        optimized = self.optimize(captured, recipe, "onnx")
        options = OnnxOptions(level=level, provider=provider, logits="last")
        folder = optimized.export_onnx(self.folder / f"{model}-{name}", options, verify="none")
        return functools.partial(self.package_step, folder)

    def package_step(self, folder: Path, rows: int, tokens: int) -> tuple[Step, int]:
        """Return a greedy decode step of a package, and bytes of its cache."""
        room = tokens + self.steps + WARM_STEPS + 1
        session = OnnxSession(folder, max_length=room)
        first = torch.ones(rows, 4, dtype=torch.int64)
        session.prefill(first)  # its planes tell names, dtypes and widths
        planes = {
            name: self.random_plane(plane, tokens) for name, plane in session.cache_planes().items()
        }
        session.replace_rows(planes, torch.ones(rows, tokens, dtype=torch.int64))
        del planes
        state = {"ids": torch.ones(rows, dtype=torch.int64)}

        def step() -> torch.Tensor:
            logits = session.decode(state["ids"])
            state["ids"] = logits.argmax(-1)
            return logits

        return step, session.cache_bytes()

    def random_plane(self, plane: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return a plane `[B, heads, tokens, width]` with random contents like those of `plane`."""
        shape = (*plane.shape[:2], tokens, plane.shape[3])
        if plane.is_floating_point():
            return torch.rand(shape, device=self.device).to(plane.dtype)
        limits = torch.iinfo(plane.dtype)
        return torch.randint(
            limits.min, limits.max + 1, shape, dtype=plane.dtype, device=self.device
        )

    def make_kernels(
        self, model: str, name: str, captured: Captured
    ) -> Callable[[int, int], tuple[Step, int]]:
        """Return what makes a step of our own kernels."""
        lowering = "triton" if self.device.type == "cuda" else "eager"
        optimized = self.optimize(captured, KERNELS[name], lowering)
        return functools.partial(self.kernel_step, optimized)

    def kernel_step(self, model: OptimizedModel, rows: int, tokens: int) -> tuple[Step, int]:
        """Return a greedy decode step of our own kernels, and bytes of the cache."""
        session = model.new_session(rows, tokens + self.steps + WARM_STEPS + 1)
        preload(session, rows, tokens)
        step = make_session_step(session, rows, model.program.info.vocab_size)
        return step, session.cache_bytes()

    def optimize(self, captured: Captured, recipe: str, lowering: str) -> OptimizedModel:
        """Return the program after a recipe; what is exported lies on the CPU."""
        data = load_recipe(recipe).to_data()
        target: dict[str, Any] = {"lowering": "eager" if lowering == "onnx" else lowering}
        if lowering == "triton":
            target["compile"] = True
        data["calibration"] = {**data.get("calibration", {}), **CALIBRATION}
        ids = torch.arange(CALIBRATION["tokens"]) * 7919 % VOCABULARY
        model = optimize_captured(
            captured,
            load_recipe({**data, "target": target}),
            calibration=ids,
            verify="none",
            place=self.device,
        )
        if lowering != "onnx":
            return model
        return OptimizedModel(move_program(model.program, torch.device("cpu")), recipe=model.recipe)

    def measure(self, make: Callable[[], tuple[Step, int]], rows: int, tokens: int) -> Row:
        """Return the row of one way of running a model at one shape."""
        free = self.free_bytes()
        start = time.monotonic()
        step, cache_bytes = make()
        finite = bool(step().isfinite().all())
        timing = time_steps(step, self.steps, self.device)
        return {
            "rows": rows,
            "tokens": tokens,
            "step_us": timing.median_us,
            "step_us_low": timing.low_us,
            "step_us_high": timing.high_us,
            "steps": timing.turns,
            "tokens_per_s": rows / timing.median_us * 1e6,
            "cache_bytes": cache_bytes,
            "device_bytes": free - self.free_bytes(),
            "finite": finite,
            "seconds": time.monotonic() - start,
        }

    def free_bytes(self) -> int:
        """Return free memory of the device."""
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0


def main() -> None:
    """Measure, write JSON, print tables."""
    options = parse_options()
    file = ResultFile(options.json, "onnx_gpu")
    run = describe_run(options)
    if "onnxruntime-gpu" in run["versions"]:
        run["versions"].pop("onnxruntime", None)  # another package, which is not the one imported
    file.start_run(run)
    with tempfile.TemporaryDirectory() as folder:
        Bench(options, file, Path(folder)).run()
    rows = file.this_run()
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n{model}\n\n{gpu_table([row for row in rows if row['model'] == model])}")


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--models", default="layer,smollm2", help="layer, smollm2")
    parser.add_argument("--shapes", default="", help="rows x tokens; those of the model by default")
    parser.add_argument("--smollm2", default="smollm2-135m", help="source of SmolLM2-135M")
    parser.add_argument("--tiny", action="store_true", help="a small layer, on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
