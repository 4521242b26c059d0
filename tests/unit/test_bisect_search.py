"""The search for items at fault, on made-up judges."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.bisecting.search import Verdict, fewest_to_leave_out, isolate, minimise

FAILS, PASSES, UNKNOWN = Verdict.FAILS, Verdict.PASSES, Verdict.UNKNOWN


class Judge:
    """Fails where a set holds one of `groups` as a whole; counts its trials."""

    def __init__(self, *groups: set[int]) -> None:
        self.groups, self.trials = groups, 0

    def __call__(self, wanted: frozenset[int]) -> Verdict:
        self.trials += 1
        return FAILS if any(group <= wanted for group in self.groups) else PASSES


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_single_fault_is_found_and_nothing_else(case):
    count, faults = case
    if faults:
        judge = Judge(*({fault} for fault in faults))
        assert isolate(range(count), judge) == [(fault,) for fault in sorted(faults)]


def test_one_fault_among_thirty_takes_few_trials():
    judge = Judge({17})
    assert isolate(range(30), judge) == [(17,)]
    assert judge.trials <= 10


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 24), st.data())
def test_items_at_fault_together_are_found_together(count, data):
    group = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    assert minimise(range(count), Judge(group)) == tuple(sorted(group))


def test_a_pair_across_the_halves_is_one_group():
    assert isolate(range(8), Judge({1, 6})) == [(1, 6)]


def test_what_cannot_be_tried_apart_stays_together():
    whole = frozenset(range(5))
    assert isolate(range(5), lambda wanted: FAILS if wanted == whole else UNKNOWN) == [
        (0, 1, 2, 3, 4)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.floats(0, 1))
def test_the_costliest_are_left_out_and_no_more(costs, share):
    costs = sorted(costs, reverse=True)
    bound = share * (sum(costs) - 1)  # all of them together are too many
    left = fewest_to_leave_out(
        range(len(costs)),
        lambda wanted: PASSES if sum(costs[i] for i in wanted) <= bound else FAILS,
    )
    assert sum(costs[left:]) <= bound < sum(costs[left - 1 :])
