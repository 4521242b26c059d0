"""merge-layer-pairs: which layers, exactly when, and the same however tokens arrive."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from equal_layers import equal_layers, equal_toy
from programs import apply, fired, llama_program, reasons, token_ids

import kvxform
from kvxform.calibrate.collecting import collect
from kvxform.codegen.onnx.capability import check_program as check_onnx
from kvxform.codegen.triton.capability import check_program as check_triton
from kvxform.errors import CodegenError, PassError, RecipeError
from kvxform.healing.checks import require_touched
from kvxform.ir.facts import Facts
from kvxform.ir.program import Program
from kvxform.order import plan_passes
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.structure.merge_layer_pairs import MergeLayerPairs
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.recipe import load_recipe
from kvxform.recipe_steps import PassStep
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

INT4 = {"codec": "int", "bits": 4}
SMALL = {"chunk": 4, "recent": 5, "keep": 0.25, "dtype": "float64"}


def merged(program: Program | None = None, *before, **options) -> Program:
    program = llama_program(layers=4) if program is None else program
    for graph_pass in (InsertCache(), *before):
        program, _ = apply(graph_pass, program)
    found, matches = apply(MergeLayerPairs(**{**SMALL, **options}), program)
    assert fired(matches)
    return found


def test_pairs_begin_in_the_middle():
    plan = merged(llama_program(layers=7)).plan
    assert [s.payload for s in plan.sites] == ["kv"] * 3 + ["pair"] * 4
    assert [s.owner for s in plan.sites] == [0, 1, 2, 3, 3, 5, 5]
    odd = merged(llama_program(layers=5), start=2).plan
    assert [s.owner for s in odd.sites] == [0, 1, 2, 2, 4]


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 20, None])
def test_prompts_in_pieces_give_what_one_piece_gives(chunk_size):
    model = OptimizedModel(merged())
    ids = token_ids(model.program, tokens=23)
    whole, session = model(ids), model.new_session(2, 32)
    logits = session.prefill(ids, chunk_size=chunk_size, all_logits=True)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)
    assert session.cache_bytes() == model.plan.bytes_at([23, 23], 32)
    again = model.new_session(2, 32)
    again.prefill(ids[:, :7])
    for t in range(7, 23):
        torch.testing.assert_close(again.decode(ids[:, t]), whole[:, t], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_every_schedule_follows_the_equations():
    program = merged(sink=2)
    prober = Prober(llama_program(layers=4), OptimizedModel, program.plan)
    for check in prober.check_full(program):
        assert check.read_error <= 1e-12
        assert check.state_error <= 1e-12


def test_chunks_are_merged_once_recent_tokens_have_followed():
    program = merged(sink=2)
    ids = token_ids(program, tokens=19)
    session = OptimizedModel(program).new_session(2, 32)
    session.prefill(ids)
    lower, upper = (session.logical_cache(layer) for layer in (2, 3))
    body = 2 + program.plan.site(2).key.body_tokens(19)
    assert body == 2 + 12
    cosine = torch.cosine_similarity(lower.k[0], upper.k[0], dim=-1)  # [Hk, T]
    is_merged = (cosine - 1).abs() < 1e-9
    assert is_merged[:, 2:body].sum(1).tolist() == [9, 9], "one of four stays as it is"
    assert not is_merged[:, :2].any()
    assert not is_merged[:, body:].any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "qwen2", "phi3"])
def test_equal_layers_merge_without_a_difference(family):
    steps = ["insert-cache", {"merge-layer-pairs": {**SMALL, "start": 0}}]
    source = equal_layers(family)
    optimized = kvxform.optimize(source, {"version": 1, "name": "t", "passes": steps})
    ids = torch.randint(0, 90, (2, 25), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float((optimized(ids) - source(ids).logits).abs().max()) <= 1e-8


def test_a_recent_region_over_everything_changes_nothing():
    program, _ = apply(InsertCache(), llama_program(layers=4))
    ids = token_ids(program, tokens=23)
    for options in ({"recent": 23}, {"keep": 1.0}):
        model = OptimizedModel(merged(**options))
        torch.testing.assert_close(model(ids), OptimizedModel(program)(ids), rtol=0, atol=1e-12)
    changed = OptimizedModel(merged())(ids)
    assert float((changed - OptimizedModel(program)(ids)).abs().max()) > 1e-3


def test_bytes_follow_the_formula():
    full, _ = apply(InsertCache(), llama_program(layers=4))
    plan, heads, width = merged(dtype="float32").plan, 2, 32
    pair = heads * (4 * width + 4 * 4 + (4 * width + 1) / 4)
    assert plan.bytes_per_token == full.plan.bytes_per_token / 2 + pair
    assert plan.values_per_token == full.plan.values_per_token
    assert plan.max_step_tokens == 5
    assert full.plan.max_step_tokens is None


def test_rotated_caches_merge_and_other_layers_take_codecs():
    program = merged(equal_toy(layers=4), RotateQk(), RotateV(), PageCache(16))
    plain, _ = apply(InsertCache(), equal_toy(layers=4))
    ids = token_ids(program, tokens=21)
    torch.testing.assert_close(
        OptimizedModel(program)(ids), OptimizedModel(plain)(ids), rtol=0, atol=1e-8
    )
    mixed, found = apply(QuantizeKv(INT4, INT4), program)
    assert fired(found) == 2
    assert reasons(found) == ["keys are already stored by codec slerp-pair"] * 2
    assert mixed.plan.bytes_per_token < program.plan.bytes_per_token


def test_losses_are_reported_for_both_layers():
    program = llama_program(layers=4)
    ids = token_ids(program, batch=2, tokens=32)
    calibration = collect(program, ids, name="text")
    program, _ = apply(InsertCache(), program)
    program = dataclasses.replace(program, calibration=calibration)
    found = [m for m in MergeLayerPairs(**SMALL).match(program) if hasattr(m, "losses")]
    assert [m.note for m in found] == ["layers 2 and 3 are merged"]
    losses = found[0].losses
    assert [(x.layer, x.stream) for x in losses] == [
        (layer, name) for layer in (2, 3) for name in ("key", "value")
    ]
    assert losses[0].error > losses[2].error, "t = 0.6 is nearer to the upper layer"
    same = collect(equal_toy(layers=4), ids, name="text")
    program.calibration = same
    (match,) = (m for m in MergeLayerPairs(**SMALL).match(program) if hasattr(m, "losses"))
    assert max(loss.error for loss in match.losses) < 1e-6


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ((InsertCache(), QuantizeKv(INT4, INT4)), "layer 2 are already encoded"),
        ((ShareKvLayers(), InsertCache()), "layer 2 shares a cache"),
    ],
)
def test_near_misses(before, reason):
    program = llama_program(layers=4)
    for graph_pass in before:
        program, _ = apply(graph_pass, program)
    _, found = apply(MergeLayerPairs(**SMALL), program)
    assert not fired(found)
    assert reason in reasons(found)[-1]


def test_layers_that_differ_are_no_pair():
    program, _ = apply(InsertCache(), llama_program(layers=2))
    second = dataclasses.replace(program.sites[1], window=5)
    program.sites = (program.sites[0], second)
    found = MergeLayerPairs(start=0, **SMALL).match(program)
    assert reasons(found) == ["layer 1 has a window of 5, layer 0 None"]


def test_refusals():
    for options in ({"recent": 0}, {"sink": -1}, {"keep": 2.0}, {"chunk": 0}, {"t": 2.0}):
        with pytest.raises(RecipeError, match="KVX107"):
            MergeLayerPairs(**options)
    two, _ = apply(InsertCache(), llama_program(layers=2))
    assert reasons(MergeLayerPairs().match(two)) == ["there are no two layers from layer 1 on"]
    paged, _ = apply(PageCache(16), apply(InsertCache(), llama_program(layers=4))[0])
    with pytest.raises(PassError, match=r"whole chunks of 64 tokens; got 16"):
        MergeLayerPairs().match(paged)
    names = ("insert-cache", "cache-prerope", "merge-layer-pairs")
    with pytest.raises(RecipeError, match=r"KVX214 .*keys would have to be turned"):
        plan_passes([PassStep(name) for name in names], Facts(), auto_order=False)


def test_other_targets_say_no():
    program = merged(llama_program(layers=4, dtype=torch.float32), dtype="float32")
    for check in (check_onnx, check_triton):
        with pytest.raises(CodegenError, match=r"payload must be .*; got pair at layer 2"):
            check(program)
    with pytest.raises(kvxform.errors.ArtifactError, match="heal what comes before"):
        require_touched(program)


def test_the_recipe_is_the_method():
    (step,) = (s for s in load_recipe("minicache").passes if s.name == "merge-layer-pairs")
    assert step.options["t"] == 0.6
    assert step.options["keep"] == 0.05
