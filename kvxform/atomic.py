"""Output folders that are either the complete old one or the complete new one.

A folder is written beside its target and moved into place when everything is on disk. On Linux
the move is one exchange (`renameat2`), so that there is no moment without a complete folder. Where
the system or the file system has no exchange, the old folder is first renamed aside; a process
killed between those two renames leaves no folder, and the next run puts the old one back. Locks on
folders (`flock`) tell runs that were killed from runs that are still at work.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kvxform.errors import ArtifactError

MARKERS = ("checksums.json", "kvxform.json")  # a folder with one of them was written by kvxform
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    Args:
        path: A folder that does not exist, is empty, or was written by kvxform (see `MARKERS`).

    Raises:
        ArtifactError: KVX601 if `path` is something else; nothing has been written then.
    """
    target = Path(os.path.realpath(path))
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_dead_processes(target)
    temporary, lock = _make_locked_folder(target)
    try:
        yield temporary
        _sync_tree(temporary)
        check_replaceable(target)
        _move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange: the old folder
        os.close(lock)


def check_replaceable(path: Path) -> None:
    """Raise ArtifactError KVX601 unless `path` may be replaced by an output of kvxform."""
    if not path.exists():
        return
    if path.is_dir():
        names = os.listdir(path)
        if not names or any(marker in names for marker in MARKERS):
            return
    raise ArtifactError(
        "KVX601",
        "an output folder must be new, empty, or written by kvxform",
        got=str(path),
        hint="choose another folder, or remove this one yourself",
    )


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `OptimizedModel.save` wrote, whole or not."""
    return any((Path(path) / name).is_file() for name in ("checksums.json", "program.json"))


def safe_join(folder: Path, relative: str) -> Path:
    """Return `folder / relative` if it lies inside `folder`, links resolved.

    Args:
        folder: The folder that must not be left.
        relative: A path with `/` between its parts.

    Raises:
        ArtifactError: KVX603 for absolute paths, `..`, and links that lead out of the folder.
    """
    pure = PurePosixPath(relative)
    is_plain = relative.isprintable() and "\\" not in relative and str(pure) == relative
    if is_plain and pure.parts and not pure.is_absolute() and ".." not in pure.parts:
        joined = folder / relative
        if Path(os.path.realpath(joined)).is_relative_to(os.path.realpath(folder)):
            return joined
    raise ArtifactError(
        "KVX603", "a path in an artifact must stay inside its folder", got=repr(relative)
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write one file so that readers see the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_into_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(renameat2(*paths, _RENAME_EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for directory, _, files in os.walk(folder):
        for name in files:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_locked_folder(target: Path) -> tuple[Path, int]:
    """Make a folder beside `target`, locked until its descriptor is closed or the process ends."""
    while True:
        folder = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
        folder.mkdir()
        descriptor = _lock(folder, wait=True)
        if descriptor is not None:
            return folder, descriptor  # else another process cleaned it up before it was locked


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock `folder`; return a descriptor to close, or None if it is held elsewhere or gone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
            os.close(descriptor)
        except OSError:
            os.close(descriptor)
    return None


def _clean_up_after_dead_processes(target: Path) -> None:
    """Remove folders left by killed runs; put an old folder back if it is all there is."""
    for kind in ("old", "new"):
        prefix = f".{target.name}.{kind}-"
        for name in sorted(n for n in os.listdir(target.parent) if n.startswith(prefix)):
            folder = target.with_name(name)
            descriptor = _lock(folder, wait=False)
            if descriptor is None:
                continue
            if kind == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
