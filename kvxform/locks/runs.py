"""Check lock files: build what each of them names, compare, and write it anew if asked."""

from __future__ import annotations

import functools
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvxform.diffing.records import DiffResult
from kvxform.errors import KvxformError
from kvxform.locks.building import Builder, resolve_path, resolve_source
from kvxform.locks.checking import compare_locks
from kvxform.locks.files import read_lock, read_lock_at, write_lock
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
        since: How the build differs from the lock in the base revision; None if none was given.
        is_new: Whether the base revision has no such lock.
    """

    path: str
    result: DiffResult | None
    error: str = ""
    updated: bool = False
    since: DiffResult | None = None
    is_new: bool = False

    @property
    def shown(self) -> DiffResult | None:
        """What a reader wants to see: what changed since the base if that is known."""
        return self.result if self.since is None else self.since

    @property
    def exit_code(self) -> int:
        """0 if the build is what the lock says, or now is; 1 if it differs; 2 without a build."""
        if self.result is None:
            return 2
        return 0 if self.updated else self.result.exit_code


def check_files(
    paths: Sequence[str],
    *,
    source: str | None = None,
    update: bool = False,
    base: str | None = None,
    jobs: int = 1,
    progress: bool = True,
    talk: Callable[[str], None] = lambda _: None,
) -> list[Checked]:
    """Check lock files; one that cannot be built does not stop the others.

    Args:
        paths: Lock files.
        source: Model or artifact instead of the one that a lock names.
        update: Write a lock anew if its build differs; one that agrees stays as it is, to the byte.
        base: Revision of git; compare with its locks too, to show what a branch changes.
        jobs: Processes to work in; with more than one there is no progress and no talk.
        progress: Show progress on stderr.
        talk: Called with a line before each.
    """
    if jobs > 1 and len(paths) > 1:
        return _check_in_processes(paths, jobs, source=source, update=update, base=base)
    builder = Builder(progress)
    checks = []
    for path in paths:
        talk(f"checking {path}")
        try:
            checks.append(_check(builder, path, source, update, base))
        except KvxformError as error:
            checks.append(Checked(path, None, str(error)))
    return checks


def _check_in_processes(paths: Sequence[str], jobs: int, **options: Any) -> list[Checked]:
    """Deal the files out to processes, which capture the sources they need once each."""
    shares = [list(paths[i::jobs]) for i in range(min(jobs, len(paths)))]
    run = functools.partial(check_files, progress=False, **options)
    quiet: dict[str, Any] = {"initializer": warnings.simplefilter, "initargs": ("ignore",)}
    spawn = multiprocessing.get_context("spawn")  # threads of torch do not live through a fork
    with ProcessPoolExecutor(len(shares), spawn, **quiet) as pool:
        found = {check.path: check for share in pool.map(run, shares) for check in share}
    return [found[path] for path in paths]


def _check(
    builder: Builder, path: str, source: str | None, update: bool, base: str | None
) -> Checked:
    folder, lock = Path(path).parent, read_lock(path)
    before = None if base is None else read_lock_at(path, base)
    model = builder.build(lock.build, folder, source=source)
    words = _build_words(lock, folder, source)

    def compare(old: Lock, name: str) -> DiffResult:
        lengths = None if old.digest is None else old.digest.lengths
        found = make_lock(model, build=old.build, digest=lengths is not None, lengths=lengths)
        return compare_locks(old, found, name=name, other_name=words, other_kind="program")

    result = compare(lock, path)
    since = None if before is None else compare(before, f"{path} at {base}")
    must_write = update and not result.is_same
    if must_write:
        digest = lock.digest is not None
        write_lock(make_lock(model, build=lock.build, digest=digest), path)
    is_new = base is not None and before is None
    return Checked(path, result, updated=must_write, since=since, is_new=is_new)


def _build_words(lock: Lock, folder: Path, source: str | None) -> str:
    if source is not None:
        return source
    assert lock.build is not None, "else there is no build without a source"
    named = resolve_source(lock.build.source, folder)
    if not lock.build.recipe:
        return named
    return f"{named} with {resolve_path(lock.build.recipe, folder)}"
