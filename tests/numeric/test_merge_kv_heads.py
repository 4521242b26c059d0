"""Merged KV heads in every lowering: the same logits, and a cache smaller by the planned factor."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from lowered import assert_same_cache, both, divergence, prompts, relative
from onnx_tools import open_export
from programs import llama_program, token_ids

from kvxform.codegen.triton.describe import bytes_per_token
from kvxform.codegen.triton.sites import kernel_specs
from kvxform.errors import PassError, RecipeError
from kvxform.ir.program import Program
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.report import Report
from kvxform.runtime.model import OptimizedModel

WAYS: dict[str, list[Any]] = {
    "folded": [{"merge-kv-heads": {"heads": 1, "rope": "commuting"}}, "insert-cache"],
    "after RoPE": [{"merge-kv-heads": {"heads": 1, "rope": "post"}}, "insert-cache"],
}
LATENT = ["insert-cache", "cache-prerope", {"merge-kv-heads": {"heads": 1, "rope": "latent"}}]


def built(recipe, verify="none", **model) -> tuple[Program, Report]:
    """Return a small Llama-like program after a recipe, calibrated on random tokens."""
    sizes = {"layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
    program = llama_program(**{**sizes, **model})
    if isinstance(recipe, list):
        recipe = {"version": 1, "name": "test", "passes": recipe}
    ids = token_ids(program, 4, 48, seed=3)
    loaded = load_recipe({**load_recipe(recipe).to_data(), "target": {"lowering": "eager"}})
    return run_pipeline(program, loaded, executor=OptimizedModel, verify=verify, calibration=ids)


def onnx_past(program: Program, folder) -> list[tuple[Any, ...]]:
    """Return the shapes of all cache inputs of an exported program."""
    open_export(program, folder)
    inputs = ir.load(folder / "model.onnx").graph.inputs
    return [tuple(x.shape) for x in inputs if x.name.startswith("past")]


@pytest.mark.parametrize("way", WAYS)
def test_bytes_fall_by_the_planned_factor_everywhere(way, tmp_path):
    before, _ = built(["insert-cache"], kv_heads=4)
    after, _ = built(WAYS[way], kv_heads=4)
    assert before.plan.bytes_per_token == 4 * after.plan.bytes_per_token
    held = []
    for program in (before, after):
        session = OptimizedModel(program).new_session(max_batch_size=2, max_seq_len=32)
        session.prefill(token_ids(program, 2, 20))
        held.append(session.cache_bytes())
    assert held[0] == 4 * held[1]
    shapes = [onnx_past(p, tmp_path / name) for p, name in ((before, "before"), (after, "after"))]
    assert [shape[1] for shape in shapes[0]] == [4, 4]
    assert [shape[1] for shape in shapes[1]] == [1, 1]
    assert [shape[3] for shape in shapes[1]] == [64, 64]
    decode = [kernel_specs(program)[0].decode for program in (before, after)]
    assert [spec.site.num_kv_heads for spec in decode] == [4, 1]
    assert bytes_per_token(decode[0]) == 4 * bytes_per_token(decode[1])


def test_latents_take_the_same_share_although_all_heads_stay(tmp_path):
    before, _ = built(["insert-cache"], kv_heads=4)
    after, report = built(LATENT, kv_heads=4)
    assert after.sites[0].num_kv_heads == 4
    assert {f"layers.0.attn.{name}.weight" for name in "qkvo"} <= set(after.touched)
    assert before.plan.bytes_per_token == 4 * after.plan.bytes_per_token
    held = []
    for program in (before, after):
        session = OptimizedModel(program).new_session(max_batch_size=2, max_seq_len=32)
        session.prefill(token_ids(program, 2, 20))
        held.append(session.cache_bytes())
    assert held[0] == 4 * held[1]
    assert {(x.stream, x.heads) for p in report.passes for x in p.losses} == {
        ("key", (0, 1, 2, 3)),
        ("value", (0, 1, 2, 3)),
    }


@pytest.mark.parametrize(
    "recipe",
    ["gqa-svd-half-kv4", WAYS["after RoPE"], pytest.param(LATENT, marks=pytest.mark.slow)],
    ids=["kv4", "after RoPE", "latent"],
)
def test_onnx_gives_what_eager_gives(recipe, tmp_path):
    program, _ = built(recipe, kv_heads=4)
    ids = token_ids(program, 1, 40)
    expected = OptimizedModel(program)(ids)
    session = open_export(program, tmp_path / "out")
    found = [session.prefill(ids[:, :37], all_logits=True)]
    found += [session.decode(ids[:, t])[:, None] for t in range(37, 40)]
    assert relative(torch.cat(found, 1), expected) <= 1e-3


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gqa-half", "gqa-svd-half", "gqa-svd-half-kv4"])
def test_triton_gives_what_eager_gives(recipe):
    program, _ = built(recipe)
    eager, triton = both(program)
    ids = prompts(program, 2, 22)
    sessions = [model.new_session(2, 24) for model in (triton, eager)]
    got, expected = (
        torch.cat([s.prefill(ids[:, :20]), s.decode(ids[:, 20]), s.decode(ids[:, 21])])
        for s in sessions
    )
    assert relative(got, expected) <= 1e-4
    assert divergence(got, expected) <= 1e-6
    assert_same_cache(*sessions, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gqa-half", "gqa-svd-half-kv4"])
def test_a_merge_passes_the_checker_of_caches_with_rotations_and_codecs(recipe):
    program, report = built(recipe, "full", layers=2)
    assert program.facts["kv_heads"] == "merged"
    assert report.needs_training == ("merge-kv-heads",)
    first = report.passes[0]
    assert (first.matched, first.exactness, len(first.losses)) == (2, "needs training", 4)
    assert first.vs_source.kl > 1e-5
    assert dict(report.trainable)["merge-kv-heads"] >= 6


def test_codecs_are_fitted_on_the_heads_that_are_left():
    """Statistics are collected anew: two heads have other ranges than the four of the source."""
    passes = [
        {"merge-kv-heads": {"heads": 2}},
        "insert-cache",
        {"quantize-kv": {"key": {"codec": "nuq", "bits": 4}, "value": {"codec": "nuq", "bits": 4}}},
    ]
    program, report = built(passes, "probe", kv_heads=4)
    (site,) = program.plan.sites
    assert site.num_kv_heads == 2
    assert report.calibration is not None
    assert report.passes[-1].vs_before.kl < 1e-3  # codes of four bits, and nothing worse


def test_a_rotation_above_the_merge_is_refused_in_words():
    with pytest.raises(
        RecipeError, match=r"KVX214 \[rotate-v\] heads of values would no longer be alike.*move"
    ):
        built(["rotate-v", {"merge-kv-heads": {"heads": 1}}, "insert-cache"])


def test_a_model_with_one_kv_head_is_refused_in_words():
    with pytest.raises(
        PassError, match=r"KVX210 \[merge-kv-heads\].*one KV head cannot be merged with another"
    ):
        built("gqa-half", kv_heads=1)
