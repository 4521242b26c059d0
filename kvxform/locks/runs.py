"""Check lock files: build what each of them names, compare, and write it anew if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvxform.diffing.records import DiffResult
from kvxform.errors import KvxformError
from kvxform.locks.building import Builder, resolve_path, resolve_source
from kvxform.locks.checking import compare_locks
from kvxform.locks.files import read_lock, write_lock
from kvxform.locks.making import make_lock
from kvxform.locks.records import Lock


@dataclass(frozen=True)
class Checked:
    """What became of one lock file.

    Attributes:
        path: As the user named it.
        result: How the build differs from it; None if there is no build.
        error: Why there is none, as one line, or empty.
        updated: Whether the file was written anew.
    """

    path: str
    result: DiffResult | None
    error: str = ""
    updated: bool = False

    @property
    def exit_code(self) -> int:
        """0 if the build is what the lock says, or now is; 1 if it differs; 2 without a build."""
        if self.result is None:
            return 2
        return 0 if self.updated else self.result.exit_code


def check_files(
    paths: Iterable[str],
    *,
    source: str | None = None,
    update: bool = False,
    progress: bool = True,
    talk: Callable[[str], None] = lambda _: None,
) -> list[Checked]:
    """Check lock files; one that cannot be built does not stop the others.

    Args:
        paths: Lock files.
        source: Model or artifact instead of the one that a lock names.
        update: Write a lock anew if its build differs; one that agrees stays as it is, to the byte.
        progress: Show progress on stderr.
        talk: Called with a line before each.
    """
    builder = Builder(progress)
    checks = []
    for path in paths:
        talk(f"checking {path}")
        try:
            checks.append(_check(builder, path, source, update))
        except KvxformError as error:
            checks.append(Checked(path, None, str(error)))
    return checks


def _check(builder: Builder, path: str, source: str | None, update: bool) -> Checked:
    lock = read_lock(path)
    folder = Path(path).parent
    model = builder.build(lock.build, folder, source=source)
    lengths = None if lock.digest is None else lock.digest.lengths
    found = make_lock(model, build=lock.build, digest=lengths is not None, lengths=lengths)
    words = _build_words(lock, folder, source)
    result = compare_locks(lock, found, name=path, other_name=words, other_kind="program")
    if update and not result.is_same:
        write_lock(make_lock(model, build=lock.build, digest=lengths is not None), path)
        return Checked(path, result, updated=True)
    return Checked(path, result)


def _build_words(lock: Lock, folder: Path, source: str | None) -> str:
    if source is not None:
        return source
    assert lock.build is not None, "else there is no build without a source"
    named = resolve_source(lock.build.source, folder)
    if not lock.build.recipe:
        return named
    return f"{named} with {resolve_path(lock.build.recipe, folder)}"
