"""Perplexity of SmolLM2-135M as ONNX packages, run by ONNX Runtime, beside the source.

    python benchmarks/onnx_perplexity.py --text test.txt --calibration valid.txt --json ppl.json

Every package is exported with the logits of all positions, in float32 for the CPU, or in float16
with `--provider cuda`; its cache holds the same bytes as that of the recipe. One run of the graph
per window: K and V of every position pass through the codes. `--decode N` runs N tokens of the
first window one by one too. The source runs in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import ResultFile, add_common_options, describe_run, format_table, is_wanted
from torch import Tensor

from kvxform.capture import capture, open_source
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.evaluate.perplexity import EvalResult, evaluate
from kvxform.evaluate.runners import OnnxRunner, Remembered, Runner, make_runner
from kvxform.ir.program import Program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.loading import move_program
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
    opened = open_source(options.model)
    tokenizer = load_tokenizer(opened.info.tokenizer_path)
    text = encode_text(tokenizer, read_text(options.text))
    calibration = encode_text(tokenizer, read_text(options.calibration))
    source = Remembered(make_runner(opened.model, options.window))
    dtype = torch.float16 if options.provider == "cuda" else None
    program = capture(opened.model, name=MODEL, dtype=dtype).program
    file = ResultFile(options.json, "onnx_perplexity")
    file.start_run(describe_run(options, model=MODEL))
    for name in RECIPES:
        if is_wanted(name, options.only):
            model = rewrite(program, name, calibration, options.provider)
            key = f"{name} on {options.provider}"
            file.add(key, {"recipe": name, **measure(model, text, source, options)})
    print(format_table(HEADER, [line_of(row) for row in file.this_run()]))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--calibration", type=Path, help="text for statistics; likewise")
    parser.add_argument("--model", default=MODEL, help="where SmolLM2-135M is, as MODEL")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=6, help="number of windows")
    parser.add_argument("--decode", type=int, default=0, help="tokens that are decoded one by one")
    parser.add_argument("--threads", type=int, default=None, help="of ONNX Runtime")
    add_common_options(parser)
    return parser.parse_args()


def rewrite(program: Program, name: str, calibration: Tensor, device: str) -> OptimizedModel:
    """Return the model after a recipe; it is made on `device`, and ends on the CPU."""
    recipe = load_recipe(name)
    rewritten, _ = run_pipeline(
        move_program(program, torch.device(device)),
        recipe,
        executor=OptimizedModel,
        verify="none",
        calibration=calibration,
    )
    return OptimizedModel(move_program(rewritten, torch.device("cpu")), recipe=recipe)


def measure(
    model: OptimizedModel, text: Tensor, source: Runner, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of a model as a package."""
    assert model.plan is not None, "the recipe makes a cache"
    form = OnnxOptions(level="L3", provider=options.provider)
    with tempfile.TemporaryDirectory() as folder:
        package = model.export_onnx(Path(folder, "package"), form, verify="none")
        runner = OnnxRunner(OnnxSession(package, threads=options.threads))
        sizes = {"window": options.window, "windows": options.windows}
        whole = evaluate(runner, text, reference=source, **sizes)
        steps = None
        if options.decode:
            steps = evaluate(
                runner, text, window=options.decode, windows=1, protocol="decode", reference=source
            )
    return {
        "bits_per_value": model.plan.bits_per_value,
        "added": added(whole),
        **whole.to_dict(),
        "decode": None if steps is None else {"added": added(steps), **steps.to_dict()},
    }


def added(result: EvalResult) -> float:
    """Return the perplexity that is added, as a share of that of the source."""
    assert result.reference_perplexity is not None, "a reference ran"
    return result.perplexity / result.reference_perplexity - 1


HEADER = ("recipe", "provider", "bits", "perplexity", "source", "added %", "goal %", "KL", "top-1")


def line_of(row: dict[str, Any]) -> tuple[object, ...]:
    """Return a row as cells of `HEADER`."""
    goal = GOALS.get(row["recipe"])
    return (
        row["recipe"],
        row["key"].rpartition(" ")[2],
        f"{row['bits_per_value']:.2f}",
        f"{row['perplexity']:.3f}",
        f"{row['reference_perplexity']:.3f}",
        f"{100 * row['added']:+.2f}",
        None if goal is None else f"{100 * goal:.1f}",
        f"{row['kl']:.5f}",
        f"{row['top1_agreement']:.4f}",
    )


if __name__ == "__main__":
    main()
