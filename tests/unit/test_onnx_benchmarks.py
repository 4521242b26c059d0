"""Benchmarks of ONNX packages: their table, and the process that holds one model."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import write_llama

import kvxform

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str):
    return importlib.import_module(name)


def at(prefill: float | None, decode: float) -> dict:
    rates = {"prefill": prefill, "decode": decode}
    found = {k: dict.fromkeys(("median", "slowest", "fastest"), v) for k, v in rates.items() if v}
    return {**found, "memory": {"peak": 700_000_000, "resident": 1, "cache": 94_000_000}}


ROWS = [
    {"name": "huggingface", "contexts": {"256": at(400.0, 14.0), "8192": at(None, 7.0)}},
    {"name": "l3-int8", "contexts": {"256": at(500.0, 28.0), "8192": at(None, 21.0)}},
    {"name": "plain", "error": "RuntimeError: no memory"},
]


def test_the_table_compares_with_hugging_face_and_tells_what_failed():
    lines = load("onnx_tables").cpu_table(ROWS).splitlines()
    header, ours = (
        [c.strip() for c in line.strip("|").split("|")] for line in (lines[0], lines[3])
    )
    row = dict(zip(header, ours, strict=True))
    assert row["prefill 256"] == "500 (1.25x)"
    assert row["decode 256"] == "28.0 (2.00x)"
    assert row["decode 8k"] == "21.0 (3.00x)"
    assert row["cache MB 8k"] == "94"
    assert "prefill 8k" not in header  # nobody prefilled so much
    assert lines[-1] == "`torch.onnx.export`: RuntimeError: no memory"


def test_a_table_without_the_baseline_has_no_ratios():
    assert "x)" not in load("onnx_tables").cpu_table(ROWS[1:])


def test_a_cache_is_filled_with_copies_of_its_tokens():
    x = torch.arange(6.0).reshape(1, 1, 3, 2)
    filled = load("onnx_subjects")._repeat(x, 7)
    assert torch.equal(filled[0, 0], x[0, 0, [0, 1, 2, 0, 1, 2, 0]])


class Counter:
    """A subject that adds up its tokens."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def reset(self) -> None:
        self.seen = []

    def prefill(self, ids) -> int:
        self.seen += ids
        return sum(self.seen)

    def decode(self, token: int) -> int:
        return self.prefill([token])

    def fill(self, length: int) -> None:
        self.seen += [0] * (length - len(self.seen))

    def cache_bytes(self) -> int:
        return len(self.seen)


class SlowRemote:
    """A worker whose prompts take 5 seconds, and that is cut after some questions."""

    asked: ClassVar[list[str]] = []
    patience = 100

    def __init__(self, python: str) -> None:
        self.length = 0

    def ask(self, do: str, **options) -> dict:
        self.asked.append(do)
        if len(self.asked) > self.patience:
            raise KeyboardInterrupt
        seconds = 5.0 if do == "prefill" else [0.5] * len(options.get("ids", ()))
        return {"seconds": seconds, "token": 1, "tokens": [2, 3], "cache_bytes": 4, "peak": 5}

    def close(self) -> None:
        """Nothing is held."""


def run_bench(monkeypatch, path, patience=100, *options):
    bench, results = load("onnx_cpu"), load("results")
    monkeypatch.setattr(bench, "Remote", SlowRemote)
    monkeypatch.setattr(bench, "make_package", lambda name, folder: folder / name)
    monkeypatch.setattr(SlowRemote, "asked", [])
    monkeypatch.setattr(SlowRemote, "patience", patience)
    command = ["onnx_cpu.py", "--packages", "p", "--new-tokens", "2", "--rounds", "2", *options]
    monkeypatch.setattr(sys, "argv", command)
    file = results.ResultFile(path, "onnx_cpu")
    file.start_run({})
    bench.Bench(bench.parse_options(), file).run()


def test_a_run_that_is_cut_keeps_what_it_has_measured(monkeypatch, tmp_path):
    path, only = tmp_path / "r.json", ("--only", "huggingface,l3-int8", "--contexts", "256")
    with pytest.raises(KeyboardInterrupt):
        run_bench(monkeypatch, path, 7, *only)  # two loads, one round of the first, a prefill
    (row,) = [r for r in json.loads(path.read_text())["rows"] if r["contexts"]]
    assert row["name"] == "huggingface"
    assert row["contexts"]["256"]["prefill"]["median"] == 256 / 5


