"""The exact choice of formats: measured costs that add up, under a budget of bytes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Slot = TypeVar("Slot", bound=Hashable)


@dataclass(frozen=True)
class Offer:
    """What one format costs at one place.

    Attributes:
        size: Bytes, or anything else that the budget is in.
        cost: What is to be small, for instance a divergence.
    """

    size: float
    cost: float


def choose(offers: Mapping[Slot, Sequence[Offer]], budget: float) -> dict[Slot, int] | None:
    """Return one format for each place, by index: the least summed cost within the budget.

    A multiple-choice knapsack, solved exactly as a mixed integer program.

    Args:
        offers: The formats of each place.
        budget: Largest summed size.

    Returns:
        The choice, or None if even the smallest formats exceed the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(min(offer.size for offer in row) for row in offers.values()) > budget:
        return None
    owners = np.repeat(np.arange(len(offers)), [len(row) for row in offers.values()])
    flat = [offer for row in offers.values() for offer in row]
    costs, sizes = (np.array([getattr(o, name) for o in flat]) for name in ("cost", "size"))
    one_each = (owners[None] == np.arange(len(offers))[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], -np.inf, budget)]
    scale = float(np.abs(costs).max()) or 1.0  # the solver's tolerances are absolute
    found = milp(
        costs / scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, "the smallest formats keep the budget"
    chosen = np.flatnonzero(found.x > 0.5)
    starts = np.searchsorted(owners, owners[chosen])
    return {slot: int(i) for slot, i in zip(offers, chosen - starts, strict=True)}


def pareto_front(offers: Sequence[Offer]) -> tuple[int, ...]:
    """Return the indices of offers that no other offer beats in size and cost, by size.

    Of equal offers the first one stays.
    """
    order = sorted(range(len(offers)), key=lambda i: (offers[i].size, offers[i].cost, i))
    front: list[int] = []
    for index in order:
        if not front or offers[index].cost < offers[front[-1]].cost:
            front.append(index)
    return tuple(front)
