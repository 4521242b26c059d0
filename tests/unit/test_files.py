"""The kernels of a program as files: names, index, folders, and copies in artifacts."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import cached_program

from kvxform.cli.main import main
from kvxform.codegen.triton import files
from kvxform.codegen.triton.files import INDEX, check_kernels, kernel_files, write_kernels
from kvxform.codegen.triton.sites import kernel_specs
from kvxform.errors import ArtifactError, CodegenError
from kvxform.ir.artifact import save_artifact
from kvxform.ir.program import Program
from kvxform.recipe import load_recipe
from kvxform.runtime.loading import load_model
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4, "axis": "token", "symmetric": False}
INT8 = {**INT4, "bits": 8}


def make_program(**changes: Any) -> Program:
    model = {"head_dim": 64, "dtype": torch.float16, "layers": 3, **changes}
    return cached_program({"key": INT4, "value": INT4}, 32, **model)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact with its kernels, as a recipe that targets triton gives it."""
    program = make_program()
    save_artifact(tmp_path / "artifact", program, files.artifact_kernels(program))
    return tmp_path / "artifact"


def edit(folder: Path, name: str, old: str, new: str) -> None:
    """Change a file so that nobody sees it by its hash alone."""
    path = folder / "kernels" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def kernel(folder: Path, kind: str) -> str:
    return next(p.name for p in (folder / "kernels").iterdir() if p.name.startswith(kind))


def test_equal_layers_share_files():
    program = make_program()
    found = kernel_files(program)
    assert sorted(name.split("_")[0] for name in found) == sorted(
        ["append", "decode", "gather", "prefill", INDEX]
    )
    index = json.loads(found[INDEX])
    assert index["bytes_per_token"] == program.plan.bytes_per_token
    (site,) = index["sites"]
    assert site["layers"] == [0, 1, 2]
    assert site["bytes_per_token"] * 3 == index["bytes_per_token"]
    assert set(site["files"]) == {"append", "decode", "gather", "prefill"}
    assert {*site["files"].values(), INDEX} == set(found)


def test_nothing_of_it_needs_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    assert len(kernel_files(make_program(head_dim=128, kv_heads=4))) == 5


def test_layers_that_differ_have_files_of_their_own():
    program = make_program()
    attention = program.attention_node(1)
    attention.kwargs = {**attention.kwargs, "window": 32}
    found = kernel_files(program)
    sites = json.loads(found[INDEX])["sites"]
    assert [site["layers"] for site in sites] == [[0, 2], [1]]
    first, second = (site["files"] for site in sites)
    assert {kind for kind in first if first[kind] != second[kind]} == {"decode", "prefill"}
    assert len(found) == 4 + 2 + 1


def test_files_are_python_with_the_meta_of_their_spec():
    program = make_program()
    spec = kernel_specs(program)[0].decode
    (name,) = (name for name in kernel_files(program) if name.startswith("decode"))
    meta = ast.literal_eval(ast.parse(kernel_files(program)[name]).body[-1].value)
    assert meta["kernel"] == "decode"
    assert meta["spec"] == json.loads(json.dumps(spec.to_json()))
    assert meta["bytes_per_token"] * 3 == program.plan.bytes_per_token


def test_a_folder_is_replaced_as_a_whole_and_no_other(tmp_path: Path):
    first = write_kernels(make_program(), tmp_path / "out")
    again = write_kernels(make_program(head_dim=128), tmp_path / "out")
    assert set(again) == set((tmp_path / "out").iterdir())
    assert again[-1] == first[-1] == tmp_path / "out" / INDEX
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="KVX601"):
        write_kernels(make_program(), tmp_path / "mine")


def test_a_program_without_a_cache_is_refused():
    program = make_program()
    program.plan = None
    with pytest.raises(CodegenError, match="KVX401"):
        kernel_files(program)


def test_an_artifact_with_its_kernels_loads(artifact: Path):
    assert check_kernels(load_model(artifact).program, artifact) is None


@pytest.mark.triton
@pytest.mark.parametrize(("target", "has_kernels"), [("triton", True), ("eager", False)])
def test_a_model_is_saved_with_the_kernels_that_it_runs(
    target: str, has_kernels: bool, tmp_path: Path
):
    passes = [{"insert-cache": {}}, {"quantize-kv": {"key": INT4, "value": INT4}}]
    recipe = load_recipe(
        {"version": 1, "name": "t", "passes": passes, "target": {"lowering": target}}
    )
    OptimizedModel(make_program(), recipe=recipe).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "kernels" / INDEX).is_file() == has_kernels
    assert load_model(tmp_path / "saved").recipe == recipe


def test_an_artifact_without_kernels_loads(tmp_path: Path):
    save_artifact(tmp_path / "plain", make_program())
    assert load_model(tmp_path / "plain").plan is not None


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_tampered_kernel_is_refused(artifact: Path, kind: str):
    program = load_model(artifact).program
    name = kernel(artifact, kind)
    edit(artifact, name, "import torch", "import torch, os")
    with pytest.raises(ArtifactError, match=f"KVX602 .kernels/{name}. kernels in an artifact"):
        check_kernels(program, artifact)
    with pytest.raises(ArtifactError, match=r"KVX602 .* as it was saved"):  # the lock sees it too
        load_model(artifact)


def test_a_missing_or_further_kernel_is_refused(artifact: Path):
    program = load_model(artifact).program
    extra = artifact / "kernels" / "extra.py"
    extra.write_text("raise SystemExit\n")
    with pytest.raises(ArtifactError, match=r"KVX602 .kernels/extra\.py"):
        check_kernels(program, artifact)
    extra.unlink()
    name = kernel(artifact, "gather")
    (artifact / "kernels" / name).unlink()
    with pytest.raises(ArtifactError, match=f"KVX602 .kernels/{name}"):
        check_kernels(program, artifact)


@pytest.mark.parametrize("content", [None, "", "[]", '{"made_with": 3}'])
def test_kernels_without_an_index_are_refused(artifact: Path, content: str | None):
    program = load_model(artifact).program
    index = artifact / "kernels" / INDEX
    index.unlink()
    if content is not None:
        index.write_text(content)
    with pytest.raises(ArtifactError, match=r"KVX602 .* must have their index"):
        check_kernels(program, artifact)


def test_kernels_of_another_version_are_not_compared(artifact: Path):
    program = load_model(artifact).program
    edit(artifact, INDEX, files.made_with()["generator"], "0" * 16)
    edit(artifact, kernel(artifact, "decode"), "import torch", "import torch, os")
    assert check_kernels(program, artifact) is None


def test_the_verb_writes_the_kernels_of_an_artifact(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert main(["codegen", str(artifact), "-o", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["files"]) == {p.name for p in out.iterdir()}
    for path in out.iterdir():
        assert path.read_bytes() == (artifact / "kernels" / path.name).read_bytes()
    assert main(["codegen", str(artifact), "-o", str(out), "--interpret"]) == 0
    *names, last = capsys.readouterr().out.splitlines()
    assert {Path(name).name for name in names} == {p.name for p in out.iterdir()}
    assert last == "cache: 432 B per token"
    assert sum(path.stem.endswith("_interpret") for path in out.iterdir()) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ARTIFACT", "-r", "kv4"], "KVX801 what is optimised already takes no recipe"),
        (["smollm2-135m"], "KVX801 a model that is not an artifact needs a recipe"),
    ],
)
def test_the_verb_refuses(words, message, artifact, tmp_path, capsys):
    words = [str(artifact) if word == "ARTIFACT" else word for word in words]
    assert main(["codegen", *words, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
