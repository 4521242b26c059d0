"""Schedules stay within their sequences and cover what they promise, for any lengths."""

from __future__ import annotations

from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.verify.probe import make_probe
from kvxform.verify.schedules import (
    Crop,
    Decode,
    Free,
    Prefill,
    full_schedules,
    long_schedule,
    padded_schedule,
    probe_schedule,
    row_schedules,
    sharing_schedule,
    wrap_schedule,
)
from kvxform.verify.suites import SCHEDULES, Fit, make_suites


def play(schedule, lengths):
    """Return (sequence, tokens seen) of the rows that are live at the end; checks every step."""
    rows: dict[int, tuple[int, int]] = {}
    for action in schedule.actions:
        if isinstance(action, Prefill):
            rows |= {row: (sequence, 0) for row, sequence in (action.sequences or {}).items()}
            counts = action.tokens
        elif isinstance(action, Decode):
            counts = dict.fromkeys(rows, action.steps)
        elif isinstance(action, Free):
            for row in action.rows:
                del rows[row]
            counts = {}
        else:
            if isinstance(action, Crop):
                assert all(tokens < rows[row][1] for row, tokens in action.tokens.items())
                rows |= {row: (rows[row][0], tokens) for row, tokens in action.tokens.items()}
            else:
                rows = {i: rows[source] for i, source in enumerate(action.order)}
            rows |= {row: (s, rows[row][1]) for row, s in (action.sequences or {}).items()}
            counts = {}
        for row, count in counts.items():
            sequence, seen = rows[row]
            assert count >= 1
            assert seen + count <= lengths[sequence]
            rows[row] = (sequence, seen + count)
    return rows


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(8, 300), st.integers(8, 300), st.integers(8, 60)))
def test_full_schedules_stay_within_their_sequences(lengths):
    played = {s.name: play(s, lengths) for s in full_schedules(lengths)}
    assert played["prefill"] == played["chunked prefill"]
    assert played["page reuse after free"][0][0] == 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(4, 80), min_size=1, max_size=4))
def test_the_probe_schedule_covers_every_position(lengths):
    rows = play(probe_schedule(lengths), lengths)
    assert [seen for _, seen in rows.values()] == lengths


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(8, 300), st.integers(8, 300), st.integers(8, 60)))
def test_rows_that_are_padded_on_both_sides_stay_within_their_sequences(lengths):
    schedule = padded_schedule(lengths)
    assert {sequence for sequence, _ in play(schedule, lengths).values()} == {0, 1, 2}
    assert schedule.actions[0].padding == "both"


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(8, 150)] * 4), st.data())
def test_shared_rows_are_forked_freed_and_used_again(lengths, data):
    prefix = data.draw(st.integers(1, min(lengths[0], lengths[3]) - 2))
    rows = play(sharing_schedule(lengths, prefix), lengths)
    assert [sequence for sequence, _ in rows.values()] == [3, 1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(40, 400), st.booleans())
def test_every_suite_stays_within_the_context(needed, context, is_ragged):
    fit = Fit(PLAN, WINDOWED, needed, context, is_ragged=is_ragged)
    for suite in make_suites(fit, lambda lengths: make_probe(48, lengths)):
        lengths = suite.sequences.lengths
        assert all(n <= context for n in lengths)
        for schedule in suite.schedules.values():
            play(schedule, lengths)
            first = schedule.actions[0].tokens.values()
            if not is_ragged and schedule.name in ("prefill", "chunked prefill", "decode"):
                assert len(set(first)) == 1


def test_a_suite_has_every_key_once_and_a_reason_for_what_does_not_fit():
    suites = make_suites(Fit(PLAN, (), 1, 4096), lambda lengths: make_probe(48, lengths))
    ran = [key for suite in suites for key in suite.schedules]
    left_out = {key: reason for suite in suites for key, reason in suite.left_out.items()}
    assert {*ran, *left_out} == set(SCHEDULES)
    assert len(ran) + len(left_out) == len(SCHEDULES)
    assert set(left_out) == {"shared-layers", "ring-wrap"}


def test_a_long_sequence_ends_in_decode_steps():
    assert play(long_schedule(0, 300), [300]) == {0: (0, 300)}


PLAN = cached_program({"key": {"codec": "int", "bits": 4}, "value": None}, 16).plan
WINDOWED = cached_program(None, 16, attention={"window": 9}).sites


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(8, 150)] * 4), st.data())
def test_row_schedules_stay_within_their_sequences(lengths, data):
    prefix = data.draw(st.integers(1, min(lengths[0], lengths[3]) - 2))
    played = {s.name: play(s, lengths) for s in row_schedules(PLAN, lengths, prefix)}
    assert set(played) == {"batch reorder", "beam fork", "fork, crop and rewind"}
    assert {sequence for sequence, _ in played["batch reorder"].values()} == {0, 1, 2}
    assert [sequence for sequence, _ in played["fork, crop and rewind"].values()] == [3, 0]


def test_the_window_schedule_starts_inside_and_ends_beyond():
    schedule = wrap_schedule(0, 40, 16)
    assert schedule.actions[0].tokens[0] < 16
    assert play(schedule, [40]) == {0: (0, 40)}
