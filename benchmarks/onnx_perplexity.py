"""Perplexity of SmolLM2-135M as ONNX packages, run by ONNX Runtime, beside the source.

    python benchmarks/onnx_perplexity.py --text test.txt --calibration valid.txt --json ppl.json

Every package is exported with the logits of all positions, in float32, for the CPU; its cache holds
the same bytes as that of the recipe. One run of the graph per window: K and V of every position
pass through the codes. `--decode N` runs N tokens of the first window one by one too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from results import ResultFile, add_common_options, describe_run, format_table, is_wanted
from torch import Tensor

from kvxform.capture import capture, open_source
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.evaluate.perplexity import EvalResult, evaluate
from kvxform.evaluate.runners import OnnxRunner, Remembered, Runner, make_runner
from kvxform.ir.program import Program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
RECIPES = ("onnx-fp16", "onnx-int8", "onnx-int4")
GOALS = {"onnx-int8": 0.003, "onnx-int4": 0.08}  # of the perplexity of the source


def main() -> None:
    """Measure all recipes and print a table."""
    options = parse_options()
    opened = open_source(MODEL)
    tokenizer = load_tokenizer(opened.info.tokenizer_path)
    text = encode_text(tokenizer, read_text(options.text))
    calibration = encode_text(tokenizer, read_text(options.calibration))
    source = Remembered(make_runner(opened.model, options.window))
    program = capture(opened.model, name=MODEL).program
    file = ResultFile(options.json, "onnx_perplexity")
    file.start_run(describe_run(options, model=MODEL))
    for name in RECIPES:
        if is_wanted(name, options.only):
            file.add(name, measure(name, program, calibration, text, source, options))
    print(format_table(HEADER, [line_of(row) for row in file.this_run()]))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--calibration", type=Path, help="text for statistics; likewise")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=6, help="number of windows")
    parser.add_argument("--decode", type=int, default=0, help="tokens that are decoded one by one")
    parser.add_argument("--threads", type=int, default=None, help="of ONNX Runtime")
    add_common_options(parser)
    return parser.parse_args()


def measure(
    name: str,
    program: Program,
    calibration: Tensor,
    text: Tensor,
    source: Runner,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the row of a recipe."""
    recipe = load_recipe(name)
    rewritten, _ = run_pipeline(
        program, recipe, executor=OptimizedModel, verify="none", calibration=calibration
    )
    assert rewritten.plan is not None, "the recipe makes a cache"
    form = OnnxOptions(level="L3")
    with tempfile.TemporaryDirectory() as folder:
        model = OptimizedModel(rewritten, recipe=recipe)
        package = model.export_onnx(Path(folder, "package"), form, verify="none")
        runner = OnnxRunner(OnnxSession(package, threads=options.threads))
        sizes = {"window": options.window, "windows": options.windows}
        whole = evaluate(runner, text, reference=source, **sizes)
        steps = None
        if options.decode:
            steps = evaluate(
                runner, text, window=options.decode, windows=1, protocol="decode", reference=source
            )
    return row_of(name, rewritten.plan.bits_per_value, whole, steps)


def row_of(name: str, bits: float, whole: EvalResult, steps: EvalResult | None) -> dict[str, Any]:
    """Return figures of a recipe, with the perplexity it adds as a share of the source's."""
    assert whole.reference_perplexity is not None, "a reference ran"
    added = whole.perplexity / whole.reference_perplexity - 1
    goal = GOALS.get(name)
    return {
        "recipe": name,
        "bits_per_value": bits,
        "added": added,
        "goal": goal,
        "reached": None if goal is None else added <= goal,
        **whole.to_dict(),
        "decode": None if steps is None else steps.to_dict(),
    }


HEADER = ("recipe", "bits", "perplexity", "source", "added %", "goal %", "KL", "top-1")


def line_of(row: dict[str, Any]) -> tuple[object, ...]:
    """Return a row as cells of `HEADER`."""
    return (
        row["recipe"],
        f"{row['bits_per_value']:.2f}",
        f"{row['perplexity']:.3f}",
        f"{row['reference_perplexity']:.3f}",
        f"{100 * row['added']:+.2f}",
        None if row["goal"] is None else f"{100 * row['goal']:.1f}",
        f"{row['kl']:.5f}",
        f"{row['top1_agreement']:.4f}",
    )


if __name__ == "__main__":
    main()
