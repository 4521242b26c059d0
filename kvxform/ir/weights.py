"""Read and write `weights.safetensors` without a second copy of the model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, dtype_name
from kvxform.errors import ArtifactError, RecipeError
from kvxform.ir.schema import WeightEntry


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file straight from memory.

    Only tensors that are not contiguous or not on the CPU are copied first.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=dtype_name(tensor.dtype),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in ready.items()
    }
    path.touch()
    usual = path.stat().st_mode  # what safetensors writes is readable by its owner alone
    serialize_file(specs, str(path))
    path.chmod(usual)


def read_weights(path: Path, table: Mapping[str, WeightEntry]) -> dict[str, Tensor]:
    """Return the weights of `table`; values stay on disk until they are used.

    Raises:
        ArtifactError: KVX602 if the file is damaged or does not hold what the table says.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            if names != {entry.stored for entry in table.values()}:
                raise _damaged("the weights on disk must be those of program.json", "other names")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged("a weight file must be a whole safetensors file", error) from error
    for name, entry in table.items():
        tensor = tensors[entry.stored]
        found = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if found != (entry.dtype, entry.shape):
            raise _damaged(f"weight {name} must be {entry.dtype} {entry.shape}", found)
    return {name: tensors[entry.stored] for name, entry in table.items()}


def make_meta_weights(table: Mapping[str, WeightEntry]) -> dict[str, Tensor]:
    """Return meta tensors with the dtypes and shapes of `table`.

    Raises:
        ArtifactError: KVX602 if a dtype or shape is none that torch knows.
    """
    tensors: dict[str, Tensor] = {}
    for name, entry in table.items():
        if entry.stored not in tensors:
            try:
                dtype = dtype_from_name(entry.dtype)
                tensors[entry.stored] = torch.empty(entry.shape, dtype=dtype, device="meta")
            except (RecipeError, RuntimeError, OverflowError, TypeError) as error:
                raise _damaged(f"weight {name} must have a dtype and a shape", error) from error
    return {name: tensors[entry.stored] for name, entry in table.items()}


def _damaged(rule: str, got: object) -> ArtifactError:
    return ArtifactError("KVX602", rule, where="weights.safetensors", got=str(got).split("\n")[0])
