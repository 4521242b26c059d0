"""rotate-k-prerope: what is stored, the order of channels, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import DenseCache, apply, fired, gpt2_program, llama_program, reasons, run, token_ids
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.calibrate import collect
from kvxform.codecs.base import make_codec
from kvxform.errors import PassError, RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import Program, default_positions
from kvxform.ir.verify import verify_program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_k_prerope import RotateKPrerope
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober


def ready(program: Program | None = None, **model: int) -> Program:
    """Return a toy model that caches keys before RoPE, with a calibration."""
    program = program or llama_program(**model)
    text = token_ids(program, 4, 32, seed=3)
    cached, _ = apply(InsertCache(), program)
    before, _ = apply(CachePrerope(), cached)
    return dataclasses.replace(before, calibration=collect(program, text, name="random"))


def joined_keys(program: Program, ids: Tensor) -> Tensor:
    """Return what layer 0 stores of all heads, `[B T, Hk D]`."""
    cache = DenseCache()
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    k, _ = cache.stored[0]
    return k.transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("kv_heads", "heads", "together"), [(2, 4, 2), (4, 2, 2), (4, 4, 4), (3, 4, 3), (2, 1, 1)]
)
def test_logits_stay_and_reading_undoes_both(kv_heads, heads, together):
    program = llama_program(heads=2 * kv_heads, kv_heads=kv_heads)
    before = ready(heads=2 * kv_heads, kv_heads=kv_heads)
    plain, found = apply(RotateKPrerope(heads, "none"), before)
    sorted_, _ = apply(RotateKPrerope(heads), before)
    assert fired(found) == 2
    assert plain.plan.sites[0].key.basis.heads == together
    assert sorted_.plan.sites[0].key.basis.heads == kv_heads
    ids = token_ids(program)
    for each in (plain, sorted_):
        torch.testing.assert_close(run(each, ids, [4, 5]), run(program, ids), rtol=0, atol=1e-12)
        assert len(list(each.calls(kvx.ROTATE))) == 2


def test_rotation_spreads_one_channel_over_all_heads():
    before = ready()
    rotated, _ = apply(RotateKPrerope(order="none"), before)
    matrix = rotated.weights[rotated.plan.sites[0].key.basis.weight][0]
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 32**-0.5))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(32).double())


@pytest.mark.parametrize("order", ["sum", "abs_sum", "absmax"])
def test_channels_rise_by_their_statistic(order):
    before = ready()
    rotated, _ = apply(RotateKPrerope(order="none"), before)
    sorted_, _ = apply(RotateKPrerope(order=order), before)
    text = before.calibration.token_ids
    plain, found = joined_keys(rotated, text), joined_keys(sorted_, text)
    by = {"sum": Tensor.sum, "abs_sum": lambda x, n: x.abs().sum(n)}
    statistic = by.get(order, lambda x, n: x.abs().amax(n))
    torch.testing.assert_close(statistic(found, 0), statistic(plain, 0).sort().values)
    assert not torch.equal(statistic(plain, 0).sort().values, statistic(plain, 0))


def test_sorting_narrows_groups_of_a_stream_whose_means_differ():
    """The sum sorts channels by their means, which tightens ranges of groups."""
    program, spans = llama_program(bias=True), []
    program.weights["layers.0.attn.k.bias"] *= 10
    before = ready(program)
    for order in ("none", "sum"):
        rotated, _ = apply(RotateKPrerope(order=order), before)
        x = joined_keys(rotated, token_ids(program, 4, 32))  # [tokens, 32]
        groups = x.unflatten(1, (4, 8))
        spans.append(float((groups.amax(-1) - groups.amin(-1)).mean()))
    assert spans[1] < 0.95 * spans[0]


@pytest.mark.slow
def test_the_state_is_right_after_every_step():
    source = llama_program(layers=1)
    codec = {"codec": "int", "bits": 2, "clip": 0.8}
    quantize = QuantizeKv(codec, codec, regions={"sink": 2})
    rotated, _ = apply(RotateKPrerope(), ready(layers=1))
    quantised, _ = apply(quantize, rotated)
    for program in (source, quantised):
        program.info = dataclasses.replace(program.info, context_length=None)
    assert make_codec(quantised.plan.sites[0].key.codec).name == "int"
    checks = Prober(source, OptimizedModel, quantised.plan).check_full(quantised)
    assert {"chunked prefill", "ragged batch", "batch reorder"} <= {c.schedule for c in checks}


def test_keys_after_rope_are_near_misses():
    cached, _ = apply(InsertCache(), llama_program())
    found = RotateKPrerope().match(cached)
    assert reasons(found) == ["keys are not cached before RoPE"] * 2
    cached, _ = apply(InsertCache(), gpt2_program())
    assert not fired(RotateKPrerope().match(cached))


def test_sizes_without_a_hadamard_matrix_are_near_misses():
    before = ready(heads=2, kv_heads=1, head_dim=6)
    assert reasons(RotateKPrerope().match(before)) == ["no Hadamard matrix of order 6 is known"] * 2


def test_rotations_after_rope_do_not_combine_with_it():
    """The pipeline refuses by facts; the verifier would too."""
    fact = {r.fact: r.allowed for r in RotateQk.requires}
    assert fact["k.rope"] == ("post",)
    turned = apply(RotateQk(), apply(InsertCache(), llama_program())[0])[0]
    key = dataclasses.replace(turned.plan.sites[0].key, rope="pre")
    turned.plan = turned.plan.replace_site(0, key=key)
    with pytest.raises(PassError, match="if and only if they are cached before RoPE"):
        verify_program(turned)


@pytest.mark.parametrize("options", [{"heads": 0}, {"order": "mean"}])
def test_options_are_checked(options):
    with pytest.raises(RecipeError, match="must be"):
        RotateKPrerope(**options)
