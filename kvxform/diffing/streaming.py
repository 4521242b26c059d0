"""Weights that are read from their file when they are used, and freed after.

A mapped file would stay resident until the system wants its memory back. Here every weight that is
looked up is read into a buffer of its own, which is gone with the last reference to it. So what a
run holds of a model is the weights of the operation at hand.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.errors import ArtifactError
from kvxform.ir.artifact import WEIGHTS, check_artifact, load_program
from kvxform.ir.program import Program
from kvxform.ir.schema import WeightEntry
from kvxform.ir.weights import FORMAT_NAMES

SMALL = 16 << 10  # bytes up to which a weight is kept: gains of norms, tables of frequencies
_DTYPES = {name: dtype for dtype, name in FORMAT_NAMES.items()}


class FileWeights(dict[str, Tensor]):
    """Weights of one safetensors file: listed they have shapes alone, looked up they have values.

    A copy of the mapping, as `Program.clone` makes it, has shapes alone.

    Args:
        path: The file.
        table: The names of a program, and under which name each is stored.

    Raises:
        ArtifactError: KVX602 if the file is damaged or does not hold what the table says.
    """

    def __init__(self, path: Path, table: Mapping[str, WeightEntry]) -> None:
        super().__init__()
        self._path = path
        self._places: dict[str, int] = {}
        offsets = _read_header(path)
        kept: dict[str, Tensor] = {}
        for name, entry in table.items():
            shape, dtype = entry.shape, dtype_from_name(entry.dtype)
            if offsets.get(entry.stored, (0, None, ()))[1:] != (dtype, shape):
                raise _damaged(f"weight {name} must be {entry.dtype} {shape}")
            self._places[name] = offsets[entry.stored][0]
            if entry.stored not in kept:
                meta = torch.empty(shape, dtype=dtype, device="meta")
                is_small = meta.nbytes <= SMALL
                kept[entry.stored] = self._read(name, meta) if is_small else meta
            super().__setitem__(name, kept[entry.stored])

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight with its values; KeyError if there is none."""
        kept = super().__getitem__(name)
        return self._read(name, kept) if kept.is_meta else kept

    def _read(self, name: str, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        # Pages of their own go back to the system when the tensor does; the heap would keep them.
        buffer = mmap.mmap(-1, like.nbytes)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._places[name])
            _fill(file, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)


def open_streamed(folder: Path) -> Program:
    """Check an artifact and return its program, with weights that stay in their file.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
    """
    check_artifact(folder)
    return load_program(folder, FileWeights)


def _read_header(path: Path) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
    """Return where each tensor of a safetensors file begins, its dtype and its shape."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: (8 + length + entry["data_offsets"][0], entry) for name, entry in header.items()
        }
        places = {
            name: (start, _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            for name, (start, entry) in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged("a weight file must be a whole safetensors file") from error
    size = path.stat().st_size
    ends = (at + dtype.itemsize * math.prod(shape) for at, dtype, shape in places.values())
    if max(ends, default=0) > size:
        raise _damaged("a weight file must be a whole safetensors file")
    return places


def _fill(file: BinaryIO, target: memoryview) -> None:
    """Read until `target` is full; one call of the system may read less."""
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise _damaged("a weight file must be a whole safetensors file")
        target = target[count:]


def _damaged(rule: str) -> ArtifactError:
    return ArtifactError("KVX602", rule, where=WEIGHTS)
