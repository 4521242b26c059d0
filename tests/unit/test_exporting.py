"""An export runs its package against the eager lowering, and gives no place to a wrong one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from cached import cached_program

from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.forms import Form
from kvxform.errors import VerifyError
from kvxform.runtime.exporting import Verdict, provider_here, why_not_here
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_files import check_package

INT4 = {"codec": "int", "bits": 4}
KV4 = {"key": INT4, "value": INT4, "regions": {"sink": 4}}


def model(plan=None):
    return OptimizedModel(cached_program(plan, None, dtype=torch.float32, layers=1))


def test_a_package_is_run_before_it_counts(tmp_path):
    told = []
    folder = model().export_onnx(tmp_path / "out", progress=told.append)
    ran = ("chunked-prefill", "decode")
    verdict = Verdict.of(folder)
    assert (verdict.is_verified, verdict.schedules) == (True, ran)
    assert verdict.left_out == {"ring-wrap": "no window or chunk of at most 512 tokens"}
    assert str(verdict) == f"verified against the eager lowering: {', '.join(ran)}"
    assert check_package(folder)["verification"] == verdict.to_data()
    names = ["chunked prefill", "decode"]
    assert told[-2:] == [f"verify package: {name}" for name in names]


def test_rows_of_one_length_are_run_as_such(tmp_path):
    verdict = Verdict.of(model(KV4).export_onnx(tmp_path / "out"))
    assert verdict.schedules == ("chunked-prefill", "decode")
    assert Verdict.of(model().export_onnx(tmp_path / "out")).is_verified


def test_nothing_is_run_if_it_is_not_asked_for(tmp_path):
    folder = model().export_onnx(tmp_path / "out", verify="none")
    assert str(Verdict.of(folder)) == "not verified: it was not asked for"


def break_attention(monkeypatch):
    """Let the graph scale scores by twice what it must."""
    right = Builder.ops

    def wrong(self, op_type, *inputs, **options):
        if op_type == "Attention":
            options["scale"] *= 2
        return right(self, op_type, *inputs, **options)

    monkeypatch.setattr(Builder, "ops", wrong)


def test_a_wrong_graph_is_found_and_nothing_is_left(tmp_path, monkeypatch):
    break_attention(monkeypatch)
    with pytest.raises(VerifyError, match=r"KVX503 .*within 3e-04; got .* at chunked prefill"):
        model().export_onnx(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_older_package_stays_if_the_new_one_is_wrong(tmp_path, monkeypatch):
    folder = model().export_onnx(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    break_attention(monkeypatch)
    with pytest.raises(VerifyError, match="KVX503"):
        model().export_onnx(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    wrong = model().export_onnx(tmp_path / "wrong", verify="none")
    assert not Verdict.of(wrong).is_verified


def test_equal_models_give_equal_packages(tmp_path):
    first, second = (model().export_onnx(tmp_path / name) for name in "ab")
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, second)]
    assert files[0] == files[1]
    assert json.loads(files[0]["kvxform.json"])["verification"]["verified"] is True


HERE = Form("L1", 23, "cpu", "1.30", "grow", "all", "source")


def test_what_cannot_run_here_says_why(monkeypatch):
    assert why_not_here(HERE, "float32") == ""
    assert why_not_here(HERE, "float16") == ""
    paged = Form("L4", 23, "cuda", "1.30", "paged", "all", "source")
    monkeypatch.setattr("kvxform.runtime.exporting.has_cuda", lambda: False)
    assert "PagedAttention" in why_not_here(paged, "float16")
    half = dataclasses.replace(paged, level="L3")
    assert "bfloat16" in why_not_here(half, "bfloat16")
    assert why_not_here(half, "float16") == ""
    newer = Form("L1", 25, "cpu", "9.9", "grow", "all", "source")
    assert why_not_here(newer, "float32").startswith("it needs onnxruntime 9.9, 1.")
    monkeypatch.setattr("kvxform.runtime.exporting.has_cuda", lambda: True)
    assert why_not_here(paged, "float16") == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert why_not_here(HERE, "float32") == "onnxruntime is not installed"


def test_a_package_that_cannot_run_here_is_written_unverified(tmp_path, monkeypatch):
    monkeypatch.setattr("kvxform.runtime.exporting.why_not_here", lambda *_: "there is no GPU")
    folder = model().export_onnx(tmp_path / "out")
    assert str(Verdict.of(folder)) == "not verified: there is no GPU"


@pytest.mark.parametrize(
    ("level", "dtype", "expected"),
    [("L2", "float16", "cuda"), ("L3", "float16", "cpu"), ("L3", "bfloat16", "cuda")],
)
def test_codes_of_an_attention_that_prompts_do_not_read_are_compared_on_the_cpu(
    monkeypatch, level, dtype, expected
):
    form = Form(level, 23, "cuda", "1.31", "buffer", "last", "source")
    monkeypatch.setattr("kvxform.runtime.exporting.has_cuda", lambda: True)
    assert provider_here(form, dtype) == expected
