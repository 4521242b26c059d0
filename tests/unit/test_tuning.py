import itertools
import math

import optuna

from kvxform.sensitivity.choosing import Offer
from kvxform.sensitivity.tuning import Group, group_layers, search

SIZES = (2, 4, 8)


def offers(*errors):
    return [Offer(size, error) for size, error in zip(SIZES, errors, strict=True)]


def test_layers_alike_are_one_group_and_others_are_not():
    rows = {
        0: offers(0.4, 0.1, 0.001),
        1: offers(0.35, 0.11, 0.0012),
        2: offers(4.0, 1.0, 0.01),  # the same front, ten times as sensitive
        3: offers(0.4, 0.5, 0.001),  # 4 bytes are worse than 2: another front
    }
    groups = group_layers(rows)
    assert groups == [Group((0, 1), (0, 1, 2)), Group((2,), (0, 1, 2)), Group((3,), (0, 2))]


def test_the_search_comes_near_the_best_choice_and_repeats_itself():
    weights = (1.0, 30.0, 0.1, 5.0)
    groups = [Group((i,), (0, 1, 2)) for i in range(4)]

    def size(choice):
        return sum(SIZES[index] for index in choice)

    def cost(choice):
        seen.append(choice)
        return sum(w * 4.0 ** -SIZES[index] for w, index in zip(weights, choice, strict=True))

    def run(trials):
        seen.clear()
        return search(groups, size, cost, budget=20, trials=trials, seed=1)

    seen = []
    best = min((c for c in itertools.product(range(3), repeat=4) if size(c) <= 20), key=cost)
    verbosity = optuna.logging.get_verbosity()
    found = run(150)
    alike = min(cost((i,) * 4) for i in range(2))
    seen.clear()
    assert cost(found) <= 1.5 * cost(best) < alike
    assert run(150) == found
    assert all(size(choice) <= 20 for choice in seen), "what cannot be taken is not measured"
    assert len(seen) == len(set(seen))
    assert optuna.logging.get_verbosity() == verbosity


def test_a_search_that_sees_nothing_within_the_budget_says_so():
    groups = [Group((0,), (0, 1))]
    assert search(groups, lambda _: 3.0, lambda _: math.nan, budget=2, trials=3, seed=0) is None
