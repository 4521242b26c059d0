"""Schedules stay within their sequences and cover what they promise, for any lengths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.verify.schedules import Decode, Free, Prefill, full_schedules, probe_schedule


def play(schedule, lengths):
    """Return (sequence, tokens seen) of the rows that are live at the end; checks every step."""
    rows: dict[int, tuple[int, int]] = {}
    for action in schedule.actions:
        if isinstance(action, Prefill):
            rows |= {row: (sequence, 0) for row, sequence in (action.sequences or {}).items()}
            counts = action.tokens
        elif isinstance(action, Decode):
            counts = dict.fromkeys(rows, action.steps)
        else:
            assert isinstance(action, Free)
            for row in action.rows:
                del rows[row]
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
