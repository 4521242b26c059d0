"""`kvxform bench`: what is reported of a package, an artifact and a model."""

from __future__ import annotations

import json

import pytest
import torch
from cached import cached_program

from kvxform.cli.main import main
from kvxform.codegen.onnx import export_onnx
from kvxform.runtime.model import OptimizedModel

SHORT = ["--prompt-tokens", "6", "--new-tokens", "3", "--repeats", "2", "--threads", "1"]
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    program, top = cached_program(dtype=torch.float32, layers=1), tmp_path_factory.mktemp("bench")
    export_onnx(program, top / "package")
    OptimizedModel(program).save(top / "artifact")
    return top


def bench(capsys, *words):
    assert main(["bench", *map(str, words), *SHORT, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["package", "artifact"])
def test_speed_and_memory(kind, folders, capsys):
    data = bench(capsys, folders / kind, "--batch", "2")
    assert (data["target"], data["batch"], data["prompt_tokens"]) == (kind, 2, 6)
    for rate in (data[key] for key in RATES):
        assert 0 < rate["slowest"] <= rate["median"] <= rate["fastest"]
    prompts = 2 * 6 / data["prefill_tokens_per_s"]["median"]
    assert data["first_token_s"] == pytest.approx(prompts)
    plan = cached_program(dtype=torch.float32, layers=1).plan
    assert data["cache_bytes"] >= 2 * 9 * plan.bytes_per_token
    assert data["peak_bytes"] > 1 << 20
    assert data["gpu_bytes"] is None
    assert data["runtime"].startswith("onnxruntime" if kind == "package" else "torch")
    assert (data["package"] is None) == (kind == "artifact")
    assert data["provider"] == ("cpu" if kind == "package" else None)


def test_text_for_people(folders, capsys):
    assert main(["bench", str(folders / "package"), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("package: L1, cache grow, onnxruntime ")
    assert "on cpu; batch 1, 6 + 3 tokens, 1 threads" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["prefill,", "decode,", "first", "cache"]


def test_a_provider_is_for_packages(folders, capsys):
    assert main(["bench", str(folders / "artifact"), "--provider", "cuda"]) == 2
    assert "KVX801 --provider is for ONNX packages" in capsys.readouterr().err


def test_an_unknown_provider(folders, capsys):
    assert main(["bench", str(folders / "package"), "--provider", "tpu"]) == 2
    assert "KVX704 [onnx] provider must be cpu or cuda; got tpu" in capsys.readouterr().err
