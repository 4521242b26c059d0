"""balance-channels: factors by their equation, where they go, and what it is good for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import (
    DenseCache,
    apply,
    aten,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)

from kvxform.calibrate.collecting import collect
from kvxform.codecs.basis import Basis
from kvxform.codecs.integer import IntCodec
from kvxform.errors import RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import default_positions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.balance_channels import BalanceChannels
from kvxform.passes.rotation.rotate_qk import RotateQk


def calibrated(program):
    ids = token_ids(program, batch=3, tokens=32, seed=5)
    return dataclasses.replace(program, calibration=collect(program, ids, name="toy"))


def uneven(make=llama_program, **options):
    """Return a model whose first keys are large in some channels, and queries in others."""
    program = make(layers=1, **options)
    site = program.site(0)
    for projection, channels, heads in ((site.k, [2, 10], 2), (site.q, [5, 13], site.num_q_heads)):
        axis = 0 if projection.layout == "out_in" else 1
        rows = projection.indices(heads, 16)[:, channels].flatten()
        weight = program.weights[projection.weight]
        program.weights[projection.weight] = weight.index_copy(
            axis, rows, weight.index_select(axis, rows) * 20
        )
    return calibrated(program)


def without_q(program):
    site = dataclasses.replace(program.sites[0], q=None)
    program.sites = (site, *program.sites[1:])
    return program


def held(program, ids):
    cache = DenseCache()
    cached = program if program.is_cached else apply(InsertCache(), program)[0]
    cached.to_module()(ids, default_positions(ids), make_handle(cache))
    return cache.stored


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
@pytest.mark.parametrize("folds", [False, True])
def test_keys_are_scaled_in_the_weights_or_after_rope(make, folds):
    program = uneven(make)
    if not folds:
        program = without_q(program)
    ids = token_ids(program)
    balanced, found = apply(BalanceChannels(online=not folds), program)
    assert fired(found) == 1
    assert (len(balanced.graph.nodes) == len(program.graph.nodes)) == folds
    (site,) = balanced.sites
    factors = balanced.weights[site.k_basis.weight]
    assert factors.shape == (2, 1, 16)
    assert float(factors.max() / factors.min()) >= 8
    torch.testing.assert_close(factors.log2(), factors.log2().round(), rtol=0, atol=0)
    (k, v), (new_k, new_v) = held(program, ids)[0], held(balanced, ids)[0]
    torch.testing.assert_close(new_k, k * factors, rtol=0, atol=1e-11)
    torch.testing.assert_close(new_v, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(site.k_basis.unrotate(new_k, balanced.weights), k)
    torch.testing.assert_close(run(balanced, ids), run(program, ids), rtol=0, atol=1e-11)


def test_factors_by_their_equation():
    program = uneven()
    balanced, _ = apply(BalanceChannels(alpha=0.7), program)
    factors = balanced.weights["balance_channels.k_0"][:, 0]
    layer = program.calibration.layers[0]
    q = torch.maximum(layer.q_post.low.abs(), layer.q_post.high.abs()).view(2, 2, 16).amax(1)
    radius = (q[:, :8].square() + q[:, 8:].square()).sqrt().repeat(1, 2)
    wanted = 0.7 * radius.log2() - 0.3 * layer.envelope.log2()
    wanted = wanted - wanted.median(-1, keepdim=True).values
    assert float((factors.log2() - wanted).abs().max()) <= 0.5 + 1e-6
    assert torch.equal(factors[:, :8], factors[:, 8:]), "both of a pair have one factor"
    assert factors[:, 5].min() > 1 > factors[:, 2].max()


def test_two_bits_lose_less_of_the_scores():
    program = uneven()
    ids = token_ids(program, 1, 40, seed=8)
    balanced, _ = apply(BalanceChannels(), program)
    codec, scores = IntCodec(bits=2), []
    for each in (program, balanced):
        seen = {}

        class Seen(DenseCache):
            def attend(self, layer, q, positions, scoring, seen=seen):
                seen["q"] = q
                return super().attend(layer, q, positions, scoring)

        cache = Seen()
        cached, _ = apply(InsertCache(), each)
        cached.to_module()(ids, default_positions(ids), make_handle(cache))
        k = cache.stored[0][0]
        error = codec.decode(codec.encode(k), k.dtype) - k
        scores.append(float((seen["q"] @ error.repeat_interleave(2, 1).mT).square().mean()))
    assert scores[1] < 0.5 * scores[0]


def test_short_dtypes_stay_exact():
    program = calibrated(llama_program(dtype=torch.bfloat16))
    ids = token_ids(program)
    balanced, found = apply(BalanceChannels(), program)
    assert fired(found) == 2
    assert torch.equal(run(balanced, ids), run(program, ids)), "powers of two round nothing"


def test_what_stands_between_is_told_with_the_way_out():
    _, found = apply(BalanceChannels(), without_q(calibrated(llama_program(layers=1))))
    assert reasons(found) == ["queries or keys are not made by a plain linear layer"]
    assert found[0].hint == "use online: true"


def test_values_made_by_the_same_weights_block_the_fold():
    program = calibrated(llama_program(layers=1))
    site = dataclasses.replace(program.sites[0], v=program.sites[0].k)
    program.sites = (site,)
    _, found = apply(BalanceChannels(), program)
    assert reasons(found) == ["values may be made by the same weights as keys"]


def test_rotations_do_not_stack_and_latents_are_left_alone():
    once, _ = apply(BalanceChannels(), calibrated(llama_program(layers=1)))
    _, found = apply(RotateQk(), once)
    assert reasons(found) == ["keys are in basis scale, and rotations do not stack"]
    program = latent_program(layers=1)
    program.sites = (dataclasses.replace(program.sites[0], payload="latent"),)
    assert reasons(BalanceChannels().match(program)) == ["keys are latents, which are values too"]


def test_a_bad_share_is_refused():
    with pytest.raises(RecipeError, match=r"KVX107 \[balance-channels\] alpha must lie between"):
        BalanceChannels(alpha=1.5)


def test_the_basis_of_a_dry_run_has_its_shape():
    balanced, _ = apply(BalanceChannels(online=True), without_q(llama_program(layers=1)))
    assert balanced.site(0).k_basis == Basis("scale", weight="balance_channels.k_0")
    assert torch.equal(balanced.weights["balance_channels.k_0"], torch.ones(2, 1, 16).double())
    assert len(list(balanced.calls(aten.mul.Tensor))) == 3, "q, k, and the gate of the MLP"
