"""Captured programs kept in the user's cache folder, without weights.

With one of them `kvxform plan` and `explain` need no model: the graph, the sites and the shapes of
all weights are there, and the values of rotary frequencies. An entry that cannot be read is treated
as absent and written again.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from kvxform.atomic import write_atomically
from kvxform.errors import ArtifactError
from kvxform.folders import cache_folder
from kvxform.ir.artifact import decode_program, encode_program
from kvxform.ir.program import Program
from kvxform.ir.schema import ProgramFile, canonical_json, parse_file
from kvxform.ir.weights import make_meta_weights


class CaptureFile(ProgramFile):
    """One entry: a program, and the values of its smallest tables by name."""

    tables: dict[str, tuple[float, ...]]


def load_capture(key: str) -> Program | None:
    """Return the program stored under `key`, or None; weights but for rotary tables are meta.

    Args:
        key: Any text; the caller puts into it whatever the capture depends on.
    """
    try:
        digest, _, content = _path(key).read_bytes().partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            return None
        file = parse_file(CaptureFile, content, _path(key).name)
        return decode_program(file, None, _make_weights(file))
    except (OSError, ArtifactError):
        return None


def _make_weights(file: CaptureFile) -> dict[str, Tensor]:
    weights = make_meta_weights(file.weights)
    for name, values in file.tables.items():
        if name not in weights or weights[name].shape != (len(values),):
            raise ArtifactError("KVX602", "a table must be a weight", got=repr(name))
        weights[name] = torch.tensor(values, dtype=weights[name].dtype)
    return weights


def _tables(program: Program) -> dict[str, list[float]]:
    names = {site.rope.inv_freq for site in program.sites if site.rope is not None}
    values = {name: program.weights[name] for name in sorted(names)}
    return {name: value.double().tolist() for name, value in values.items() if not value.is_meta}


def save_capture(key: str, program: Program) -> None:
    """Store an uncached program, as capture made it, under `key`; does nothing if it cannot."""
    content = canonical_json({**encode_program(program), "tables": _tables(program)})
    digest = hashlib.sha256(content).hexdigest().encode()
    path = _path(key)
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest + b"\n" + content)


def _path(key: str) -> Path:
    return cache_folder() / "captures" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
