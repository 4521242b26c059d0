"""Exports of large models: memory that does not grow with them, files beyond 2 GB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cached import cached_program
from deep_programs import deep_program, layer_bytes
from programs import token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.ir.store import RESIDENT_LIMIT
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

MIB = 1 << 20
SCRIPT = """
import sys, kvxform
from kvxform.codegen.onnx.forms import OnnxOptions
model = kvxform.load(sys.argv[1])
model.export_onnx(sys.argv[2], OnnxOptions(weights=sys.argv[3]), verify="none")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) >> 10)
"""


def peak_of_export(artifact: Path, weights: str) -> int:
    """Return the peak of resident memory of an export in MiB."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact), str(artifact) + ".onnx", weights],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_an_export_does_not_grow_with_the_depth(tmp_path):
    layer = layer_bytes(deep_program(1)) // MIB
    few, many = RESIDENT_LIMIT // MIB // layer + 2, 24
    assert many > 2 * few
    for layers in (few, many):
        OptimizedModel(deep_program(layers)).save(tmp_path / str(layers))
    for weights in ("source", "int4"):
        first, second = (peak_of_export(tmp_path / str(n), weights) for n in (few, many))
        assert second - first < 2 * layer < (many - few) * layer


def with_large_table(rows: int, folder: Path):
    """Return a program, and the same with zeros behind its table: `rows` rows, in a file."""
    program = cached_program(None, None, dtype=torch.float32, tied=False)
    name = "embed.weight"
    small = program.weights[name]
    path = folder / "table"
    with path.open("wb") as file:
        file.truncate(rows * small.shape[1] * small.itemsize)  # no blocks on disk yet
    table = torch.from_file(str(path), shared=True, size=rows * small.shape[1])
    table = table.reshape(rows, small.shape[1])
    table[: len(small)] = small
    large = program.clone()
    large.weights[name] = table
    for node in large.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.meta["type"] = type(node.meta["type"])(torch.float32, tuple(table.shape))
    return program, large


@pytest.mark.slow
def test_a_package_of_more_than_two_gigabytes_runs(tmp_path):
    rows = (1 << 31) // (4 * 32) + 100_000
    program, large = with_large_table(rows, tmp_path)
    folder = export_onnx(large, tmp_path / "out")
    assert (folder / "model.onnx.data").stat().st_size > 1 << 31
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    ids = token_ids(program, 1, 6)
    session = OnnxSession(folder, threads=1)
    expected = OptimizedModel(program).new_session(1).prefill(ids)
    torch.testing.assert_close(session.prefill(ids), expected, rtol=0, atol=1e-5)
    offsets = [
        int(entry.value)
        for tensor in onnx.load(
            str(folder / "model.onnx"), load_external_data=False
        ).graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert max(offsets) > np.iinfo(np.int32).max
