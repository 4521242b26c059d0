"""Lock files on disk."""

from __future__ import annotations

import os
from pathlib import Path

from kvxform.errors import ArtifactError
from kvxform.locks.records import Lock, is_lock


def read_lock(path: str | Path) -> Lock:
    """Read a lock file.

    Raises:
        ArtifactError: KVX610 if there is none, KVX611 if it is damaged, KVX612 if it has another
            version.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            "KVX610",
            "a lock must be a file that can be read",
            got=str(path),
            hint="make one: kvxform lock SOURCE -r RECIPE -o kvxform.lock",
        ) from error
    return Lock.from_text(text, str(path))


def write_lock(lock: Lock, path: str | Path) -> int:
    """Write a lock file in one move, and return its size in bytes.

    Raises:
        ArtifactError: KVX610 if `path` is something else than a lock, or cannot be written.
    """
    target, data = Path(path), lock.to_text().encode()
    if target.exists() and not is_lock(target):
        raise ArtifactError(
            "KVX610", "only a lock may be replaced", got=str(path), hint="choose another file"
        )
    temporary = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        rule = f"a lock must be a file that can be written ({error.strerror})"
        raise ArtifactError("KVX610", rule, got=str(path)) from error
    return len(data)
