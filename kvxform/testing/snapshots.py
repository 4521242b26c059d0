"""Snapshots of graphs: small files to commit, and what has changed since, in words.

A snapshot is the outline of a program: layers with the same pattern stand in it once, an operation
a line. Names of nodes and weights and lines of source code are in it for people; alone, they make
no difference.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from kvxform.differ.sides import SideLike, open_side
from kvxform.diffing.outline import Outline
from kvxform.diffing.records import DiffResult
from kvxform.diffing.render_text import render_text
from kvxform.locks.checking import compare_locks
from kvxform.locks.compact_json import compact_json
from kvxform.locks.records import Lock

UPDATE = "pytest --kvx-update"


def assert_graph_snapshot(program: SideLike, path: str | Path, *, update: bool = False) -> bool:
    """Assert that a graph, its sites and its cache plan are those of a snapshot.

    In a test, take the fixture of the same name: it knows the folder, and the option
    `--kvx-update`.

    Args:
        program: A `Program`, an `OptimizedModel`, a model, or the path of an artifact.
        path: The snapshot, a .json file.
        update: Write the snapshot instead, if it is not there or says anything else.

    Returns:
        Whether the snapshot was written.

    Raises:
        AssertionError: With what differs, layer by layer, or if there is no snapshot yet.
        KvxformError: KVX820 if `program` is none of these.
    """
    __tracebackhide__ = True
    path = Path(path)
    text = snapshot_text(program)
    kept = path.read_text(encoding="utf-8") if path.is_file() else None
    if kept == text:
        return False
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return True
    if kept is None:
        raise AssertionError(f"there is no snapshot {path.name} yet: {UPDATE}")
    try:
        result = compare_snapshots(kept, text)
    except (ValueError, KeyError, TypeError) as error:
        raise AssertionError(f"{path.name} is no snapshot: {UPDATE}") from error
    if not result.is_same:
        head = f"{path.name} differs; if that is right: {UPDATE}"
        raise AssertionError(f"{head}\n{render_text(result)}")
    return False


def snapshot_text(program: SideLike) -> str:
    """Return the text of a snapshot; equal graphs give equal text."""
    outline = open_side(program, runs=False, talk=lambda _: None).outline.without_digests()
    return compact_json(dataclasses.replace(outline, kind="program").to_data())


def compare_snapshots(before: str, after: str) -> DiffResult:
    """Compare the texts of two snapshots; ValueError, KeyError or TypeError if one is damaged."""
    outlines = [Outline.from_data(json.loads(text)) for text in (before, after)]
    locks = [Lock(outline.model, "", outline) for outline in outlines]
    return compare_locks(*locks, name="snapshot", other_name="now", other_kind="program")
