"""Dense bases and kvx::rotate, against products written out head by head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import apply, llama_program

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis, rotate_heads
from kvxform.errors import PassError
from kvxform.ir.verify import verify_program
from kvxform.passes.rotation.spectral_rotation import SpectralRotation


def rotations(count, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0].to(dtype)


@settings(deadline=None, max_examples=20)
@given(
    batch=st.sampled_from([(), (1,), (3,)]),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(0, 4),
    dim=st.sampled_from([2, 5, 8]),
)
def test_every_query_head_uses_the_matrix_of_its_kv_head(batch, kv_heads, groups, tokens, dim):
    x = torch.randn(*batch, kv_heads * groups, tokens, dim, dtype=torch.float64)
    matrices = rotations(kv_heads, dim)
    expected = torch.stack(
        [x[..., h, :, :] @ matrices[h // groups] for h in range(kv_heads * groups)], -3
    )
    torch.testing.assert_close(torch.ops.kvx.rotate(x, matrices), expected)


@pytest.mark.parametrize("joined", [2, 4])
def test_heads_can_be_rotated_together(joined):
    x, matrices = torch.randn(2, 4, 3, 5).double(), rotations(4 // joined, joined * 5)
    for first in range(0, 4, joined):
        own = x[:, first : first + joined].movedim(1, 2).flatten(2) @ matrices[first // joined]
        got = rotate_heads(x, matrices)[:, first : first + joined]
        torch.testing.assert_close(got.movedim(1, 2).flatten(2), own)


@pytest.mark.parametrize("joined", [1, 2])
def test_unrotate_is_the_inverse(joined):
    basis = Basis("matrix", weight="r", heads=joined)
    weights = {"r": rotations(4 // joined, 6 * joined)}
    x = torch.randn(2, 4, 3, 6).double()
    rotated = basis.rotate(x, weights)
    assert float((rotated - x).abs().max()) > 0.1
    torch.testing.assert_close(basis.unrotate(rotated, weights), x)
    torch.testing.assert_close(rotated.norm(), x.norm())


def test_short_dtypes_are_computed_in_the_dtype_of_the_matrices():
    x, matrices = torch.randn(1, 2, 3, 8).bfloat16(), rotations(2, 8, dtype=torch.float32)
    rotated = rotate_heads(x, matrices)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(
        rotated, rotate_heads(x.float(), matrices).bfloat16(), rtol=0, atol=0
    )


def test_shapes_alone():
    rotated = torch.ops.kvx.rotate(
        torch.empty(2, 4, 3, 8, device="meta"), torch.empty(2, 8, 8, device="meta")
    )
    assert rotated.shape == (2, 4, 3, 8)


def test_names_of_bases():
    assert str(Basis("matrix", weight="any.name")) == "matrix"
    assert str(Basis("matrix", weight="any.name", heads=4)) == "matrix(4 heads)"
    assert kvx.ROTATE in kvx.DIALECT


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"weight": "gone"}, "the basis of k must be a weight; got gone"),
        ({"heads": 2}, r"must be \[1, 32, 32\]; got \[2, 16, 16\]"),
    ],
)
def test_the_verifier_looks_at_the_matrices(change, rule):
    program, _ = apply(SpectralRotation(), llama_program(layers=1))
    (site,) = program.sites
    wrong = dataclasses.replace(site, k_basis=dataclasses.replace(site.k_basis, **change))
    program.sites = (wrong,)
    with pytest.raises(PassError, match=rule):
        verify_program(program)
