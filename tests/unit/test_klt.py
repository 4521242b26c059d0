"""klt: what is stored, that reading undoes it, how bits are shared, and what is refused."""

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

import kvxform.ir.ops as kvx
from kvxform.calibrate import collect
from kvxform.cli.plan import added_per_step
from kvxform.codecs.base import make_codec
from kvxform.codegen.triton.capability import check_plan
from kvxform.errors import CodegenError, PassError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.ir.stream_plan import ReadForm
from kvxform.ir.verify import verify_program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.klt import Klt
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

WINDOWS = 12


@functools.cache
def ready(
    kind: str = "llama", *, rope: str = "pre", fisher: bool = True, layers: int = 2
) -> Program:
    """Return a program with a cache and a calibration, which tests must not change."""
    program = {"llama": llama_program, "gpt2": gpt2_program}[kind](layers=layers)
    text = token_ids(program, WINDOWS, 32, seed=3)
    calibration = collect(program, text, name="random", fisher=fisher)
    cached, _ = apply(InsertCache(), program)
    if rope == "pre":
        cached, _ = apply(CachePrerope(), cached)
    return dataclasses.replace(cached, calibration=calibration)


def stored(program: Program, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    cache = DenseCache()
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    return cache.stored


def test_the_plan_says_what_a_step_takes_more():
    turned, _ = apply(Klt(bits=8, width=32), ready())
    assert added_per_step(turned) == (
        "one matrix(2 heads) on new k, its inverse on every key that is read; "
        "one matrix(2 heads) on new v, its inverse on every value that is read; "
        "RoPE on every key that is read"
    )
    # 2 layers, K and V of one token: 32 channels times a matrix of 32 x 32
    assert turned.plan.extra_flops_per_token() == 2 * 2 * 32 * 32


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("width", [16, 32])
def test_bases_are_undone_when_they_are_read(rope, width):
    """Without codes the logits stay: one basis a head, or one for both heads."""
    program = llama_program()
    turned, found = apply(Klt(bits=8, width=width), ready(rope=rope))
    assert fired(found) == 2
    ids = token_ids(program)
    expected = run(program, ids)
    assert float((run(turned, ids, [4, 5]) - expected).abs().max()) < 1e-5  # bases are float32
    assert {site.key.basis.heads for site in turned.plan.sites} == {width // 16}
    for node in turned.calls(kvx.CACHED_ATTENTION):
        assert {"key_basis", "value_basis"} <= set(node.kwargs)


def test_components_of_the_calibration_text_are_white():
    before = ready()
    turned, _ = apply(Klt(bits=8), before)
    text = before.calibration.token_ids
    for k, v in stored(turned, text).values():
        for x in (k, v):
            c = x.transpose(1, 2).flatten(0, 1).flatten(1)  # [B, Hk, T, D] -> [B T, Hk D]
            torch.testing.assert_close(torch.cov(c.T), torch.eye(32).double(), rtol=0, atol=0.01)


def errors(program: Program, bits: float, **options: object) -> float:
    quantised, _ = apply(Klt(bits=bits, **options), ready())
    assert quantised.plan.bits_per_value <= bits
    assert quantised.plan.bits_per_value > bits - 8 / 32
    ids = token_ids(program, 4, 40, seed=9)
    return float((OptimizedModel(quantised)(ids) - run(program, ids)).square().mean())


def test_more_bits_mean_less_error_and_weights_pay():
    program = llama_program()
    falling = [errors(program, bits) for bits in (2, 4, 7)]
    assert falling[0] > 4 * falling[1] > 16 * falling[2]
    plain = errors(program, 2, weighted=False)
    assert falling[0] < 0.8 * plain


def test_one_budget_is_shared_by_all_streams():
    shared, _ = apply(Klt(bits=3), ready())
    alike, _ = apply(Klt(bits=3, weighted=False), ready(fisher=False))
    widths = [
        [stream.planes[0].width for site in p.plan.sites for stream in site.streams.values()]
        for p in (shared, alike)
    ]
    assert sum(widths[0]) == sum(widths[1]) == 3 * 32 * 4 // 8
    assert len(set(widths[0])) > 1
    assert set(widths[1]) == {12}
    codecs = [make_codec(site.value.codec) for site in shared.plan.sites]
    assert all(codec.gain for codec in codecs)
    assert shared.plan.sites[0].value.calibration == "random"


@pytest.mark.parametrize("trellis", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_state_is_right_after_every_step(trellis):
    program = llama_program(layers=1)
    program.info = dataclasses.replace(program.info, context_length=None)
    paged, _ = apply(PageCache(16), ready(layers=1))
    paged.info = program.info
    klt = Klt(bits=3, trellis=trellis, regions={"sink": 2, "recent": 3})
    quantised, _ = apply(klt, paged)
    checks = Prober(program, OptimizedModel, quantised.plan).check_full(quantised)
    assert all(check.is_lossy for check in checks)
    assert {"chunked prefill", "ragged batch", "batch reorder"} <= {c.schedule for c in checks}


def test_a_dry_run_has_the_plan_but_not_the_constants():
    program = llama_program()
    cached, _ = apply(InsertCache(), program)
    dry, found = apply(Klt(bits=3), cached)
    assert fired(found) == 2
    assert dry.plan.bits_per_value == 3.0
    assert {m for site in dry.plan.sites for head in site.key.codec["mean"] for m in head} == {0.0}


def test_latents_are_left_alone():
    latent, _ = apply(CacheLatent(), latent_program())
    cached, _ = apply(InsertCache(), latent)
    found = Klt(bits=3).match(cached)
    assert set(reasons(found)) == {"values are part of the latent"}


def test_models_without_rope_are_fine():
    program = gpt2_program()
    turned, found = apply(Klt(bits=8), ready("gpt2", rope="none"))
    assert fired(found) == 2
    ids = token_ids(program)
    assert float((run(turned, ids) - run(program, ids)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"bits": 0}, "bits must lie"),
        ({"bits": 3, "width": 1}, "width must be"),
        ({"bits": 3, "ridge": 0}, "ridge must be positive"),
        ({"bits": 3, "tails": "cauchy"}, "tails must be"),
    ],
)
def test_options_are_checked(options, rule):
    with pytest.raises(RecipeError, match=rule):
        Klt(**options)


def test_streams_that_are_turned_cannot_be_folded():
    turned, _ = apply(Klt(bits=3), ready())
    value = dataclasses.replace(turned.plan.sites[0].value, read=ReadForm("folded"))
    turned.plan = turned.plan.replace_site(0, value=value)
    with pytest.raises(CodegenError, match="turned when it is read"):
        OptimizedModel(turned)


@pytest.mark.parametrize(
    ("rope", "rule"), [("pre", "after RoPE"), ("post", "bases must be undone")]
)
def test_kernels_refuse_what_they_cannot_undo(rope, rule):
    turned, _ = apply(Klt(bits=3), ready(rope=rope, layers=1))
    with pytest.raises(CodegenError, match=rule):
        check_plan(turned.plan)


def test_the_verifier_wants_the_inverse():
    turned, _ = apply(Klt(bits=3), ready())
    node = turned.attention_node(1)
    node.kwargs = {name: x for name, x in node.kwargs.items() if name != "value_basis"}
    with pytest.raises(PassError, match="value_basis must be that of what is cached"):
        verify_program(turned)
