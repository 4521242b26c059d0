"""KVTuner's search: prune within each layer, group layers that behave alike, search the groups.

Source: KVTuner, arXiv 2502.04420, section 5. How layers are grouped is known at second hand only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvxform.sensitivity.choosing import Offer, pareto_front

ALIKE = 0.5  # layers are alike if errors of one are at most so far from another's, in log units


@dataclass(frozen=True)
class Group:
    """Layers that get the same pair of formats.

    Attributes:
        layers: The layers, in order.
        front: Pairs worth trying, as indices into the offers of a layer, by size.
    """

    layers: tuple[int, ...]
    front: tuple[int, ...]


def group_layers(offers: Mapping[int, Sequence[Offer]]) -> list[Group]:
    """Return groups of layers with the same Pareto front and similar errors.

    Within one front, layers are joined by single linkage of their log errors (the mean absolute
    difference), which is DBSCAN without noise.

    Args:
        offers: Size and error of every pair at each layer.
    """
    by_front: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for layer, row in offers.items():
        by_front.setdefault((len(row), pareto_front(row)), []).append(layer)
    groups = []
    for (_, front), layers in by_front.items():
        errors = {n: [_log(offer.cost) for offer in offers[n]] for n in layers}
        groups += [Group(tuple(part), front) for part in _joined(errors)]
    return sorted(groups, key=lambda group: group.layers)


def _log(error: float) -> float:
    return math.log(max(error, 1e-12))


def _joined(errors: Mapping[int, Sequence[float]]) -> list[list[int]]:
    """Return connected components of layers that are alike."""
    from scipy.cluster.hierarchy import fcluster, linkage

    layers = list(errors)
    if len(layers) == 1:
        return [layers]
    points = np.array(list(errors.values())) / len(next(iter(errors.values())))
    labels = fcluster(linkage(points, "single", "cityblock"), ALIKE, "distance")
    parts: dict[int, list[int]] = {}
    for layer, label in zip(layers, labels.tolist(), strict=True):
        parts.setdefault(label, []).append(layer)
    return list(parts.values())


Choice = tuple[int, ...]  # for each group, an index into its front


def search(
    groups: Sequence[Group],
    sizes: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    *,
    budget: float,
    trials: int,
    seed: int,
    first: Sequence[Choice] = (),
) -> Choice | None:
    """Search choices for small size and cost with NSGA-II; return the cheapest within the budget.

    Args:
        groups: What is chosen for.
        sizes: Size of a choice.
        cost: Its cost; asked once for each choice that keeps the budget.
        budget: Largest size.
        trials: Choices to look at.
        seed: Seed of the search.
        first: Choices to begin with.

    Returns:
        The choice, or None if none that was looked at keeps the budget.
    """
    import optuna

    costs: dict[Choice, float] = {}

    def evaluate(trial: optuna.Trial) -> tuple[float, float]:
        choice = tuple(
            trial.suggest_int(str(i), 0, len(group.front) - 1) for i, group in enumerate(groups)
        )
        size = sizes(choice)
        trial.set_user_attr("excess", size - budget)
        if size > budget:
            return size, math.inf  # what cannot be taken is not measured
        if choice not in costs:
            costs[choice] = cost(choice)
        return size, costs[choice]

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constraints are an experimental feature
            sampler = optuna.samplers.NSGAIISampler(
                seed=seed, constraints_func=lambda trial: (trial.user_attrs["excess"],)
            )
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            for choice in first:
                study.enqueue_trial({str(i): index for i, index in enumerate(choice)})
            study.optimize(evaluate, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return min(costs, key=lambda choice: (costs[choice], sizes(choice), choice), default=None)
