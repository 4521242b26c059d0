"""Program.touched: which weights healing may train, through passes, artifacts and reports."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
from programs import apply, llama_program

from kvxform.errors import ArtifactError, PassError
from kvxform.ir.artifact import load_artifact, save_artifact
from kvxform.ir.program import Program
from kvxform.ir.verify import verify_program
from kvxform.pass_base import (
    EXACT,
    PASSES,
    Exactness,
    GraphPass,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    approx,
)
from kvxform.passes.base.fuse_projections import FuseProjections
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.pipeline import plan_pipeline, run_pipeline
from kvxform.recipe import Recipe
from kvxform.report import Report
from kvxform.runtime.model import OptimizedModel

KEY, OUT = "layers.0.attn.k.weight", "layers.0.attn.o.weight"


@dataclass(frozen=True)
class HalveKeys(GraphPass):
    """Halve the keys of the first layer, and say that its output projection may follow."""

    numerics: ClassVar[Numerics] = approx("kl")

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [Match(layer=0)]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        rewriter.set_weight(KEY, program.weights[KEY] / 2)
        rewriter.mark_touched([OUT])


@dataclass(frozen=True)
class HalveKeysExactly(HalveKeys):
    """The same, said to be exact."""

    numerics: ClassVar[Numerics] = EXACT

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        rewriter.set_weight(KEY, program.weights[KEY] / 2)


@dataclass(frozen=True)
class DropKeys(HalveKeys):
    """A pass that asks for training."""

    numerics: ClassVar[Numerics] = Numerics(Exactness.NEEDS_TRAINING)


def test_a_lossy_pass_leaves_its_mark_and_an_exact_one_does_not():
    program = llama_program()
    assert apply(HalveKeysExactly(), program)[0].touched == {}
    halved, _ = apply(HalveKeys(), program)
    assert halved.touched == {KEY: "halve-keys", OUT: "halve-keys"}
    assert program.touched == {}, "the caller's program is as it was"


def test_marks_survive_exact_passes_also_under_a_new_name():
    program, _ = apply(HalveKeys(), llama_program())
    program, _ = apply(RotateV(), program)
    assert program.touched == {KEY: "halve-keys", OUT: "halve-keys"}
    program, _ = apply(FuseProjections(), program)
    assert program.touched == {"layers.0.attn.q_k_v.weight": "halve-keys", OUT: "halve-keys"}


def test_artifacts_keep_marks(tmp_path):
    program, _ = apply(HalveKeys(), llama_program())
    save_artifact(tmp_path / "a", program)
    assert load_artifact(tmp_path / "a").touched == program.touched
    path = tmp_path / "a" / "program.json"
    data = json.loads(path.read_text())
    data["touched"] = {"nothing": "halve-keys"}
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="KVX602"):
        load_artifact(tmp_path / "a")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setitem(PASSES, "drop-keys", DropKeys)
    passes = ["drop-keys", "insert-cache"]
    return Recipe.model_validate({"version": 1, "name": "dropped", "passes": passes})


def test_reports_say_what_may_be_trained_and_how(recipe):
    program = llama_program()
    _, planned = plan_pipeline(program, recipe)
    _, report = run_pipeline(program, recipe, executor=OptimizedModel)
    assert planned.trainable == report.trainable == (("drop-keys", 2),)
    hint = report.training_hint("out", "model.gguf")
    assert "what drop-keys changed" in hint
    assert "kvxform heal out --source model.gguf -o HEALED" in hint
    assert "kvxform heal" in report.to_html()
    assert Report.from_json(report.to_json()).trainable == report.trainable


def test_a_recipe_without_such_a_pass_says_nothing():
    recipe = Recipe.model_validate({"version": 1, "name": "plain", "passes": ["insert-cache"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = run_pipeline(llama_program(), recipe, executor=OptimizedModel)
    assert report.training_hint() == ""
    assert "kvxform heal" not in report.to_html()


def test_a_mark_needs_a_weight():
    program = llama_program()
    with pytest.raises(AssertionError, match="only weights are trained"):
        Rewriter(program, "test", approx("kl")).mark_touched(["nothing"])
    touched, _ = apply(InsertCache(), program)
    touched.touched["nothing"] = "test"
    with pytest.raises(PassError, match="KVX215"):
        verify_program(touched)
