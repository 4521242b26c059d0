"""`kvxform heal` from end to end: optimise, heal and load a Hugging Face folder of a tiny model."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from checkpoints import write_llama

import kvxform
from kvxform.cli.main import main
from kvxform.ir.artifact import load_artifact

RECIPE = """
version: 1
name: factored
passes:
  - insert-cache
  - cache-prerope
  - factor-kv: {k_density: 0.2, v_density: 0.2, bits: 4, recent: 8}
calibration: {tokens: 2048}
"""
SHORT = ["--steps-local", "20", "--steps", "20", "--window", "48", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heal")


@pytest.fixture(scope="module")
def model(folder):
    return str(write_llama(folder / "model"))


@pytest.fixture(scope="module")
def text(folder):
    path = folder / "text.txt"
    path.write_text("Some words are read, and then they are read again. " * 170)
    return str(path)


@pytest.fixture(scope="module")
def factored(folder, model, text):
    """An artifact with a fifth of the channels of K and V, as codes."""
    out = str(folder / "factored")
    recipe = folder / "factored.yaml"
    recipe.write_text(RECIPE)
    words = ["optimize", model, "-r", str(recipe), "-o", out, "--calibration", text]
    code, _, error = call(*words, "--verify", "none")
    assert code == 0, error
    return out


def call(*words):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(list(words))
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.mark.slow
def test_heal_writes_a_better_artifact_of_the_same_form(folder, model, text, factored):
    out = folder / "healed"
    words = ["heal", factored, "--source", model, "-o", str(out), "--text", text, *SHORT]
    code, stdout, error = call(*words, "--lr", "1e-3", "--json")
    assert code == 0, error
    data = json.loads(stdout)
    assert data["after"]["kl"] < 0.95 * data["before"]["kl"]
    assert "heal: logits 20/20" in error
    assert not list(folder.glob(".healed*")), "the checkpoint is gone"
    before, after = load_artifact(folder / "factored"), load_artifact(out)
    assert str(after.graph) == str(before.graph)
    assert after.plan == before.plan
    assert {n: w.shape for n, w in after.weights.items()} == {
        n: w.shape for n, w in before.weights.items()
    }
    opened = kvxform.load(out)
    assert opened.recipe.name == "factored"
    assert opened.report.healing.after.kl == pytest.approx(data["after"]["kl"], rel=1e-5)
    assert (out / "report.html").read_text().count("held out") == 1
    assert (out / "tokenizer" / "tokenizer_config.json").exists()


def test_refusals_in_one_line(folder, model, factored):
    out = str(folder / "out")
    for words, code in (
        (["heal", model, "--source", model, "-o", out], "KVX601"),
        (["heal", factored, "--source", model, "-o", model], "KVX601"),
        (["heal", factored, "--source", model, "-o", out, "--full", "--lora", "2"], "KVX801"),
        (["heal", factored, "--source", model, "-o", out, "--lora", "0"], "KVX704"),
    ):
        exit_code, _, error = call(*words)
        assert exit_code == 2
        assert error.count(code) == 1
