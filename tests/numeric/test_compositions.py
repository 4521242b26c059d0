"""Structure, rotation and codec in one recipe: bytes as planned, cache verified, order checked."""

from __future__ import annotations

import copy

import pytest
import torch
from programs import llama_program

from kvxform.errors import KvxformError, RecipeError
from kvxform.pipeline import plan_pipeline, run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

# recipe, what is left of the bytes of `kv4`
SHARES = {"cla2-kv4": 1 / 2, "kvsharer-25-kv4": 3 / 4, "gqa-svd-half-kv4": 1 / 2}


def text():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 48, (8, 64), generator=generator)


def small(**options):
    return llama_program(layers=4, head_dim=64, **options)


@pytest.mark.parametrize("name", SHARES)
def test_bytes_fall_by_the_factor_of_the_structure(name):
    planned = [plan_pipeline(small(), load_recipe(recipe))[1] for recipe in (name, "kv4")]
    ours, plain = (report.kv_bytes_per_token for report in planned)
    assert ours == pytest.approx(SHARES[name] * plain, rel=1e-12)


@pytest.mark.parametrize(
    "name", [pytest.param("cla2-kv4", marks=pytest.mark.slow), "gqa-svd-half-kv4"]
)
def test_the_cache_holds_what_the_merged_model_makes(name):
    program, report = run_pipeline(
        small(), load_recipe(name), executor=OptimizedModel, verify="full", calibration=text()
    )
    assert report.cache is not None
    assert len(report.cache.schedules) > 1
    assert report.cache.state_error < 1e-6
    assert report.needs_training
    model, ids = OptimizedModel(program, report=report), text()[:2, :9]
    session = model.new_session(2, 16)
    session.prefill(ids)
    values = sum(site.values_per_token for site in program.plan.owners)
    assert report.kv_bytes_per_token == pytest.approx(values * 4.5 / 8)
    assert session.cache_bytes() == program.plan.bytes_at([9, 9], 16)


@pytest.mark.parametrize("name", SHARES)
def test_an_illegal_order_is_refused_in_words(name):
    data = copy.deepcopy(load_recipe(name).to_data())
    structure, *rest = data["passes"]
    late = {**data, "passes": [*rest, structure]}
    with pytest.raises(RecipeError, match=r"KVX21[34]") as found:
        plan_pipeline(small(), load_recipe(late))
    assert next(iter(structure)) in str(found.value)


def test_rotated_keys_cannot_be_merged():
    data = load_recipe("gqa-svd-half-kv4").to_data()
    structure, *rest = data["passes"]
    names = [next(iter(step)) if isinstance(step, dict) else step for step in rest]
    place = names.index("rotate-qk") + 1
    mixed = {**data, "passes": [*rest[:place], structure, *rest[place:]]}
    with pytest.raises(KvxformError, match="merge-kv-heads"):
        plan_pipeline(small(), load_recipe(mixed))
