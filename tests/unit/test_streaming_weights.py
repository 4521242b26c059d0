"""Weights that are read from their file when they are used."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from cached import cached_program
from programs import gpt2_program, token_ids
from torch import Tensor

from kvxform.diffing.streaming import SMALL, FileWeights, open_streamed
from kvxform.diffing.walking import WalkingModel
from kvxform.errors import ArtifactError
from kvxform.ir.program import Program
from kvxform.ir.schema import WeightEntry
from kvxform.ir.weights import write_weights
from kvxform.runtime.model import OptimizedModel

SHAPES = {"large": (96, 64), "wide": (8, 4096), "small": (7,), "empty": (0, 5)}


def weights_file(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, WeightEntry]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["codes"] = torch.arange(40000, dtype=torch.int32)
    path = folder / "weights.safetensors"
    write_weights(tensors, path)
    table = {
        name: WeightEntry(
            dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape), stored=name
        )
        for name, x in tensors.items()
    }
    table["tied"] = table["large"]
    return path, tensors, table


def test_what_is_looked_up_has_values_and_what_is_listed_has_shapes(tmp_path):
    path, tensors, table = weights_file(tmp_path)
    weights = FileWeights(path, table)
    assert list(weights) == list(table)
    for name, expected in tensors.items():
        assert torch.equal(weights[name], expected)
        assert weights[name].dtype == expected.dtype
    assert torch.equal(weights["tied"], tensors["large"])
    listed = dict(weights)
    assert {name for name, x in listed.items() if not x.is_meta} == {"small", "empty"}
    assert listed["codes"].nbytes > SMALL
    assert all(listed[name].shape == x.shape for name, x in tensors.items())
    with pytest.raises(KeyError):
        weights["absent"]


def test_a_buffer_is_used_again_once_nothing_refers_to_it(tmp_path):
    path, tensors, table = weights_file(tmp_path)
    weights = FileWeights(path, table)
    first = weights["wide"]
    view, place = first[2:5], first.data_ptr()
    del first
    gc.collect()
    assert weights["wide"].data_ptr() != place  # a view still reads it
    assert torch.equal(view, tensors["wide"][2:5])
    del view
    again = [weights["wide"] for _ in range(2)]
    assert place in {x.data_ptr() for x in again}
    assert all(torch.equal(x, tensors["wide"]) for x in again)


def test_rows_alone_are_read(tmp_path):
    path, tensors, table = weights_file(tmp_path)
    index = torch.tensor([[95, 0, 3], [0, 0, 7]])
    weights = FileWeights(path, table)
    assert torch.equal(weights.rows("large", index), tensors["large"][index])
    assert torch.equal(weights.rows("small", index % 7), tensors["small"][index % 7])


@pytest.mark.parametrize("cut", [1, 4000, 100000])
def test_a_file_that_is_cut_off_is_refused(tmp_path, cut):
    path, _, table = weights_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ArtifactError) as caught:
        FileWeights(path, table)
    assert caught.value.code == "KVX602"


def test_a_file_with_other_weights_is_refused(tmp_path):
    path, _, table = weights_file(tmp_path)
    table["large"] = WeightEntry(dtype="float16", shape=(96, 64), stored="large")
    with pytest.raises(ArtifactError, match="weight large must be float16"):
        FileWeights(path, table)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"a": {}}', b'{"a": 3}'])
def test_a_file_without_a_header_is_refused(tmp_path, header):
    path, _, table = weights_file(tmp_path)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError) as caught:
        FileWeights(path, table)
    assert caught.value.code == "KVX602"


@pytest.mark.parametrize("program", [gpt2_program(), cached_program()], ids=["plain", "cached"])
def test_a_streamed_artifact_runs_as_the_program_that_was_saved(tmp_path, program: Program):
    model = OptimizedModel(program)
    model.save(tmp_path / "artifact")
    streamed = open_streamed(tmp_path / "artifact")
    assert isinstance(streamed.weights, FileWeights)
    ids = token_ids(program)
    torch.testing.assert_close(WalkingModel(streamed)(ids), model(ids), rtol=1e-12, atol=1e-12)


def test_a_damaged_artifact_is_not_opened(tmp_path):
    OptimizedModel(cached_program()).save(tmp_path / "artifact")
    path = tmp_path / "artifact" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="as it was saved"):
        open_streamed(tmp_path / "artifact")
