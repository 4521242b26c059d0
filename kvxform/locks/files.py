"""Lock files on disk."""

from __future__ import annotations

import os
import subprocess
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


def read_lock_at(path: str | Path, revision: str) -> Lock | None:
    """Read a lock file as it is in a revision of its git repository; None if it was not there.

    Raises:
        ArtifactError: KVX614 if there is no such revision or no git, and those of `read_lock`.
    """
    file = Path(path)
    commit = _git(file.parent, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise ArtifactError(
            "KVX614",
            "a base must be a revision of the git repository that the lock is in",
            where="check",
            got=repr(revision),
            hint=f"fetch it first: git fetch origin {revision}",
        )
    text = _git(file.parent, "show", f"{commit.strip()}:./{file.name}")
    return None if text is None else Lock.from_text(text, f"{path} at {revision}")


def _git(folder: Path, *words: str) -> str | None:
    """Return what a git command prints, or None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
