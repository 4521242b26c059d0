"""Hashes of files, and descriptions that carry a hash of themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvxform.ir.schema import canonical_json

SEAL = "checksum"  # key of the hash of all other entries


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, which is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with the hash of its entries under `SEAL`; an older hash is replaced."""
    return {**data, SEAL: _digest(data)}


def is_sealed(data: Mapping[str, Any]) -> bool:
    """Whether the entries are those that were sealed; how they are laid out does not matter."""
    return data.get(SEAL) == _digest(data)


def _digest(data: Mapping[str, Any]) -> str:
    entries = {key: value for key, value in data.items() if key != SEAL}
    return hashlib.sha256(canonical_json(entries)).hexdigest()
