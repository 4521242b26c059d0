"""Recipes of methods with side information, through the whole pipeline and every schedule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import llama_program, token_ids

from kvxform import load
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

# true bits of a value, 2 KV heads of 64 channels
BITS = {
    "gear": 4.25,
    "zipcache": (3.25 + 0.5 + 3.25 + 0.5 + 0.125) / 2 + 1 / 64,
    "mikv": 4.0 + 1 / 64,
    "kvquant-3": 3 + 24 / 64 + 32 / 128 / 2,
    "kvquant-4": 4 + 24 / 64 + 32 / 128 / 2,
}


def optimise(name, verify: str):
    program = llama_program(dtype=torch.float64, head_dim=64)
    program.info = dataclasses.replace(program.info, context_length=None)
    text = torch.randint(0, 48, (4, 256), generator=torch.Generator().manual_seed(0))
    return run_pipeline(
        program, load_recipe(name), executor=OptimizedModel, verify=verify, calibration=text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BITS)
def test_a_recipe_holds_what_its_equations_say(name):
    program, report = optimise(name, "full")
    assert report.bits_per_value == BITS[name]
    assert report.cache is not None
    assert max(report.cache.state_error, report.cache.read_error) < 1e-12
    assert len(report.cache.schedules) >= 7
    assert report.final is not None
    assert 0 < report.final.kl < 0.01
    lossy = [p.name for p in report.passes if p.exactness != "exact"]
    assert lossy == ["quantize-kv"]
    fitted = {site.key.calibration is not None for site in program.plan.sites}
    assert fitted == {name.startswith("kvquant")}


@pytest.mark.slow
def test_massive_tokens_of_rotatekv_can_lie_anywhere():
    low = {"codec": "int", "bits": 2, "clip": 0.8}
    kept = {"codec": "saliency", "score": "spread", "chunk": 16, "share": 1 / 16}
    stream = {**kept, "high": {"codec": "none", "dtype": "float16"}, "low": low}
    rotations = ["fuse-norms", "rotate-v", "insert-cache", "cache-prerope", "rotate-k-prerope"]
    steps = [*rotations, {"quantize-kv": {"key": stream, "value": stream}}]
    program, report = optimise({"version": 1, "name": "kept", "passes": steps}, "full")
    assert report.cache is not None
    assert max(report.cache.state_error, report.cache.read_error) < 1e-12
    site = program.plan.site(0)
    assert (site.key.rope, site.key.score_bytes, site.key.regions.sink) == ("pre", 0, 0)
    assert site.key.basis.inverse is not None


def test_a_fitted_plan_is_complete_by_itself(tmp_path):
    program, report = optimise("kvquant-3", "none")
    assert report.bits_per_value == BITS["kvquant-3"]
    model = OptimizedModel(program)
    model.save(tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    assert again.plan == model.plan
    ids = token_ids(program, 1, 40)
    assert torch.equal(again(ids), model(ids))
    first, second = (site.key.codec["inner"] for site in program.plan.sites)
    assert first["center"] != second["center"]  # each layer has its own


def test_a_saliency_cache_of_exact_codecs_is_an_exact_cache():
    exact = {"codec": "none", "dtype": "float64"}
    both = {"codec": "saliency", "chunk": 16, "high": exact, "low": exact}
    options = {"key": both, "value": both, "regions": {"dtype": "float64"}}
    ranked, plain = cached_program(options), cached_program()
    ids = token_ids(plain, 2, 40)
    torch.testing.assert_close(
        OptimizedModel(ranked)(ids), OptimizedModel(plain)(ids), rtol=0, atol=1e-12
    )
