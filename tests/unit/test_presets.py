import pytest
import torch
from programs import llama_program

from kvxform.cli.main import main
from kvxform.errors import RecipeError
from kvxform.pipeline import run_pipeline
from kvxform.presets import explicit_recipe, written_codec
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

IDS = torch.randint(0, 48, (96,), generator=torch.Generator().manual_seed(0))
INT4 = {"codec": "int", "bits": 4, "clip": 0.9}
RECIPE = {
    "version": 1,
    "name": "tuned",
    "calibration": {"tokens": 48, "window": 24},
    "passes": [
        "insert-cache",
        {
            "quantize-kv": {
                "key": INT4,
                "value": INT4,
                "layers": {"0": {"key_regions": {"sink": 2}}},
            }
        },
        {"per-layer-bits": {"budget": 7.0, "tokens": 48, "window": 24}},
    ],
    "bounds": {"bits_per_value": 7.0},
}


def optimise(recipe):
    program = llama_program(layers=3, dtype=torch.float32)
    program.weights["layers.1.attn.o.weight"] = program.weights["layers.1.attn.o.weight"] * 100
    return run_pipeline(
        program, load_recipe(recipe), executor=OptimizedModel, verify="none", calibration=IDS
    )


@pytest.fixture(scope="module")
def optimised():
    return optimise(RECIPE)


def test_a_preset_gives_the_same_plan_without_a_search(optimised):
    program, report = optimised
    preset = explicit_recipe(load_recipe(RECIPE), program.plan)
    assert [step.name for step in preset.passes] == ["insert-cache", "quantize-kv"]
    layers = preset.passes[1].options["layers"]
    assert layers["0"]["key_regions"] == {"sink": 2}, "regions of a layer still hold"
    assert len(layers) > 1
    again, plain = optimise(preset)
    assert again.plan == program.plan
    assert report.calibration is not None
    assert plain.calibration is None
    assert plain.bits_per_value == report.bits_per_value


def test_codecs_are_written_without_defaults_and_constants():
    codec = {"codec": "int", "bits": 3, "axis": "token", "clip": 1.0}
    assert written_codec({**codec, "levels": [[0.5], [1.0]]}) == {"codec": "int", "bits": 3}
    wrapped = {"codec": "token-norm", "inner": codec}
    assert written_codec(wrapped) == {"codec": "token-norm", "inner": {"codec": "int", "bits": 3}}


def test_other_recipes_have_no_preset(optimised):
    program, _ = optimised
    for recipe in (load_recipe("kv4"), None):
        with pytest.raises(RecipeError, match="per-layer-bits"):
            explicit_recipe(recipe, program.plan)


def test_the_command_prints_a_recipe(optimised, tmp_path, capsys):
    program, report = optimised
    model = OptimizedModel(program, report=report, recipe=load_recipe(RECIPE))
    model.save(tmp_path / "artifact")
    assert main(["recipes", "preset", str(tmp_path / "artifact")]) == 0
    path = tmp_path / "preset.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == explicit_recipe(model.recipe, program.plan)