def test_long_caches_of_slow_rows_are_asked_for(monkeypatch, tmp_path):
    """They come last; a slow prompt is timed once, a long cache is decoded in one round."""
    options = ("--only", "builder-int8,genai", "--contexts", "256", "8192", "--slow", "4")
    run_bench(monkeypatch, None, 100, *options)
    assert SlowRemote.asked.count("prefill") == 2
    assert SlowRemote.asked.count("fill") == 1
    run_bench(monkeypatch, None, 100, *options, "--all-contexts")
    assert SlowRemote.asked.count("fill") == 2


def test_a_worker_answers_commands_and_goes_on_after_an_error(monkeypatch):
    worker = load("onnx_worker")
    monkeypatch.setattr(worker, "make_subject", lambda runtime, **options: Counter())
    monkeypatch.setattr(worker, "IMPORTS", {"counter": ("json",)})
    commands = [
        {"do": "load", "runtime": "counter", "folder": "", "threads": 1, "capacity": 9},
        {"do": "prefill", "ids": [1, 2]},
        {"do": "unknown"},
        {"do": "decode", "ids": [3, 4]},
        {"do": "fill", "length": 8},
        {"do": "decode", "ids": [1]},
        {"do": "memory"},
    ]
    answers = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, commands))))
    monkeypatch.setattr(sys, "stdout", answers)
    worker.main()
    _, first, failed, rest, _, last, memory = map(json.loads, answers.getvalue().splitlines())
    assert first["token"] == 3
    assert "unknown" in failed["error"]
    assert rest["tokens"] == [6, 10]
    assert len(rest["seconds"]) == 2
    assert last["cache_bytes"] == 9
    assert memory["peak"] >= memory["resident"]


def test_the_gpu_table_has_a_column_for_each_shape_and_says_what_failed():
    rows = [
        {"shape": "8x8k", "name": "l3-int8", "step_us": 411.6},
        {"shape": "8x32k", "name": "l3-int8", "step_us": 900.2},
        {"shape": "8x8k", "name": "l4-int8", "error": "RuntimeError: no kernel"},
    ]
    lines = load("onnx_tables").gpu_table(rows).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["us a step", "8x8k", "8x32k"]
    assert cells[2] == ["L3 `GroupQueryAttention`, int8", "412", "900"]
    assert cells[3] == ["L4 `PagedAttention`, int8", "-", ""]
    assert lines[-1] == "L4 `PagedAttention`, int8: RuntimeError: no kernel"


@pytest.mark.parametrize(("text", "size"), [("8x32k", (8, 32768)), ("2x64", (2, 64))])
def test_shapes_are_rows_and_tokens(text, size):
    assert load("onnx_tables").parse_shape(text) == size


@pytest.mark.slow
def test_a_tiny_layer_decodes_from_a_package_and_from_our_kernels(tmp_path, monkeypatch):
    bench = load("onnx_gpu")
    file = tmp_path / "rows.json"
    only = "l2-int4,l3-int8,triton-int4"
    options = ["--tiny", "--models=layer", "--shapes=2x64", f"--only={only}", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["onnx_gpu.py", *options])
    bench.main()
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert sorted(rows) == sorted(only.split(","))
    for row in rows.values():
        assert row["finite"], row
        assert row["cache_bytes"] > 0
    # codes are packed: two a byte, with a scale and a zero point of 4 bytes for 16 of them
    assert rows["l2-int4"]["cache_bytes"] < rows["l3-int8"]["cache_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["kvxform", "genai"])
def test_packages_are_prefilled_filled_and_decoded(tmp_path, runtime):
    if runtime == "genai":
        pytest.importorskip("onnxruntime_genai")
    source = write_llama(tmp_path / "llama")
    model = kvxform.optimize(str(source), "onnx-fp16", verify="none", progress=False)
    folder = model.export_onnx(tmp_path / "onnx", verify="none")
    subject = load("onnx_worker").make_subject(runtime, str(folder), threads=1, capacity=64)
    ids = list(range(5, 17))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=3, eos_token_id=())[0, 12:]
    subject.reset()
    found = [subject.prefill(ids)]
    for _ in range(2):
        found.append(subject.decode(found[-1]))
    assert found == expected.tolist()
    subject.fill(40)
    assert isinstance(subject.decode(7), int)
    if runtime == "kvxform":
        assert subject.cache_bytes() == 2 * 2 * 64 * 64 * 4  # layers, K and V, room, width, float32
