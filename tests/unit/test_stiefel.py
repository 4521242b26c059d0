"""Descent over orthogonal matrices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.rotations.stiefel import CayleySgd, cayley


def orthogonal(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def defect(matrices):
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    return float((matrices @ matrices.mT - eye).abs().max())


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(1, 3),
    size=st.integers(1, 12),
    seed=st.integers(0, 99),
    rate=st.sampled_from([1e-3, 0.5, 1.5, 100.0]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_matrices_stay_orthogonal_after_every_step(count, size, seed, rate, momentum):
    descent = CayleySgd([orthogonal(count, size, seed)], momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        gradient = torch.randn(count, size, size, generator=generator) * 50
        descent.step([gradient], rate)
        assert defect(descent.points[0]) < 1e-10


def test_a_cayley_transform_of_two_dimensions_is_a_turn():
    angle = torch.tensor(0.6, dtype=torch.float64)
    turn = 2 * (angle / 2).tan()
    skew = torch.tensor([[0, -turn], [turn, 0]], dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    torch.testing.assert_close(cayley(torch.eye(2).double(), skew), expected)


def test_descent_finds_the_nearest_rotation():
    """The minimum of |R - A|^2 over rotations is the polar factor of A."""
    generator = torch.Generator().manual_seed(3)
    target = orthogonal(2, 6, 1) @ torch.diag_embed(
        torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.5
    )
    u, _, vh = torch.linalg.svd(target)
    best = u @ vh
    start = best @ torch.matrix_exp(skew_noise(0.3))
    descent = CayleySgd([start], momentum=0.5)
    for _ in range(300):
        descent.step([2 * (descent.points[0] - target)], 0.1)
    torch.testing.assert_close(descent.points[0], best, rtol=0, atol=1e-6)


def skew_noise(scale):
    noise = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return scale * (noise - noise.mT)


def test_a_steep_matrix_takes_a_short_step():
    start = orthogonal(1, 4, 0)
    near, far = (CayleySgd([start]) for _ in range(2))
    gradient = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))
    near.step([gradient], 1e-3)
    far.step([1e6 * gradient], 1e9)
    moved = [float((d.points[0] - start).norm()) for d in (near, far)]
    assert 0 < moved[0] < 0.01
    assert moved[0] < moved[1] < 2
