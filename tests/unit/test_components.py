"""Bases of joined heads: against SVDs written out, and against training the two factors."""

from __future__ import annotations

import pytest
import torch

from kvxform.structure.components import (
    Components,
    activation_components,
    principal_components,
)

SIZE, INPUTS, TOKENS = 12, 20, 300


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return W, inputs x with channels of unequal size, and y = W x."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, INPUTS, generator=generator).double()
    scales = torch.logspace(-1, 1, INPUTS).double()
    x = torch.randn(TOKENS, INPUTS, generator=generator).double() * scales
    return weight, x, x @ weight.T


def error(y: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor | float = 0.0) -> float:
    kept = (y - mean) @ basis @ basis.T + mean
    return float((y - kept).square().sum(1).mean())


def test_principal_components_lose_the_discarded_singular_values():
    _, _, y = data()
    squares = torch.linalg.svdvals(y).square() / len(y)
    found = principal_components(y, centred=False)
    torch.testing.assert_close(found.energy, squares)
    for rank in (1, 5, SIZE):
        assert found.lost(rank, has_mean=False) == pytest.approx(float(squares[rank:].sum()))
        assert error(y, found.basis[:, :rank]) == pytest.approx(
            found.lost(rank, has_mean=False), abs=1e-9
        )


def test_a_mean_that_is_known_costs_no_component():
    _, _, y = data()
    y = y + 100.0
    plain, centred = (principal_components(y, centred=own) for own in (False, True))
    losses = [c.lost(4, has_mean=own) for c, own in ((plain, False), (centred, True))]
    assert losses[1] < losses[0]
    centre = y.mean(0)
    assert error(y, centred.basis[:, :4], centre) == pytest.approx(losses[1])
    without = principal_components(y - centre, centred=False)
    assert losses[1] == pytest.approx(without.lost(4, has_mean=False))


def test_activation_components_are_the_factors_of_cskv():
    """B A x by the equations of the paper, from an SVD, against projections in the basis."""
    weight, x, y = data()
    magnitude = x.abs().mean(0)
    u, z, vt = torch.linalg.svd(weight * magnitude.sqrt(), full_matrices=False)
    found = activation_components(weight, magnitude, y)
    for rank in (1, 5):
        down = z[:rank].sqrt()[:, None] * vt[:rank] / magnitude.sqrt()
        up = u[:, :rank] * z[:rank].sqrt()
        kept = found.basis[:, :rank]
        torch.testing.assert_close(y @ kept @ kept.T, x @ down.T @ up.T)
        assert found.lost(rank, has_mean=False) == pytest.approx(error(y, kept))


def test_training_the_factors_ends_at_the_principal_components():
    """From the start of CSKV, layer-wise training lowers the loss to that of Eckart and Young."""
    rank = 4
    weight, x, y = data()
    start = activation_components(weight, x.abs().mean(0), y)
    best = principal_components(y, centred=False).lost(rank, has_mean=False)
    up = start.basis[:, :rank].clone(memory_format=torch.contiguous_format).requires_grad_()
    down = (start.basis[:, :rank].T @ weight).contiguous().requires_grad_()
    optimiser = torch.optim.LBFGS([up, down], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = (y - x @ down.T @ up.T).square().sum(1).mean()
        value.backward()
        return value

    first, last = (float(value.detach()) for value in (optimiser.step(loss), loss()))
    assert first == pytest.approx(start.lost(rank, has_mean=False))
    assert best * (1 - 1e-9) <= last <= best * 1.01 < first


def test_bases_are_orthogonal_and_of_full_rank_they_lose_nothing():
    weight, x, y = data()
    for found in (
        principal_components(y[:5], centred=True),  # fewer samples than channels
        activation_components(weight, x.abs().mean(0), y),
        Components.identity(SIZE),
    ):
        eye = torch.eye(SIZE).double()
        torch.testing.assert_close(found.basis @ found.basis.T, eye, rtol=0, atol=1e-12)
        assert found.lost(SIZE, has_mean=True) == 0
