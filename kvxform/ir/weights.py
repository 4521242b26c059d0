"""Read and write `weights.safetensors` without a second copy of the model in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, dtype_name
from kvxform.errors import ArtifactError, RecipeError
from kvxform.ir.schema import WeightEntry
from kvxform.ir.store import WeightStore, pieces

# Names of dtypes in the format, in the order in which a file holds them: wide ones first, so that
# every tensor is aligned.
FORMAT_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    tensors: Mapping[str, Tensor], path: Path, store: WeightStore | None = None
) -> None:
    """Write tensors to a safetensors file, one after the other and straight from memory.

    Only tensors that are not contiguous or not on the CPU are copied, each when it is its turn. The
    bytes are those that the library `safetensors` writes; that one needs all tensors at once.

    Args:
        tensors: What to write, by name.
        path: The file.
        store: Gives pages of mapped tensors back on the way.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(FORMAT_NAMES)}
    order = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    entries, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": FORMAT_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            for piece in pieces(tensors[name].cpu()):
                file.write(piece)
                if store is not None:
                    store.trim()


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
