import dataclasses

import pytest
import torch
from programs import llama_program

from kvxform.calibrate import make_calibration
from kvxform.calibrate.sources import cut_windows
from kvxform.errors import KvxformError, RecipeError
from kvxform.pipeline import plan_pipeline, run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

IDS = torch.randint(0, 48, (500,), generator=torch.Generator().manual_seed(0))
RECIPE = {
    "version": 1,
    "name": "bits",
    "calibration": {"tokens": 96, "window": 24, "seed": 5},
    "passes": [
        "insert-cache",
        {"quantize-kv": {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}},
        {"per-layer-bits": {"budget": 8, "tokens": 24}},
    ],
}


def make(program, given, tokens=96, window=24, **options):
    return make_calibration(program, given, tokens=tokens, window=window, seed=0, **options)


def test_windows_are_spread_over_the_text():
    rows = cut_windows(torch.arange(100), 30, 10)
    assert rows[:, 0].tolist() == [0, 45, 90]
    assert torch.equal(rows - rows[:, :1], torch.arange(10).expand(3, 10))
    assert cut_windows(torch.arange(10), 8, 10).shape == (1, 10)


def test_the_name_tells_the_text():
    program = llama_program()
    a, b = make(program, IDS), make(program, IDS.flip(0))
    assert a.name.endswith("4 x 24 tokens, seed 0")
    assert a.name != b.name
    assert make(program, a.token_ids).name == a.name, "the same windows, given as such"


def test_the_window_is_what_the_model_can_take():
    assert make(llama_program(), IDS, tokens=128, window=None).token_ids.shape == (2, 64)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (IDS[:50], "4 x 24 = 96 tokens"),
        (IDS + 48, "integers from 0 to 47"),
        (IDS.float(), "integers"),
        (IDS.view(5, 100), "64 tokens that the model can take"),
        (None, "tokenizer"),
    ],
    ids=["short", "vocabulary", "floats", "context", "no tokenizer"],
)
def test_what_cannot_be_read_is_refused(given, rule):
    with pytest.raises(RecipeError, match=rule) as caught:
        make(llama_program(), given)
    assert caught.value.code == "KVX108"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KvxformError, match=r"gone\.txt") as caught:
        make(llama_program(), tmp_path / "gone.txt")
    assert caught.value.code == "KVX801"


def test_a_calibration_of_another_model_or_without_gradients_is_refused():
    program = llama_program()
    made = make(program, IDS)
    assert make(program, made) is made
    with pytest.raises(RecipeError, match="same model"):
        make(llama_program(layers=3), made)
    with pytest.raises(RecipeError, match="gradients"):
        make(program, made, fisher=True)
    assert make(program, make(program, IDS, fisher=True), fisher=True).has_gradients


def test_the_pipeline_collects_once_by_the_recipe_and_only_if_asked(monkeypatch):
    calls = []

    def counted(program, rows, **options):
        calls.append((rows.shape, options["seed"], options["fisher"], program.is_cached))
        return collect(program, rows, **options)

    collect = make_calibration.__globals__["collect"]
    monkeypatch.setattr("kvxform.calibrate.sources.collect", counted)
    program = dataclasses.replace(llama_program(dtype=torch.float32))
    recipe = load_recipe(RECIPE)
    final, report = run_pipeline(
        program, recipe, executor=OptimizedModel, verify="none", calibration=IDS
    )
    assert calls == [((4, 24), 5, False, False)]
    assert final.calibration is None, "statistics are not part of a finished program"
    assert report.calibration is not None
    assert report.calibration.startswith("token ids (")
    plain = load_recipe({**RECIPE, "passes": RECIPE["passes"][:2]})
    _, report = run_pipeline(
        program, plain, executor=OptimizedModel, verify="none", calibration=IDS
    )
    assert len(calls) == 1
    assert report.calibration is None
    assert "calibrated on" not in report.to_html()
    plan_pipeline(program, recipe)
    assert len(calls) == 1, "a dry run collects nothing"
