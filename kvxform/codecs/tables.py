"""Tables that the options of a codec determine: built once, then kept on disk and in memory.

A file holds the SHA-256 of its content and then the table, float32, in NumPy's format. One that
cannot be read is treated as absent and written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvxform.atomic import write_atomically
from kvxform.folders import cache_folder


def cached_table(name: str, build: Callable[[], Tensor]) -> Tensor:
    """Return the table called `name`, float32 on the CPU, built if it is not on disk.

    Args:
        name: File name without ending; must say everything that the table depends on, the version
            of the method included.
        build: Makes the table; must be deterministic.
    """
    path = cache_folder() / "codebooks" / f"{name}.table"
    table = _load(path)
    if table is None:
        table = build().to(torch.float32).contiguous()
        _save(path, table)
    return table


def _load(path: Path) -> Tensor | None:
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            return None
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError):
        return None
    return torch.from_numpy(array)


def _save(path: Path, table: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, table.numpy(), allow_pickle=False)
    content = buffer.getvalue()
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
