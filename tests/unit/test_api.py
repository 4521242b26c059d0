"""The public API: names, signatures, and a round trip on a tiny Hugging Face model."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_hf

import kvxform
from kvxform.api import resolve_recipe
from kvxform.errors import ArtifactError, CodegenError, KvxformError, RecipeError
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

EXACT = {
    "version": 1,
    "name": "plain",
    "passes": ["insert-cache", {"page-cache": {"page_size": 16}}],
}


def test_public_names_are_frozen():
    assert sorted(kvxform.__all__) == [
        "ArtifactError",
        "CacheFullError",
        "CaptureError",
        "CodegenError",
        "KvxformError",
        "PassError",
        "Recipe",
        "RecipeError",
        "VerifyError",
        "__version__",
        "bisect",
        "diff",
        "heal",
        "load",
        "optimize",
        "verify_artifact",
    ]
    for name in kvxform.__all__:
        assert getattr(kvxform, name) is not None
    assert sorted(kvxform.__all__) == dir(kvxform)
    with pytest.raises(AttributeError, match="nothing"):
        kvxform.nothing  # noqa: B018


def test_signatures_are_frozen():
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind.name, p.default) for p in parameters]

    word, only = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    assert shape(kvxform.optimize) == [
        ("model", word, inspect.Parameter.empty),
        ("recipe", word, "kv4"),
        ("calibration", only, None),
        ("target", only, None),
        ("verify", only, "probe"),
        ("device", only, None),
        ("progress", only, True),
    ]
    assert shape(kvxform.heal) == [
        ("artifact", word, inspect.Parameter.empty),
        ("source", word, inspect.Parameter.empty),
        ("text", only, None),
        ("options", only, None),
        ("device", only, None),
        ("checkpoint", only, None),
        ("resume", only, False),
        ("progress", only, True),
    ]
    assert shape(kvxform.verify_artifact) == [
        ("target", word, inspect.Parameter.empty),
        ("source", only, None),
        ("schedules", only, None),
        ("lowering", only, None),
        ("progress", only, True),
    ]
    assert shape(kvxform.load) == [
        ("path", word, inspect.Parameter.empty),
        ("device", only, None),
        ("target", only, None),
    ]


def test_methods_of_a_model_are_frozen():
    methods = {name for name in dir(OptimizedModel) if not name.startswith("_")}
    assert methods >= {
        "as_huggingface",
        "device",
        "export_onnx",
        "generate",
        "new_session",
        "plan",
        "save",
        "tokenizer",
    }
    assert list(inspect.signature(OptimizedModel.as_huggingface).parameters) == ["self"]


def test_import_is_quick_because_it_leaves_torch_alone():
    code = "import sys, kvxform; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def folder_hash(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@dataclass(frozen=True)
class Run:
    model: torch.nn.Module
    opt: Any
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def done() -> Run:
    """One run that several tests look at; capturing a model takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    model = tiny_hf("llama")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        opt = kvxform.optimize(model, EXACT)
    return Run(model, opt, out.getvalue(), err.getvalue())


def test_optimised_model_comes_back_from_its_folder(done, tmp_path):
    opt, ids = done.opt, torch.randint(0, 97, (2, 12))
    torch.testing.assert_close(opt(ids), done.model(ids).logits, rtol=0, atol=1e-4)
    opt.save(tmp_path / "a")
    again = kvxform.load(tmp_path / "a")
    assert torch.equal(again(ids), opt(ids))
    assert again.plan == opt.plan
    assert again.recipe == opt.recipe == load_recipe(EXACT)
    assert again.report.to_json() == opt.report.to_json()
    assert again.report.source.capture_error < 1e-4
    assert (tmp_path / "a" / "report.html").read_text("utf-8") == opt.report.to_html()


def test_equal_runs_give_equal_folders_and_leave_the_model_alone(done, tmp_path, capsys):
    before = tiny_hf("llama").state_dict()
    kvxform.optimize(done.model, EXACT, progress=False).save(tmp_path / "b")
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(before[name], p) for name, p in done.model.state_dict().items())
    done.opt.save(tmp_path / "a")
    first, second = folder_hash(tmp_path / "a"), folder_hash(tmp_path / "b")
    assert first == second
    assert {"report.json", "report.html", "recipe.yaml", "plan.json"} <= first.keys()
    assert str(tmp_path) not in (tmp_path / "a" / "report.json").read_text("utf-8")


def test_progress_goes_to_stderr_one_line_a_stage(done):
    assert done.stdout == ""
    assert "[2/3] insert-cache" in done.stderr
    assert "[3/3] page-cache" in done.stderr


def test_the_target_overrides_that_of_the_recipe():
    assert resolve_recipe(EXACT, "onnx").target.lowering == "onnx"
    assert resolve_recipe(EXACT, None).target.lowering == "eager"


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"recipe": "kv5"}, RecipeError, "KVX101"),
        ({"target": "cuda"}, RecipeError, "KVX107"),
        ({"calibration": ["text"]}, RecipeError, "KVX107"),
        ({"calibration": "no-such-text.txt"}, KvxformError, "KVX801"),
        ({"verify": "some"}, RecipeError, "KVX107"),
        ({"device": "abacus"}, KvxformError, "KVX704"),
    ],
)
def test_bad_options_are_refused(options, error, code):
    with pytest.raises(error, match=code):
        kvxform.optimize(torch.nn.Identity(), **{"recipe": EXACT, "progress": False, **options})


def test_a_target_that_the_machine_cannot_run_is_refused_before_any_work(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = {"recipe": EXACT, "target": "triton", "device": "cpu", "progress": False}
    with pytest.raises(CodegenError, match=r"KVX401 .* needs a CUDA device; got cpu"):
        kvxform.optimize(torch.nn.Identity(), **options)


def test_a_folder_that_was_tampered_with_is_refused(done, tmp_path):
    done.opt.save(tmp_path / "a")
    recipe = tmp_path / "a" / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="KVX602"):
        kvxform.load(tmp_path / "a")
    with pytest.raises(ArtifactError, match="KVX601"):
        kvxform.load(tmp_path / "missing")
