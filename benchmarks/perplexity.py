"""Perplexity of SmolLM2-135M under cache codecs, against the same source in one run.

Usage: python benchmarks/perplexity.py --text wikitext2/test.txt --json perplexity.json

Writes JSON with versions, protocol and one entry per cache format. The formats isolate one choice
each: bits, rotation, axis, regions. `source` is the unrewritten Hugging Face model.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import kvxform
from kvxform.capture import capture, open_source
from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import make_runner
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
BUNDLED = ("exact", "int8", "kv4", "kivi4", "kivi2")


def int_recipe(bits: int, *, rotated: bool) -> dict[str, Any]:
    """Return a recipe with one int-zero group per head and token on both streams."""
    stream = {"codec": "int", "bits": bits, "axis": "token", "symmetric": False}
    rotations: list[Any] = [{"rotate-v": {"block": 64}}, {"rotate-qk": {"block": 64}}]
    return {
        "version": 1,
        "name": f"int{bits}{'-hadamard' if rotated else ''}",
        "passes": [
            *(rotations[:1] if rotated else []),
            "insert-cache",
            *(rotations[1:] if rotated else []),
            {"quantize-kv": {"key": stream, "value": stream}},
        ],
    }


def formats() -> dict[str, Any]:
    """Return what is measured, by name."""
    plain = {f"int{b}": int_recipe(b, rotated=False) for b in (8, 4, 3, 2)}
    rotated = {f"int{b}-hadamard": int_recipe(b, rotated=True) for b in (8, 4, 3, 2)}
    return {**plain, **rotated, **{f"recipe {name}": name for name in BUNDLED}}


def main() -> None:
    """Measure all formats and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--only", nargs="*", help="names of formats; default: all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()

    opened = open_source(MODEL)
    module = opened.model
    source = make_runner(module, args.window)
    tokenizer = load_tokenizer(opened.info.tokenizer_path)
    tokens = encode_text(tokenizer, read_text(args.text))
    program = capture(module, name=MODEL).program
    rows = []
    for name, recipe in formats().items():
        if args.only and name not in args.only:
            continue
        rewritten, _ = run_pipeline(
            program, load_recipe(recipe), executor=OptimizedModel, verify="none"
        )
        model = OptimizedModel(rewritten)
        result = evaluate(
            make_runner(model, args.window),
            tokens,
            window=args.window,
            windows=args.windows,
            reference=source,
        )
        bits = model.plan.bits_per_value
        rows.append({"format": name, "bits_per_value": bits, **result.to_dict()})
        print(
            f"{name:18} {bits:6.3f} bits  ppl {result.perplexity:8.3f}"
            f"  source {result.reference_perplexity:7.3f}  kl {result.kl:.4f}"
            f"  top-1 {result.top1_agreement:.4f}",
            flush=True,
        )
    report = {
        "model": MODEL,
        "text": str(args.text.name) if args.text else "pydoc topics",
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvxform": kvxform.__version__,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    else:
        json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
