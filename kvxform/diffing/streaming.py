"""Weights that are read from their file when they are used, and freed after.

A mapped file would stay resident until the system wants its memory back. Here every weight that is
looked up is read into a buffer of its own, which is gone with the last reference to it. So what a
run holds of a model is the weights of the operation at hand.
"""

from __future__ import annotations

import json
import math
import mmap
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.errors import ArtifactError
from kvxform.ir.artifact import WEIGHTS, check_artifact, load_program
from kvxform.ir.program import Program
from kvxform.ir.schema import WeightEntry
from kvxform.ir.weights import FORMAT_NAMES

SMALL = 16 << 10  # bytes up to which a weight is kept: gains of norms, tables of frequencies
KEPT = 32 << 20  # bytes of free buffers that are kept
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
        self._buffers = _Buffers()
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

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return rows of a matrix, `[*index.shape, columns]`; nothing else of it is read.

        Args:
            name: The weight.
            index: int64 of any shape.
        """
        kept = super().__getitem__(name)
        if not kept.is_meta:
            return kept[index]
        unique, places = index.unique(return_inverse=True)
        found = torch.empty(len(unique), *kept.shape[1:], dtype=kept.dtype)
        size = found[:1].nbytes
        with self._path.open("rb", buffering=0) as file:
            for target, row in zip(found, unique.tolist(), strict=True):
                file.seek(self._places[name] + row * size)
                _fill(file, target.view(torch.uint8).numpy().data)
        return found[places]

    def _read(self, name: str, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        buffer = self._buffers.take(like.nbytes)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._places[name])
            _fill(file, buffer.data)
        return torch.from_numpy(buffer).view(like.dtype).view(like.shape)


class _Buffers:
    """Memory for weights: of what is free again, a few megabytes are kept for the next ones.

    It comes from the system in pages of its own and goes back to it; the heap would keep it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._free_bytes = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes, free again when nothing refers to the array any more."""
        free = self._free.get(size)
        if free:
            memory = free.pop()
            self._free_bytes -= size
        else:
            memory = mmap.mmap(-1, size)
        array = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(array, self._give, memory).atexit = False
        return array

    def _give(self, memory: mmap.mmap) -> None:
        size = len(memory)
        if self._free_bytes + size <= KEPT:
            self._free.setdefault(size, []).append(memory)
            self._free_bytes += size


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
