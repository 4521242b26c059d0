"""Tables on disk: built once, the same bytes twice, written again when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvxform.codecs.lloyd_tables import sphere_table
from kvxform.codecs.tables import cached_table
from kvxform.folders import cache_folder


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    return tmp_path / "codebooks"


class Builder:
    """Counts how often a table is built."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def test_a_table_is_built_once_and_read_afterwards(folder):
    build = Builder()
    first, second = cached_table("t", build), cached_table("t", build)
    assert build.calls == 1
    assert first.dtype == second.dtype == torch.float32
    assert torch.equal(first, second)
    assert [path.name for path in folder.iterdir()] == ["t.table"]


@pytest.mark.parametrize("damage", [b"", b"x", b"00\n123"])
def test_a_damaged_file_is_written_again(folder, damage):
    build = Builder()
    cached_table("t", build)
    whole = (folder / "t.table").read_bytes()
    (folder / "t.table").write_bytes(damage)
    assert torch.equal(cached_table("t", build), build().float())
    assert (folder / "t.table").read_bytes() == whole
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (folder / "t.table").write_bytes(bytes(flipped))
    assert torch.equal(cached_table("t", build), build().float())


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file is in the way")
    build = Builder()
    for _ in range(2):
        cached_table("t", build)
    assert build.calls == 2


def test_tables_of_codecs_are_found_on_disk_by_a_new_process(folder):
    sphere_table.cache_clear()
    first = sphere_table(4, 8)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    sphere_table.cache_clear()
    assert torch.equal(sphere_table(4, 8), first)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert [name for name in written if name.startswith("sphere-4-8-")]
