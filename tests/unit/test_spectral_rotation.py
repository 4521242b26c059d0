"""spectral-rotation: the bases by their definition, what is stored, and what blocks it."""

from __future__ import annotations

import dataclasses

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
from kvxform.calibrate.collecting import collect
from kvxform.codecs.basis import Basis
from kvxform.errors import RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import default_positions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.spectral_rotation import SpectralRotation
from kvxform.rotations.spectral import bit_reversed, spectral_basis


def calibrated(program):
    ids = token_ids(program, batch=3, tokens=32, seed=5)
    return dataclasses.replace(program, calibration=collect(program, ids, name="toy"))


def held(program, ids):
    cache = DenseCache()
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    return cache.stored


@pytest.mark.parametrize("make", [lambda: llama_program(bias=True), gpt2_program])
@pytest.mark.parametrize("cache_first", [False, True])
def test_what_is_stored_is_rotated_and_logits_stay(make, cache_first):
    program = calibrated(make())
    ids = token_ids(program)
    plain, _ = apply(InsertCache(), program)
    rotated = program
    passes = [InsertCache(), SpectralRotation()]
    for graph_pass in passes if cache_first else reversed(passes):
        rotated, _ = apply(graph_pass, rotated)
    assert {site.key.basis.kind for site in rotated.plan.sites} == {"matrix"}
    assert rotated.facts["k.basis"] == rotated.facts["v.basis"] == "matrix"
    before, after = held(plain, ids), held(rotated, ids)
    for site in rotated.sites:
        for basis, x, new in zip(
            (site.k_basis, site.v_basis), before[site.layer], after[site.layer], strict=True
        ):
            matrices = rotated.weights[basis.weight]
            assert matrices.shape == (site.num_kv_heads, 16, 16)
            torch.testing.assert_close(
                matrices @ matrices.mT,
                torch.eye(16, dtype=torch.float64).expand_as(matrices),
                rtol=0,
                atol=1e-12,
            )
            torch.testing.assert_close(new, x @ matrices, rtol=0, atol=1e-11)
            torch.testing.assert_close(basis.unrotate(new, rotated.weights), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(run(rotated, ids, [4, 5]), run(program, ids), rtol=0, atol=1e-11)


def test_every_stored_channel_of_queries_holds_the_same_share():
    program = calibrated(llama_program(layers=1))
    rotated, _ = apply(SpectralRotation(), program)
    matrices = rotated.weights[rotated.site(0).k_basis.weight]
    grams = program.calibration.layers[0].q_post.gram.unflatten(0, (2, 2)).mean(1)
    shares = (matrices.mT @ grams @ matrices).diagonal(dim1=-2, dim2=-1)
    expected = shares.mean(-1, keepdim=True).expand_as(shares)
    torch.testing.assert_close(shares, expected, rtol=1e-9, atol=0)
    plain = grams.diagonal(dim1=-2, dim2=-1)
    assert float((plain / plain.mean(-1, keepdim=True) - 1).abs().max()) > 0.1


def test_a_basis_by_its_equation():
    x = torch.randn(1, 64, 4, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    gram = (x.mT @ x) / 64
    basis = spectral_basis(gram)[0]
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    vectors = basis[:, [0, 2, 1, 3]] @ hadamard.double()  # bits of 0..3 backwards: 0, 2, 1, 3
    inside = vectors.T @ gram[0] @ vectors
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-10)
    assert inside.diagonal().tolist() == sorted(inside.diagonal().tolist(), reverse=True)


@pytest.mark.parametrize(("size", "first"), [(8, [0, 4, 2, 6, 1]), (12, [0, 8, 4, 2, 10])])
def test_channels_are_in_bit_reversed_order(size, first):
    order = bit_reversed(size).tolist()
    assert order[:5] == first
    assert sorted(order) == list(range(size))


def test_one_stream_alone():
    program = calibrated(llama_program())
    keys, found = apply(SpectralRotation(values=False), program)
    assert fired(found) == 2
    assert {site.v_basis for site in keys.sites} == {Basis()}
    values, found = apply(SpectralRotation(keys=False), program)
    assert fired(found) == 2
    assert not list(values.calls(kvx.ROTATE))
    with pytest.raises(RecipeError, match=r"KVX107 \[spectral-rotation\] keys or values must be"):
        SpectralRotation(keys=False, values=False)


def test_rotations_do_not_stack():
    once, _ = apply(RotateQk(), calibrated(llama_program(layers=1)))
    _, found = apply(SpectralRotation(), once)
    assert reasons(found) == [
        "keys are in basis hadamard(16), and rotations do not stack",
        "another stream that was asked for cannot be rotated",
    ]
    _, found = apply(SpectralRotation(keys=False), once)
    assert fired(found) == 1


def test_latents_and_odd_widths_are_left_alone():
    assert reasons(SpectralRotation().match(llama_program(head_dim=18)))[:1] == [
        "no Hadamard matrix of order 18 is known"
    ]
    program = latent_program(layers=1)
    program.sites = (dataclasses.replace(program.sites[0], payload="latent"),)
    assert reasons(SpectralRotation(values=False).match(program)) == ["keys are latents"]
