r"""Structure passes on SmolLM2-135M, before and after healing, beside plain quantisation.

    python benchmarks/structure.py --text wikitext2/test.txt --calibration wikitext2/valid.txt \
        --device cuda --json benchmarks/results/structure.json
    python benchmarks/structure.py --rows cla2 --steps 50 --json ...  # some rows; others stay
    python benchmarks/structure_page.py                               # docs/structure.md

Statistics, searches and training read the calibration text alone. Rows are measured on the other
text, in one prefill a window, with the cache and its codecs as they are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quality import public_command
from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_run,
    first_line,
    format_table,
    is_wanted,
)
from torch import Tensor

from kvxform.calibrate import make_calibration
from kvxform.capture import capture
from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import Remembered, SessionRunner
from kvxform.healing.healer import heal_program
from kvxform.healing.options import HealOptions
from kvxform.healing.parameters import trainable
from kvxform.ir.calibration import Calibration
from kvxform.ir.program import Program
from kvxform.order import plan_passes
from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.runtime.loading import move_program
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
BENCHMARK = "structure"
# Rows: a bundled recipe, and options of its passes that are other ones here.
ROWS: dict[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
    "int8": ("int8", {}),
    "kv4": ("kv4", {}),
    "kvx-4": ("kvx-4", {}),
    "kvx-3": ("kvx-3", {}),
    "kvx-2": ("kvx-2", {}),
    "fibquant-1.5": ("fibquant-1.5", {}),
    "kvsharer-10": ("kvsharer-25", {"share-kv-layers": {"share": 0.1}}),
    "kvsharer-25": ("kvsharer-25", {}),
    "cla2": ("cla2", {}),
    "gqa-half": ("gqa-half", {}),
    "gqa-svd-half": ("gqa-svd-half", {}),
    "gqa-svd-half-commuting": ("gqa-svd-half", {"merge-kv-heads": {"rope": "commuting"}}),
    "cskv-50": ("cskv-50", {}),
    "minicache": ("minicache", {}),
    "looped": ("looped", {}),
    "cskv-80-int4": ("cskv-80-int4", {}),
    "cla2-kv4": ("cla2-kv4", {}),
    "kvsharer-25-kv4": ("kvsharer-25-kv4", {}),
    "gqa-svd-half-kv4": ("gqa-svd-half-kv4", {}),
}

# Rows without a codec are stored in 16 bits, as a served model stores them.
HALF = {"codec": "none", "dtype": "float16"}
PLAIN = (
    "kvsharer-10",
    "kvsharer-25",
    "cla2",
    "gqa-half",
    "gqa-svd-half",
    "gqa-svd-half-commuting",
    "looped",
)


def main() -> None:
    """Measure the rows that are asked for."""
    options = parse_options()
    book = ResultFile(options.json, BENCHMARK)
    book.start_run({**describe_run(options), "command": public_command(sys.argv)})
    bench = Bench(options)
    end = time.monotonic() + options.seconds
    chosen = options.rows.split(",") if options.rows else list(ROWS)
    for name in (name for name in chosen if is_wanted(name, options.only)):
        if time.monotonic() > end:
            break
        try:
            row = bench.measure(name, end)
        except Exception as error:  # other rows are worth having
            traceback.print_exc()
            row = {"error": first_line(error)}
        book.add(name, {"name": name, **row})
        say(f"{name}: {row.get('after') or row.get('before') or row}")
    print_rows(book.this_run())


def print_rows(rows: Sequence[Row]) -> None:
    """Print bytes, perplexity and divergence of rows, before and after healing."""
    cells = []
    for row in rows:
        parts = [row.get(part) or {} for part in ("before", "after")]
        figures = [part.get(name) for name in ("perplexity", "kl") for part in parts]
        start = (row["name"], row.get("bytes_per_token"))
        cells.append((*start, *figures, row.get("healing_seconds"), row.get("error")))
    heading = ("name", "bytes/token", "ppl", "healed", "KL", "healed", "seconds", "error")
    print(format_table(heading, cells))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rows", default="", help="names with commas between; default: all")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: that of the model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--calibration", type=Path, help="text to train on; likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--no-healing", action="store_true", help="measure before healing alone")
    parser.add_argument("--steps-local", type=int, default=60)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--lora", type=int)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after that")
    return parser.parse_args()


def recipe_of(name: str) -> Recipe:
    """Return the recipe of a row."""
    base, changes = ROWS[name]
    data = copy.deepcopy(load_recipe(base).to_data())
    for step in data["passes"]:
        for pass_name, options in changes.items():
            if pass_name in step:
                step[pass_name] = {**step[pass_name], **options}
    if name in PLAIN:
        data["passes"].append({"quantize-kv": {"key": HALF, "value": HALF}})
    return load_recipe({**data, "name": name})


class Bench:
    """The source model, captured once, with its two texts.

    Args:
        options: Those of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._device = options, torch.device(options.device)
        torch.set_float32_matmul_precision("high")  # not where models are measured
        program = capture(options.model).program
        path = options.tokenizer or program.info.tokenizer_path
        tokenizer = load_tokenizer(path)
        info = dataclasses.replace(program.info, tokenizer_path=str(path))
        self._program = dataclasses.replace(program, info=info)
        self._source = move_program(self._program, self._device)
        self._train = encode_text(tokenizer, read_text(options.calibration))
        self._test = encode_text(tokenizer, read_text(options.text))
        window = options.window
        self._reference = Remembered(SessionRunner(OptimizedModel(self._source), window))
        self._calibrations: dict[tuple[object, ...], Calibration] = {}
        say("ready")

    def measure(self, name: str, end: float) -> Row:
        """Return the row of one recipe."""
        start, recipe = time.perf_counter(), recipe_of(name)
        program, report = run_pipeline(
            self._program,
            recipe,
            executor=OptimizedModel,
            verify="none",
            calibration=self._calibration_for(recipe),
        )
        assert report.plan is not None, "every recipe makes a cache"
        seconds = time.perf_counter() - start
        program = move_program(program, self._device)
        values = self._program_values()
        row: Row = {
            "bytes_per_token": report.plan.kv_bytes_per_token,
            "bits_per_source_value": 8 * report.plan.kv_bytes_per_token / values,
            "owners": len(report.layers),
            "optimize_seconds": round(seconds, 1),
            "before": self._quality(program),
        }
        heals = trainable(program) and not self._options.no_healing
        if heals and time.monotonic() < end:
            row |= self._healed(program)
        return row

    def _calibration_for(self, recipe: Recipe) -> Calibration:
        """Return the statistics that a recipe asks for, collected on the device."""
        steps = plan_passes(recipe.passes, self._program.facts, auto_order=recipe.auto_order)
        fisher = any(step.graph_pass.needs_fisher for step in steps)
        wanted = recipe.calibration
        key = (wanted.tokens, wanted.window, wanted.seed, fisher)
        if key not in self._calibrations:
            self._calibrations[key] = make_calibration(
                self._source,
                self._options.calibration,
                tokens=wanted.tokens,
                window=wanted.window,
                seed=wanted.seed,
                fisher=fisher,
            )
        return self._calibrations[key]

    def _healed(self, program: Program) -> Row:
        options = self._options
        wanted = HealOptions(
            steps_local=options.steps_local,
            steps=options.steps,
            learning_rate=options.lr,
            rank=options.lora,
            batch_size=options.batch_size,
        )
        start = time.perf_counter()
        healed, record = heal_program(
            program, self._source, self._train, wanted, text="calibration text", talk=say
        )
        seconds = time.perf_counter() - start
        return {
            "healing_seconds": round(seconds, 1),
            "healing": dataclasses.asdict(record),
            "after": self._quality(healed),
        }

    def _quality(self, program: Program) -> Row:
        """Return perplexity, divergence and agreement on the test text, in full precision."""
        torch.set_float32_matmul_precision("highest")
        try:
            return _measure(program, self._reference, self._test, self._options)
        finally:
            torch.set_float32_matmul_precision("high")

    def _program_values(self) -> int:
        return sum(s.num_kv_heads * (s.head_dim + s.v_head_dim) for s in self._program.sites)


def _measure(
    program: Program, reference: Remembered, text: Tensor, options: argparse.Namespace
) -> Row:
    runner = SessionRunner(OptimizedModel(program), options.window)
    sizes = {"window": options.window, "windows": options.windows}
    return evaluate(runner, text, reference=reference, **sizes).to_dict()


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
