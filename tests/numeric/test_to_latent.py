"""to-latent on families: exact at full width, then latents in caches, codecs, ONNX, artifacts."""

from __future__ import annotations

import pytest
import torch
from families import ALL
from family_checks import Subject, compare_export, relative, source_logits, token_ids
from onnx_tools import open_export

from kvxform.healing.healer import heal_program
from kvxform.healing.options import HealOptions
from kvxform.ir.artifact import load_program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

AFTER = ["cache-latent", "insert-cache", {"page-cache": {"page_size": 16}}]
INT8 = {"quantize-kv": {"key": {"codec": "int", "bits": 8}, "value": None}}
SLOW = ("llama", "phi", "mistral", "gptj")
FAMILIES = [  # biases and groups; MHA whose RoPE turns a part of the channels; windows; pairs of
    "qwen2",  # neighbours
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


def optimised(program, options: dict[str, int], *more: object, verify: str = "none"):
    passes = [{"to-latent": options}, *AFTER, *more]
    recipe = load_recipe({"version": 1, "name": "toy", "passes": passes})
    done, report = run_pipeline(
        program,
        recipe,
        executor=OptimizedModel,
        verify=verify,
        calibration=token_ids(8, 40, seed=5),
    )
    return OptimizedModel(done, report=report, recipe=recipe), report


@pytest.mark.parametrize("name", FAMILIES)
def test_families_at_full_width(name):
    subject, ids = Subject.of(ALL[name], torch.float64), token_ids(2, 40)
    site = subject.program.sites[0]
    keys = site.num_kv_heads * site.rope.rotary_dim
    values = site.num_kv_heads * (site.v_head_dim + site.head_dim - site.rope.rotary_dim)
    expected = source_logits(subject.model, ids)
    model, report = optimised(subject.program, {"rope_dim": keys, "rank": values}, verify="probe")
    assert relative(model(ids), expected) <= 1e-8
    assert report.passes[0].exactness == "needs training"
    assert [site.payload for site in model.plan.sites] == ["latent"] * len(model.plan.sites)
    half, _ = optimised(subject.program, {"rope_dim": keys // 2, "rank": values // 2})
    assert relative(half(ids), expected) > 1e-8
    assert half.plan.values_per_token == len(half.plan.sites) * (keys // 2 + values // 2)


def test_a_latent_made_here_goes_through_every_lowering(tmp_path):
    subject, ids = Subject.of(ALL["qwen2"], torch.float32), token_ids(2, 40)
    model, _ = optimised(subject.program, {"rope_dim": 8, "rank": 16}, "rotate-qk", INT8)
    assert model.plan.bytes_per_token == 2 * (24 + 4)
    session = open_export(model.program, tmp_path / "onnx")
    compare_export(session.prefill(ids, all_logits=True), model(ids), lossy=True)
    shapes = {x.name: x.shape for x in session._cache._engine.session.get_inputs()}
    assert shapes["past_key_values.0.key_codes"][1::2] == [1, 24]
    assert not any("value" in name.split(".")[-1] for name in shapes if "past" in name)
    model.save(tmp_path / "model")
    assert torch.equal(OptimizedModel(load_program(tmp_path / "model"))(ids), model(ids))


@pytest.mark.slow
def test_healing_makes_up_for_some_of_the_loss():
    source = Subject.of(ALL["llama"], torch.float32).program
    model, _ = optimised(source, {"rope_dim": 8, "rank": 16})
    options = HealOptions(steps_local=40, steps=60, window=64, learning_rate=2e-3)
    text = token_ids(40, 64, seed=3).flatten()
    _, record = heal_program(model.program, source, text, options)
    assert record.after.kl < 0.8 * record.before.kl
