"""How far the logits of a package may part from those of the eager lowering."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program
from torch import Tensor

from kvxform.runtime.model import OptimizedModel
from kvxform.verify.following import Follower
from kvxform.verify.tolerances import tolerance_for

KL = 0.0625 * torch.log(torch.tensor(0.0625 / 0.05)) + 0.9375 * torch.log(
    torch.tensor(0.9375 / 0.95)
)


def logits(first: float) -> Tensor:
    """Return logits whose softmax is `first` and the rest."""
    return torch.tensor([first, 1 - first]).log()


def follower(cost: float = 0.0, lossy_kl: float = 1e-6) -> Follower:
    """Return a follower whose package has logits of 5 % where the eager lowering has 6.25 %."""
    model = OptimizedModel(cached_program())
    tolerance = dataclasses.replace(tolerance_for(torch.float32), lossy_kl=lossy_kl)
    made = Follower(model, model, tolerance, cost, lambda _text: None)
    made._pairs.append((logits(0.0625), logits(0.05)))
    return made


@pytest.mark.parametrize(
    ("cost", "lossy_kl", "own", "bound"),
    [
        (0.0, 1e-6, 0.0625, 1e-6),  # the eager lowering gives the same either way
        (0.0, 1e-6, 0.05, float(4 * KL)),  # it parts from itself by as much
        (0.0, 1.0, 0.05, 1.0),
        (8.0, 1e-6, 0.05, 4.0),  # half of what the codes cost
    ],
)
def test_logits_are_held_to_the_largest_of_three_bounds(cost, lossy_kl, own, bound):
    made = follower(cost, lossy_kl)
    made._own.append((logits(0.0625), logits(own)))
    (found,) = made.conclude()
    assert found.error == pytest.approx(float(KL), rel=1e-3)
    assert found.bound == pytest.approx(bound, rel=1e-3)
    assert found.is_fine == (bound > float(KL))


def test_nothing_is_said_of_logits_that_were_judged_one_by_one():
    made = follower()
    made._pairs.clear()
    assert made.conclude() == []
