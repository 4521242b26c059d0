import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.sensitivity.choosing import Offer, choose, pareto_front

ROWS = st.lists(
    st.lists(st.builds(Offer, st.integers(1, 9), st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(rows=ROWS, budget=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_the_best_of_all(rows, budget):
    found = choose(dict(enumerate(rows)), budget)
    fitting = [
        picked
        for picked in itertools.product(*rows)
        if sum(offer.size for offer in picked) <= budget
    ]
    if not fitting:
        assert found is None
        return
    assert found is not None
    chosen = [rows[slot][index] for slot, index in found.items()]
    assert sum(offer.size for offer in chosen) <= budget
    best = min(sum(offer.cost for offer in picked) for picked in fitting)
    assert sum(offer.cost for offer in chosen) == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_costs_of_any_scale_are_told_apart():
    offers = {0: [Offer(1, 3e-9), Offer(1, 1e-9)], 1: [Offer(2, 1e-9), Offer(1, 5e-9)]}
    assert choose(offers, 3) == {0: 1, 1: 0}
    assert choose(offers, 2) == {0: 1, 1: 1}


@given(row=st.lists(st.builds(Offer, st.integers(1, 5), st.integers(0, 5)), min_size=1))
@settings(max_examples=40, deadline=None)
def test_the_front_holds_what_nothing_beats(row):
    def beats(a, b):
        return a.size <= b.size and a.cost <= b.cost and a != b

    front = [row[index] for index in pareto_front(row)]
    assert set(front) == {o for o in row if not any(beats(other, o) for other in row)}
    assert front == sorted(set(front), key=lambda offer: offer.size)
