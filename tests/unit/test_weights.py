"""Weight files: the bytes that the library safetensors writes, without holding all tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from torch import Tensor

from kvxform.codecs.base import dtype_name
from kvxform.ir.store import WeightStore
from kvxform.ir.weights import FORMAT_NAMES, write_weights


def tensors_of_all_dtypes() -> dict[str, Tensor]:
    names = ("b", 'ä"\\\n', "a.weight")
    tensors = {
        f"{name}.{number}": torch.arange(6).reshape(2, 3).to(dtype)
        for number, dtype in enumerate(FORMAT_NAMES)
        for name in names
    }
    return {**tensors, "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0)}


def test_a_file_is_what_safetensors_would_write(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    specs = {
        name: TensorSpec(
            dtype=dtype_name(tensor.dtype),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, str(tmp_path / "expected"))
    write_weights(dict(reversed(tensors.items())), tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_weights_in_files_are_written_like_those_in_memory(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "scratch", limit=0, smallest=1)
    tensors = tensors_of_all_dtypes()
    write_weights(tensors, tmp_path / "expected")
    kept = {name: store.keep(tensor) for name, tensor in tensors.items()}
    write_weights(kept, tmp_path / "found", store)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
