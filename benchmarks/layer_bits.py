r"""How much each layer of SmolLM2-135M suffers from each number of bits of K and of V.

    python benchmarks/layer_bits.py --calibration wikitext2/valid.txt --json layer_bits.json

One row a layer: the KL divergence that each format of K or V causes there alone, and the relative
error of the attention output for K8V4 and K4V8 (KVTuner's measure). One row of uniform choices, and
one of what `per-layer-bits` finds within the bytes of 4 bits for K and V, by both methods.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from results import ResultFile, Row, add_common_options, describe_run, format_table, is_wanted

from kvxform.calibrate import make_calibration
from kvxform.capture import capture
from kvxform.ir.program import Program
from kvxform.order import plan_passes
from kvxform.pipeline import apply_pass
from kvxform.recipe import load_recipe
from kvxform.runtime.loading import move_program, parse_device
from kvxform.sensitivity.choosing import Offer, choose
from kvxform.sensitivity.deciding import (
    Assignment,
    Formats,
    codecs_of,
    decide_by_search,
    size_of,
    uniform,
)
from kvxform.sensitivity.formats import stream_formats
from kvxform.sensitivity.measuring import Bench

BITS = (8, 4, 2)
SHORT = (("K", "key"), ("V", "value"))
BASE = {"codec": "int", "bits": 4}
ROTATIONS = {"plain": ([], []), "hadamard": (["rotate-v"], ["rotate-qk"])}


def main() -> None:
    """Measure, write rows and print a table for each rotation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: that of the model")
    parser.add_argument("--calibration", type=Path, help="UTF-8 file; default: help topics")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    add_common_options(parser)
    options = parser.parse_args()
    program = capture(options.model).program
    if options.tokenizer is not None:
        info = dataclasses.replace(program.info, tokenizer_path=str(options.tokenizer))
        program = dataclasses.replace(program, info=info)
    program = move_program(program, parse_device(options.device))
    text = make_calibration(
        program, options.calibration, tokens=options.tokens, window=options.window, seed=0
    )
    file = ResultFile(options.json, "layer_bits")
    file.start_run(describe_run(options, text=text.name))
    for name, (before, after) in ROTATIONS.items():
        if is_wanted(name, options.only):
            cached = prepare(program, before, after)
            measure(name, cached, Bench(cached, text.token_ids), options.trials, file)


def prepare(program: Program, before: list[str], after: list[str]) -> Program:
    """Return the program with a cache of int codes, rotated or not."""
    steps = [*before, "insert-cache", *after, {"quantize-kv": {"key": BASE, "value": BASE}}]
    recipe = load_recipe({"version": 1, "name": "layer-bits", "passes": steps})
    for planned in plan_passes(recipe.passes, program.facts, auto_order=False):
        program, _ = apply_pass(program, planned)
    return program


def measure(name: str, program: Program, bench: Bench, trials: int, file: ResultFile) -> None:
    """Add the rows of one rotation."""
    assert program.plan is not None, "there is a cache"
    options = [{"bits": bits} for bits in BITS]
    formats = {
        (site.layer, stream): stream_formats(program, site, stream, options, "layer-bits")
        for site in program.plan.owners
        for stream in site.streams
    }
    layers = [n for n, _ in pairs(formats)]
    rows = {n: file.add(f"{name}/layer {n}", layer_row(bench, formats, n)) for n in layers}
    offers = {
        (n, stream): [
            Offer(found.size, rows[n][f"{short} {bits}"])
            for bits, found in zip(BITS, formats[n, stream], strict=True)
        ]
        for n in layers
        for short, stream in SHORT
    }
    file.add(
        f"{name}/uniform",
        {label(formats, a): bench.divergence(codecs_of(formats, a)) for a in uniform(formats)},
    )
    budget = size_of(formats, dict.fromkeys(formats, BITS.index(4)))
    exact = choose(offers, budget)
    assert exact is not None, "4 bits everywhere keep the budget"
    found = {
        "exact": exact,
        "kvtuner": decide_by_search(bench, formats, budget, objective="kl", trials=trials, seed=0),
    }
    for method, chosen in found.items():
        row = {
            "kl": bench.divergence(codecs_of(formats, chosen)),
            "bytes_per_token": size_of(formats, chosen),
            "layers": {n: label(formats, chosen, n) for n in layers},
        }
        file.add(f"{name}/{method}", row)
    heading = ["layer", *(f"{stream} {bits}" for stream in "KV" for bits in BITS), "K8V4", "K4V8"]
    cells = [[n, *(f"{row[c]:.2e}" for c in heading[1:])] for n, row in rows.items()]
    print(format_table(heading, cells))
    for row in (file.rows[f"{name}/{key}"] for key in ("uniform", *found)):
        print(row)


def layer_row(bench: Bench, formats: Formats, layer: int) -> Row:
    """Return the divergences and attention errors of one layer."""
    row: Row = {}
    for short, stream in SHORT:
        for bits, found in zip(BITS, formats[layer, stream], strict=True):
            row[f"{short} {bits}"] = bench.divergence({(layer, stream): found.codec})
    for key, value in ((8, 4), (4, 8)):
        pair = {(layer, "key"): BITS.index(key), (layer, "value"): BITS.index(value)}
        row[f"K{key}V{value}"] = bench.attention_error(layer, codecs_of(formats, pair))
    return row


def pairs(formats: Formats) -> list[tuple[int, str]]:
    """Return one stream of each layer."""
    return [stream for stream in formats if stream[1] == "key"]


def label(formats: Formats, chosen: Assignment, layer: int | None = None) -> str:
    """Return the bits of a layer as KVTuner writes them, for instance `K8V4`."""
    layer = pairs(formats)[0][0] if layer is None else layer
    key, value = (BITS[chosen[layer, name]] for name in ("key", "value"))
    return f"K{key}V{value}"


if __name__ == "__main__":
    main()
