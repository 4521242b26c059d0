"""Which versions of ONNX Runtime run which forms of packages, and whether their numbers are right.

    pip install --no-deps --target /tmp/ort/1.27.0 onnxruntime==1.27.0     # and others
    python benchmarks/onnx_runtimes.py /tmp/ort/*

Small models are exported once and run by every version in a process of its own: a prompt, a second
chunk, two steps. Logits are compared with those of the eager lowering. A form that a version
refuses is `fails`, one whose logits are off is `WRONG`. The table in docs/onnx-levels.md is from
here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvxform.codegen.onnx import export_onnx
from kvxform.ir.program import Program
from kvxform.onnx_options import OnnxOptions
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.testing.programs import llama_program

CHUNKS = (9, 3, 1, 1)
CAPACITY = 32  # tokens of a buffer
TOLERANCE = 1e-2  # of logits of about 2
INT4 = {"codec": "int", "bits": 4}
KIVI = {"codec": "int", "bits": 2, "zero": "float"}
CHANNEL = {**KIVI, "axis": "channel", "group": 8}
STATIC = {"codec": "static-int", "scale": [0.1]}
PLANS: dict[str, dict[str, Any] | None] = {
    "exact": None,
    "int4": {"key": INT4, "value": INT4},
    "kivi": {"key": CHANNEL, "value": KIVI, "regions": {"sink": 3, "recent": 8}},
    "static int8": {"key": {**STATIC, "bits": 8}, "value": {**STATIC, "bits": 8}},
    "static int4": {"key": {**STATIC, "bits": 4}, "value": {**STATIC, "bits": 4}},
}
FORMS = [
    *((plan, OnnxOptions("L0")) for plan in ("exact", "int4", "kivi")),
    *((plan, OnnxOptions(opset=23)) for plan in ("exact", "int4", "kivi")),
    *((plan, OnnxOptions("L5")) for plan in ("exact", "int4")),
    ("kivi", OnnxOptions(opset=24)),
    *((plan, OnnxOptions(opset=24, runtime="1.25")) for plan in ("exact", "int4")),
    *((plan, OnnxOptions(opset=n)) for plan in ("exact", "int4") for n in (24, 25)),
    *((plan, OnnxOptions("L3")) for plan in ("exact", "static int8", "static int4")),
    ("exact", OnnxOptions(weights="int4")),
]


def main() -> None:
    """Export, run every version, and print one row a form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtimes", nargs="*", type=Path, help="folders with an onnxruntime each")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run_forms(options.run)
        return
    with tempfile.TemporaryDirectory() as name:
        names = export_forms(Path(name))
        columns = [run_version(path, Path(name)) for path in options.runtimes]
    print("form", *(path.name for path in options.runtimes), sep=" | ")
    for i, form in enumerate(names):
        print(form, *(column[i] for column in columns), sep=" | ")


def export_forms(folder: Path) -> list[str]:
    """Write a package and the expected logits of every form; return what they are."""
    names = []
    for i, (plan, options) in enumerate(FORMS):
        program = make_program(PLANS[plan])
        export_onnx(program, folder / f"{i:02}", options)
        if options.weights == "source":
            ids = torch.from_numpy(token_ids())
            np.save(folder / f"{i:02}.npy", OptimizedModel(program)(ids).numpy())
        asked = (options.level, options.opset and f"opset {options.opset}", options.weights)
        words = [str(word) for word in asked if word not in (None, "source")]
        names.append(", ".join([plan, *words, f"for {options.runtime}"]))
    return names


def make_program(quantised: dict[str, Any] | None) -> Program:
    """Return a small program with a cache."""
    passes: list[Any] = ["insert-cache"]
    if quantised is not None:
        passes.append({"quantize-kv": quantised})
    recipe = load_recipe({"version": 1, "name": "form", "passes": passes})
    program = llama_program(dtype=torch.float32)
    return run_pipeline(program, recipe, executor=OptimizedModel, verify="none")[0]


def run_version(runtime: Path, folder: Path) -> list[str]:
    """Run all forms with the onnxruntime in a folder, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(runtime)}
    words = [sys.executable, "-W", "ignore", __file__, "--run", str(folder)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    if len(lines) == len(FORMS):
        return lines
    print(runtime, done.stderr[-300:], file=sys.stderr)
    return ["stopped"] * len(FORMS)


def run_forms(folder: Path) -> None:
    """Print a word a form: `ok`, `fails` or `WRONG`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    for path in sorted(folder.glob("*/model.onnx")):
        try:
            session = onnxruntime.InferenceSession(str(path), options)
            logits = run_steps(session)
        except Exception:  # the runtime has a class for each status code
            print("fails")
            continue
        expected = path.parent.with_suffix(".npy")
        off = np.abs(logits - np.load(expected)).max() if expected.exists() else 0.0
        print("ok" if off < TOLERANCE else "WRONG")


def run_steps(session: Any) -> np.ndarray:
    """Return logits `[1, tokens, vocab]` of all chunks."""
    dtypes = {"float": np.float32, "uint8": np.uint8, "int8": np.int8, "float16": np.float16}
    ports = [x for x in session.get_inputs() if x.name.startswith("past_key_values.")]
    past = {}
    for port in ports:
        rows = CAPACITY if port.shape[2] == "max_sequence_length" else 0
        dtype = dtypes[port.type.removeprefix("tensor(").removesuffix(")")]
        past[port.name] = np.zeros((1, port.shape[1], rows, port.shape[3]), dtype)
    names = {x.name for x in session.get_inputs()}
    outputs, done, found = [x.name for x in session.get_outputs()], 0, []
    for count in CHUNKS:
        feeds = {
            "input_ids": token_ids()[:, done : done + count],
            "position_ids": np.arange(done, done + count)[None],
            "attention_mask": np.ones((1, done + count), np.int64),
        }
        done += count
        given = {n: x for n, x in feeds.items() if n in names}
        values = dict(zip(outputs, session.run(None, given | past), strict=True))
        found.append(values.pop("logits"))
        past = {n.replace("present.", "past_key_values.", 1): x for n, x in values.items()}
    return np.concatenate(found, 1)


def token_ids() -> np.ndarray:
    """Return the tokens of all chunks, int64 `[1, tokens]`."""
    return np.arange(sum(CHUNKS))[None] % 40 + 3


if __name__ == "__main__":
    main()
