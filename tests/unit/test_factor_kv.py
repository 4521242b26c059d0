"""factor-kv: what is stored and lost, windows, where the inverse goes, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from programs import (
    DenseCache,
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)

from kvxform.calibrate import collect
from kvxform.codecs.base import make_codec
from kvxform.codegen.triton.capability import check_plan
from kvxform.errors import CodegenError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.order import check_order, plan_passes
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.factor_kv import FactorKv
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

MODELS = {"llama": llama_program, "gpt2": gpt2_program}
exact = functools.partial(FactorKv, dtype="float64")


@functools.cache
def ready(kind: str = "llama", *, rope: str = "pre", **model: object) -> Program:
    """Return a program with a cache and a calibration, which tests must not change."""
    program = MODELS[kind](**model)
    program.info = dataclasses.replace(program.info, context_length=None)
    calibration = collect(program, token_ids(program, 12, 32, seed=3), name="random")
    cached, _ = apply(InsertCache(), program)
    if rope == "pre":
        cached, _ = apply(CachePrerope(), cached)
    return dataclasses.replace(cached, calibration=calibration)


def logits_error(program: Program, factored: Program, tokens: int = 40) -> float:
    ids = token_ids(program, 2, tokens, seed=9)
    return float((OptimizedModel(factored)(ids) - run(program, ids)).abs().max())


@pytest.mark.parametrize("init", ["pca", "asvd"])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_full_rank_is_exact(kind, width, init):
    factored, found = apply(exact(1.0, 1.0, init=init, recent=0, width=width), ready(kind))
    assert fired(found) == 2
    assert {loss.error for match in found for loss in match.losses} == {0.0}
    assert logits_error(MODELS[kind](), factored) < 1e-10
    is_alone = width == 16
    assert [match.note for match in found] == [
        "the basis of V lives in W_o" if is_alone else ""
    ] * 2
    for site in factored.plan.sites:
        assert (site.key.basis.heads, site.value.basis.heads) == (width // 16, width // 16)
        assert site.key.basis.inverse is not None
        assert (site.value.basis.inverse is None) == is_alone


@pytest.mark.parametrize("bits", [None, 4])
def test_a_window_that_holds_every_token_is_exact(bits):
    program = llama_program()
    for recent, is_exact in ((40, True), (8, False)):
        factored, _ = apply(exact(0.25, 0.25, bits=bits, recent=recent), ready())
        assert (logits_error(program, factored) < 1e-10) == is_exact


@pytest.mark.parametrize("options", [{}, {"init": "asvd"}, {"mean": True}, {"width": 16}])
def test_the_loss_is_what_the_calibration_text_loses(options):
    """What is decoded of the text itself, against the loss that the pass states."""
    before = ready()
    factored, found = apply(exact(0.5, 0.25, recent=0, **options), before)
    cache = DenseCache()
    ids = before.calibration.token_ids
    factored.to_module()(ids, default_positions(ids), make_handle(cache))
    for match in found:
        streams = factored.plan.site(match.layer).streams
        for (name, stream), x in zip(streams.items(), cache.stored[match.layer], strict=True):
            if match.layer > 0:
                continue  # its input has changed with what layer 0 read
            codec = make_codec(stream.codec)
            back = codec.decode(codec.encode(x), torch.float64)
            own = [loss for loss in match.losses if loss.stream == name]
            assert len(own) == (2 if "width" in options else 1)
            for loss in own:
                heads = list(loss.heads or (0, 1))
                lost = (back - x)[:, heads].norm() / x[:, heads].norm()
                assert loss.error == pytest.approx(float(lost), rel=1e-4)


def test_more_features_lose_less_and_principal_components_least():
    losses = {}
    for init in ("pca", "asvd"):
        for density in (0.25, 0.5, 0.75):
            _, found = apply(FactorKv(density, density, init=init), ready())
            losses[init, density] = [x.error for match in found for x in match.losses]
    for init in ("pca", "asvd"):
        falling = [sum(losses[init, density]) for density in (0.25, 0.5, 0.75)]
        assert falling[0] > falling[1] > falling[2] > 0
    pairs = zip(losses["pca", 0.5], losses["asvd", 0.5], strict=True)
    assert all(best < other for best, other in pairs)


def test_bytes_are_those_of_the_features():
    """2 heads of 16 channels: 32 of them, half of which are kept, as float16 or 4-bit codes."""
    half, _ = apply(FactorKv(recent=0), ready())
    assert half.plan.bytes_per_token == 2 * (16 + 16) * 2
    assert half.plan.bits_per_value == 8
    codes, _ = apply(FactorKv(0.5, 0.5, bits=4, recent=0), ready())
    key, value = codes.plan.sites[0].key, codes.plan.sites[0].value
    assert key.body_bytes_per_token(2) == 16 / 2 + 16 * 4 / 32  # scale and zero of 32 tokens
    assert value.body_bytes_per_token(2) == 16 / 2 + 4
    session = OptimizedModel(codes).new_session(max_batch_size=2, max_seq_len=64)
    session.prefill(token_ids(codes, 2, 40))
    assert session.cache_bytes() == codes.plan.bytes_at([40, 40], 64)


@pytest.mark.parametrize("bits", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_the_state_is_right_after_every_step(bits):
    program = llama_program(layers=1)
    program.info = dataclasses.replace(program.info, context_length=None)
    paged, _ = apply(PageCache(32), ready(layers=1))
    factored, _ = apply(FactorKv(bits=bits, recent=3, sink=2), paged)
    checks = Prober(program, OptimizedModel, factored.plan).check_full(factored)
    assert all(check.is_lossy for check in checks)
    assert {"chunked prefill", "ragged batch", "batch reorder"} <= {c.schedule for c in checks}


def test_one_stream_can_be_left_alone():
    factored, _ = apply(FactorKv(None, 0.5), ready())
    assert {site.key.codec["codec"] for site in factored.plan.sites} == {"none"}
    assert {site.value.codec["codec"] for site in factored.plan.sites} == {"truncate"}
    assert factored.plan.sites[0].key.basis.kind == "identity"
    assert set(FactorKv(None, 0.5).ensures()) == {"v.codec", "v.basis"}


def test_a_dry_run_has_the_plan_but_not_the_constants():
    measured, _ = apply(FactorKv(bits=4), ready())
    dry, found = apply(FactorKv(bits=4), dataclasses.replace(ready(), calibration=None))
    assert fired(found) == 2
    assert not any(match.losses for match in found)
    assert dry.plan.bytes_per_token == measured.plan.bytes_per_token
    assert [s.key.planes for s in dry.plan.sites] == [s.key.planes for s in measured.plan.sites]


def test_a_second_time_does_nothing():
    factored, _ = apply(FactorKv(), ready())
    assert {(f.reason, f.done) for f in FactorKv().match(factored)} == {("already stored so", True)}


def test_latents_are_left_alone():
    latent, _ = apply(CacheLatent(), latent_program())
    cached, _ = apply(InsertCache(), latent)
    assert set(reasons(FactorKv().match(cached))) == {"a latent is factored as it is"}


def test_bases_of_projections_need_the_projections_of_the_source():
    fused, _ = apply(FuseNorms(), llama_program())
    cached, _ = apply(InsertCache(), fused)
    cached = dataclasses.replace(cached, calibration=ready().calibration)
    (reason,) = set(reasons(FactorKv(init="asvd").match(cached)))
    assert reason == "projections are no longer those that the statistics are of"
    assert fired(FactorKv(init="pca").match(cached)) == 2  # a near miss: keys are the same
    program = dataclasses.replace(ready())
    program.sites = tuple(dataclasses.replace(site, k=None) for site in program.sites)
    (reason,) = set(reasons(FactorKv(init="asvd").match(program)))
    assert reason == "keys are not the output of a plain linear layer"
    assert fired(FactorKv(None, 0.5, init="asvd").match(program)) == 2


@pytest.mark.parametrize(
    ("passes", "rule"),
    [
        (["factor-kv"], "insert-cache"),
        (["insert-cache", "rotate-qk", "factor-kv"], "statistics are those of the source"),
        (["insert-cache", "factor-kv", "rotate-qk"], "before rotate-qk changes the basis of K"),
        (
            [
                "insert-cache",
                {"quantize-kv": {"key": {"codec": "int"}, "value": {"codec": "int"}}},
                "factor-kv",
            ],
            "codes cannot change their basis",
        ),
    ],
)
def test_orders_that_cannot_be_are_refused(passes, rule):
    recipe = load_recipe({"version": 1, "name": "toy", "passes": passes})
    program = llama_program()
    with pytest.raises(RecipeError, match=rule):
        check_order(plan_passes(recipe.passes, program.facts, auto_order=False), program.facts)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"k_density": 0.0}, "densities must lie"),
        ({"v_density": 1.5}, "densities must lie"),
        ({"k_density": None, "v_density": None}, "one must be given"),
        ({"init": "svd"}, "init must be"),
        ({"bits": 5}, "bits must be"),
        ({"recent": -1}, "numbers of tokens"),
        ({"width": 0}, "width must be"),
    ],
)
def test_options_are_checked(options, rule):
    with pytest.raises(RecipeError, match=rule):
        FactorKv(**options)


@pytest.mark.parametrize(("rope", "rule"), [("pre", "after RoPE"), ("post", "must be undone")])
def test_kernels_refuse_what_they_cannot_undo(rope, rule):
    factored, _ = apply(FactorKv(), ready(rope=rope))
    with pytest.raises(CodegenError, match=rule):
        check_plan(factored.plan)


def test_kernels_refuse_the_codec_where_nothing_is_to_be_undone():
    factored, _ = apply(FactorKv(None, 0.5, width=16), ready(rope="post"))
    with pytest.raises(CodegenError, match=r"codec must be .*truncate"):
        check_plan(factored.plan)
