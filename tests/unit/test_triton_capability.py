"""What target triton refuses, before any kernel runs."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from cached import cached_program
from lowered import recipe_for
from programs import llama_program

import kvxform
from kvxform.cli.main import main
from kvxform.codegen.triton import capability
from kvxform.codegen.triton.capability import check_device, check_program
from kvxform.errors import CodegenError
from kvxform.ir.stream_plan import KeyView, Regions
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

CPU = torch.device("cpu")


def toy(dtype=torch.float32, **model):
    return cached_program(None, 16, dtype=dtype, **{"head_dim": 64, **model})


def with_site(program, **changes):
    program.plan = program.plan.replace_site(1, **changes)
    return program


def with_key(program, **changes):
    key = dataclasses.replace(program.plan.site(1).key, **changes)
    return with_site(program, key=key)


REFUSED = {
    "no cache": (lambda: llama_program(dtype=torch.float32), "add insert-cache"),
    "float64": (lambda: toy(torch.float64), "got float64"),
    "residuals": (
        lambda: with_site(toy(), payload="residual"),
        "payload must be kv or latent; got residual",
    ),
    "latents that wait": (
        lambda: with_site(
            with_key(toy(), regions=Regions(recent=4)), payload="latent", value=KeyView(8)
        ),
        "encoded token by token, at once; got the last 4 tokens exact at layer 1.*recent: 0",
    ),
    "keys before RoPE": (lambda: with_key(toy(), rope="pre"), "after RoPE; got pre at layer 1"),
    "unknown codec": (lambda: with_key(toy(), codec={"codec": "polar"}), "got polar at layer 1"),
    "words of three": (
        lambda: with_key(toy(), codec={"codec": "fib-vq", "k": 3}),
        "codec fib-vq: k must be one of .* got 3 at layer 1.*or use target eager",
    ),
    "sinks": (lambda: with_key(toy(), regions=Regions(sink=4)), "4 and 0 at layer 1.*use sink: 4"),
    "wide heads": (lambda: toy(head_dim=512), "head_dim.* got 512 at layer 0"),
    "many heads": (lambda: toy(heads=32, kv_heads=1), "got 32 at layer 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_no_kernel_runs(name):
    make, message = REFUSED[name]
    with pytest.raises(CodegenError, match=rf"^KVX401 \[triton\].*{message}"):
        check_program(make())


def test_a_program_that_kernels_run_passes():
    check_program(toy())


def test_a_plan_is_refused_by_shapes_alone():
    recipe = recipe_for({"version": 1, "name": "x", "passes": ["insert-cache"]})
    program = llama_program(dtype=torch.float64, head_dim=64)
    with pytest.raises(CodegenError, match=r"KVX401.*float64"):
        plan_pipeline(program, recipe)
    assert plan_pipeline(program, load_recipe("exact"))[0].plan is not None


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_is_refused_before_the_work(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fail(*args, **options):
        raise AssertionError("captured")

    monkeypatch.setattr("kvxform.api.capture", fail)
    message = (
        r"^KVX401 \[triton\] target triton needs a CUDA device; got cpu. "
        r"Hint: device='cuda', or target eager.$"
    )
    for device in (None, "cpu"):
        with pytest.raises(CodegenError, match=message):
            kvxform.optimize("smollm2-135m", "kv4", target="triton", device=device)
    with pytest.raises(CodegenError, match=message):
        OptimizedModel(toy(), recipe=recipe_for("exact"))


def test_an_artifact_for_triton_opens_elsewhere_as_eager(no_interpreter, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = OptimizedModel(toy())
    model.recipe = recipe_for("exact")
    model.save(tmp_path / "out")
    with pytest.raises(CodegenError, match="needs a CUDA device"):
        kvxform.load(tmp_path / "out")
    opened = kvxform.load(tmp_path / "out", target="eager")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(opened(ids), model(ids))


def test_other_machines_that_are_refused(no_interpreter, monkeypatch):
    check_device(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_device(CPU)
    with pytest.raises(CodegenError, match="interpreter runs on a CPU; got cuda"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CodegenError, match="needs the package triton"):
        check_device(CPU)


def test_the_interpreter_takes_no_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CodegenError, match=r"^KVX401 \[triton\].*got bfloat16"):
        OptimizedModel(toy(torch.bfloat16), recipe=recipe_for("exact"))


def test_cuda_is_the_default_where_there_is_one(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert capability.default_device() == torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert capability.default_device() is None


def test_the_command_line_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_for("exact").to_yaml(), encoding="utf-8")
    code = main(["optimize", "nothing.gguf", "-r", str(recipe), "-o", str(tmp_path / "out")])
    assert code != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "KVX401 [triton] target triton needs a CUDA device; got cpu" in error
