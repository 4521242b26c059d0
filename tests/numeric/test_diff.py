"""`kvxform.diff`: every kind of side, what both are run on, and the same answer everywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import cached_program
from models import tiny_hf
from programs import apply, llama_program
from torch import nn

import kvxform
from kvxform.diffing.records import DiffResult
from kvxform.diffing.render_json import render_json
from kvxform.errors import KvxformError
from kvxform.ir.artifact import load_program, save_artifact
from kvxform.ir.program import Program
from kvxform.locks.making import make_lock
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.probe import Probe, make_probe

INT4 = {"codec": "int", "bits": 4}
EXACT = {"version": 1, "name": "plain", "passes": ["insert-cache"]}


def toy(**options: Any) -> Program:
    fields: dict[str, Any] = {"dtype": torch.float32, "page_size": None}
    return cached_program({"key": INT4, "value": INT4}, **(fields | options))


def differ(a: Any, b: Any, **options: Any) -> DiffResult:
    return kvxform.diff(a, b, progress=False, **options)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return tiny_hf("llama")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "toy"
    OptimizedModel(toy()).save(folder)
    return folder


@pytest.fixture
def other(artifact, tmp_path) -> Path:
    """Return an artifact with one other weight, in layer 1."""
    program = load_program(artifact)
    weights = dict(program.weights)
    weights["layers.1.attn.k.weight"] = weights["layers.1.attn.k.weight"] * 2
    save_artifact(tmp_path / "other", dataclasses.replace(program, weights=weights), {})
    return tmp_path / "other"


def test_every_form_of_one_program_is_the_same(artifact):
    program = load_program(artifact)
    sides = (artifact, str(artifact), program, OptimizedModel(program))
    for side in sides:
        result = differ(artifact, side)
        assert (result.is_same, result.exit_code) == (True, 0)
        assert result.numeric.logits.relative < 1e-5
        assert result.a.kind == "artifact"
    assert result.b == dataclasses.replace(result.a, name="OptimizedModel", kind="program")


def test_a_changed_weight_is_found_and_its_layer_parts_first(artifact, other):
    result = differ(artifact, other)
    assert (result.is_same, result.exit_code) == (False, 1)
    assert [(w.layer, w.role, w.cause) for w in result.weights] == [(1, "k", "scaled")]
    assert result.numeric.first_layer == 1
    assert result.structure.nodes == ()


def test_thresholds_decide_what_is_different(artifact, other):
    within = differ(artifact, other, thresholds={"max_weights_changed": 1, "max_kl": 1e3})
    assert (within.is_same, within.exit_code) == (False, 0)
    beyond = differ(artifact, other, thresholds={"max_weights_changed": 0})
    assert (beyond.exit_code, [v.name for v in beyond.violations]) == (1, ["max_weights_changed"])


@pytest.mark.slow
def test_a_module_is_captured_and_compared_with_what_was_made_of_it(module, tmp_path):
    same = differ(module, module, numeric=False)
    assert (same.exit_code, same.a.kind, same.a.name) == (0, "module", "LlamaForCausalLM")
    cached = kvxform.optimize(module, EXACT, verify="none", progress=False)
    result = differ(module, cached, numeric=False)
    assert result.exit_code == 1
    assert {change.op for change in result.structure.nodes} >= {"kvx.cache_append"}
    added = [change for change in result.structure.nodes if change.kind == "added"]
    assert added
    assert all(change.via == ("insert-cache",) for change in added)
    assert (result.b.recipe, result.numeric) == ("plain", None)


@pytest.mark.slow
def test_a_model_at_a_recipe_is_optimised(module, tmp_path):
    module.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "plain.json"
    recipe.write_text(json.dumps(EXACT), encoding="utf-8")
    result = differ(f"{tmp_path / 'model'}@{recipe}", tmp_path / "model", numeric=False)
    assert (result.a.kind, result.b.kind) == ("program", "module")
    assert result.a.recipe == "plain"
    assert str(tmp_path) not in render_json(result)
    assert result.exit_code == 1


@pytest.mark.slow
def test_an_exported_program_and_its_file_are_sides(tmp_path):
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_hf("llama")

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, use_cache=False).logits

    size = torch.export.Dim.DYNAMIC
    shapes = ({0: size, 1: size},)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    exported = torch.export.export(Logits(), (ids,), dynamic_shapes=shapes, strict=False)
    path = tmp_path / "llama.pt2"
    torch.export.save(exported, path)
    result = differ(exported, path, numeric=False)
    assert (result.exit_code, result.a.kind, result.b.kind) == (0, "pt2", "pt2")
    assert result.b.name == "llama.pt2"


def test_locks_are_sides(artifact, other, tmp_path):
    lock = make_lock(kvxform.load(artifact))
    path = tmp_path / "kvxform.lock"
    path.write_text(lock.to_text(), encoding="utf-8")
    assert differ(path, artifact).exit_code == 0
    assert differ(artifact, lock, numeric=False).exit_code == 0
    assert differ(path, lock).exit_code == 0
    result = differ(path, other)
    assert (result.exit_code, result.a.kind, result.b.kind) == (1, "lock", "artifact")
    assert {layer for f in result.findings for layer in f.layers} == {1}
    assert differ(path, other, numeric=False).exit_code == 0, "a lock has no weights"


@pytest.mark.parametrize("kind", ["ids", "mask", "probe"])
def test_inputs_can_be_given(kind, artifact, other):
    ids = make_probe(48, (20, 20, 20)).input_ids
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    probe = Probe(ids, (20, 12, 20))
    inputs = {"ids": ids, "mask": (ids, mask), "probe": probe}[kind]
    result = differ(artifact, other, inputs=inputs)
    lengths = "20, 20, 20" if kind == "ids" else "20, 12, 20"
    assert result.numeric.inputs == f"given tokens, rows of {lengths} tokens"
    assert result.numeric.first_layer == 1


def test_one_short_row_is_enough_for_logits_and_caches(artifact, other):
    result = differ(artifact, other, inputs=torch.tensor([[1, 2, 3]]))
    assert result.numeric.logits.max_abs > 0
    assert result.numeric.layers[1].key > 0
    assert result.numeric.schedules


@pytest.mark.parametrize(
    "inputs", [torch.tensor([[1, 99]]), torch.tensor([1.0]), "text without a tokenizer"]
)
def test_inputs_that_make_no_sense_are_refused(inputs, artifact):
    with pytest.raises(KvxformError) as caught:
        differ(artifact, artifact, inputs=inputs)
    assert caught.value.code == "KVX822"


def test_generated_text_parts_where_tokens_do(artifact, other):
    same = differ(artifact, artifact, generate=4).numeric.text
    assert (same.before, same.parted_at) == (same.after, None)
    assert len(same.before.split()) == 4
    text = differ(artifact, other, generate=12).numeric.text
    before, after = text.before.split(), text.after.split()
    expected = next((i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y), None)
    assert text.parted_at == expected
    uncached = differ(llama_program(), llama_program(), generate=3).numeric.text
    assert len(uncached.before.split()) == 3


@pytest.mark.parametrize("side", [5, None, ["a"]])
def test_what_is_no_side_is_refused(side, artifact):
    with pytest.raises(KvxformError) as caught:
        differ(artifact, side)
    assert (caught.value.code, "\n" in str(caught.value)) == ("KVX820", False)


def test_a_rewrite_that_keeps_the_model_shows_what_it_did_and_no_other_result():
    before = llama_program()
    after, _ = apply(FuseNorms(), before)
    result = differ(before, after)
    assert result.exit_code == 1
    assert result.structure.nodes
    assert result.numeric.is_rounding


SCRIPT = """
import sys, torch, kvxform
from kvxform.diffing.render_json import render_json
torch.set_num_threads(2)
a, b = sys.argv[1:]
for side in (a, b):
    print(render_json(kvxform.diff(a, side, generate=3, progress=False)))
"""


def test_the_answer_is_the_same_in_another_process_with_other_threads(artifact, other):
    """Byte for byte, for equal and for different sides."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact), str(other)],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [render_json(differ(artifact, side, generate=3)) for side in (artifact, other)]
    assert done.stdout == "".join(f"{text}\n" for text in here)
