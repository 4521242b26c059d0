"""Exported programs in files: read without running anything that is in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvxform.capture import open_source
from kvxform.capture.pt2_files import open_pt2
from kvxform.errors import CaptureError

Change = Callable[[dict[str, bytes]], None]


class Tiny(nn.Module):
    """A table and a product; its sizes have expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.line = nn.Embedding(10, 4), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.line(torch.cat([x, x * ids.shape[1]], -1).flatten(0, 1))


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    torch.manual_seed(0)
    auto = torch.export.Dim.DYNAMIC
    shapes = ({0: auto, 1: auto},)
    program = torch.export.export(
        Tiny(), (torch.zeros(2, 5, dtype=torch.int64),), None, dynamic_shapes=shapes
    )
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    torch.export.save(program, path)
    return path.read_bytes()


def changed(saved: bytes, change: Change, path: Path) -> Path:
    """Write the archive with other members, keyed by their names without the root."""
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(names)).partition("/")[0]
    members = {name.removeprefix(f"{root}/"): content for name, content in names.items()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return path


def edit(member: str, old: str, new: str) -> Change:
    def change(members: dict[str, bytes]) -> None:
        (name,) = (n for n in members if n.startswith(member))
        text = members[name].decode()
        assert old in text, "the planted change must fire"
        members[name] = text.replace(old, new).encode()

    return change


def test_a_saved_program_is_the_same_program(saved, tmp_path):
    path = tmp_path / "tiny.pt2"
    path.write_bytes(saved)
    program = open_pt2(path)
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3, 9]])
    assert torch.equal(program.module()(ids), Tiny()(ids))
    source = open_source(str(path))
    assert (source.info.name, source.info.family) == ("tiny.pt2", "ExportedProgram")


def test_an_archive_that_is_put_together_again_is_read(saved, tmp_path):
    """The near miss of everything below."""
    open_pt2(changed(saved, lambda _: None, tmp_path / "same.pt2"))


def test_expressions_of_sizes_are_no_python(saved, tmp_path):
    mark = tmp_path / "was_here"
    harm = f"__import__('os').mkdir('{mark}')"
    change = edit("models/", '"expr_str": "', f'"expr_str": "{harm} or ')
    with pytest.raises(CaptureError, match=r"KVX301.*no expression of sizes"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "torch.ops.aten", "_operator.a.b", "#torch.ops.x", ""]
)
def test_only_operators_are_called(saved, target, tmp_path):
    change = edit("models/", '"torch.ops.aten.linear.default"', json.dumps(target))
    with pytest.raises(CaptureError, match="is no operator"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))


def test_pickled_weights_are_refused(saved, tmp_path):
    change = edit("data/weights/model_weights_config", '"use_pickle": false', '"use_pickle": true')
    with pytest.raises(CaptureError, match="is pickled"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))


def test_pickled_sample_inputs_are_not_opened(saved, tmp_path):
    mark = tmp_path / "was_here"

    def change(members: dict[str, bytes]) -> None:
        (name,) = (n for n in members if n.startswith("data/sample_inputs/"))
        buffer = io.BytesIO()
        torch.save((Harmful(mark),), buffer)
        members[name] = buffer.getvalue()

    with pytest.raises(CaptureError, match="sample inputs are no plain tensors"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["data/aotinductor/model/x.so", "data/weights/model.pt", "x.pkl"])
def test_members_that_torch_would_run_are_refused(saved, name, tmp_path):
    def change(members: dict[str, bytes]) -> None:
        members[name] = pickle.dumps({})

    with pytest.raises(CaptureError, match="is no part of a plain exported program"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))


def test_containers_that_import_modules_are_refused(saved, tmp_path):
    change = edit("models/", '"in_spec": "', '"in_spec": "default_factory_module ')
    with pytest.raises(CaptureError, match="name a module to import"):
        open_pt2(changed(saved, change, tmp_path / "x.pt2"))


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive"])
def test_damaged_files_have_one_clear_line(content, tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"KVX301 .*cannot be read") as caught:
        open_pt2(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CaptureError, match="KVX301"):
        open_pt2(tmp_path / "none.pt2")
