"""The flush arithmetic of a step agrees with the plan's, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.exact import ExactCodec
from kvxform.codegen.eager.flush import FlushRule
from kvxform.codegen.eager.step import Step
from kvxform.ir.scoring import Span
from kvxform.ir.stream_plan import Regions, StreamPlan

PAGE_SIZE = 16
CPU = torch.device("cpu")


@st.composite
def streams(draw):
    group = draw(st.sampled_from([1, 4]))
    regions = Regions(
        draw(st.integers(0, 5)),
        draw(st.integers(0, 3)) * group,
        draw(st.sampled_from(["sliding", "block"])),
    )
    codec = ExactCodec()
    return StreamPlan(codec.to_dict(), codec.planes(8), group, 8, regions=regions)


@given(streams())
@settings(max_examples=60, deadline=None)
def test_rule_is_that_of_the_plan(stream):
    rule = FlushRule.of(stream)
    lengths = torch.arange(60)
    expected = [stream.body_tokens(n) for n in range(60)]
    assert rule.body(lengths).tolist() == expected
    assert [rule.body_tokens(n) for n in range(60)] == expected
    assert rule.capacity == stream.recent_capacity
    assert rule.is_plain == (expected == list(range(60)))


def test_blocks_leave_nothing_behind():
    """KIVI's keys: exact tokens grow up to a block, which is then encoded as a whole."""
    codec = ExactCodec()
    regions = Regions(recent=8, flush="block")
    stream = StreamPlan(codec.to_dict(), codec.planes(8), 4, 8, regions=regions)
    assert [n - stream.body_tokens(n) for n in range(40)] == [n % 8 for n in range(40)]


rows = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=4)


@given(streams(), rows)
@settings(max_examples=60, deadline=None)
def test_each_token_is_written_once_and_read_from_where_it_was_written(stream, lengths):
    """Carry token numbers instead of values through the index tensors of one step."""
    starts, counts = map(list, zip(*lengths, strict=True))
    pages = 1 + torch.arange(4 * len(starts), dtype=torch.int32).view(-1, 4)
    step = Step(list(range(len(starts))), starts, counts, pages, PAGE_SIZE, CPU)
    rule = FlushRule.of(stream)
    found = step.rule(rule)
    stage = torch.full((len(starts), found.tail_before + step.num_new), -1)
    for b, (start, count) in enumerate(lengths):
        first = rule.sink + stream.body_tokens(start)
        tail = torch.arange(min(first, start), start)
        stage[b, : len(tail)] = tail
        stage[b, found.tail_before : found.tail_before + count] = torch.arange(start, start + count)

    body = {b: {} for b in range(len(starts))}
    for b, column, slot in zip(*(x.tolist() for x in found.flush or []), strict=True):
        body[b][slot - 16 * int(pages[b, 0])] = int(stage[b, column])
    for b, (start, count) in enumerate(lengths):
        end = start + count
        before, after = stream.body_tokens(start), stream.body_tokens(end)
        assert body[b] == {j: rule.sink + j for j in range(before, after)}
        kept = max(0, end - rule.sink - after)
        positions = list(range(rule.sink + after, end))
        assert stage[b, found.kept_columns[b, :kept]].tolist() == positions
        fresh = stage[b] if found.fresh_columns is None else stage[b, found.fresh_columns[b]]
        for position in range(max(rule.sink + before, found.fresh_start), end):
            assert fresh[position - found.fresh_start] == position

    sinks = {
        (b, p): [] for b, (a, n) in enumerate(lengths) for p in range(a, min(a + n, rule.sink))
    }
    for b, column, position in zip(*(x.tolist() for x in found.sink_writes or []), strict=True):
        sinks[b, position].append(starts[b] + column)
    assert all(tokens == [position] for (_, position), tokens in sinks.items())


@given(streams(), rows, st.none() | st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_a_query_sees_its_past_in_the_copy_of_its_time(stream, lengths, window):
    starts, counts = map(list, zip(*lengths, strict=True))
    pages = torch.zeros(len(starts), 4, dtype=torch.int32)
    step = Step(list(range(len(starts))), starts, counts, pages, PAGE_SIZE, CPU)
    rule = step.rule(FlushRule.of(stream))
    for first in range(0, step.num_new, 6):
        run = step.query_run(first, min(first + 6, step.num_new))
        hidden = step.hidden(run, Span(window=window))
        for b, (start, count) in enumerate(lengths):
            for i in range(first, min(run.last, count)):
                t = start + i
                assert run.first_time <= t < run.end
                border = stream.regions.sink + stream.body_tokens(t + 1)
                assert border >= rule.first_exact(run)
                exact = rule.is_exact(run)[b, i - first].tolist()
                assert exact == [p >= border for p in range(rule.first_exact(run), run.end)]
                seen = {p for p in range(run.end) if t - (window or 99) < p <= t}
                from_, mask = hidden or (0, torch.zeros(len(starts), run.last - first, run.end))
                unseen = {p for p in range(from_, run.end) if mask[b, i - first, p - from_]}
                assert set(range(run.end)) - unseen == seen


def make_step(starts, counts):
    return Step(
        list(range(len(starts))), starts, counts, torch.ones(len(starts), 1), PAGE_SIZE, CPU
    )


def test_masks_are_left_out_where_every_key_is_visible():
    assert make_step([5, 5], [1, 1]).visible(Span()) is None
    assert make_step([5, 5], [1, 1]).visible(Span(window=6)) is None
    assert (
        make_step([5, 5], [1, 1]).visible(Span(window=5)).tolist() == [[[False] + [True] * 5]] * 2
    )
    assert make_step([5, 4], [1, 1]).visible(Span())[1].tolist() == [[True] * 5 + [False]]
    assert make_step([0, 0], [4, 3]).is_causal_square(Span())
    assert not make_step([0, 1], [4, 3]).is_causal_square(Span())
    assert not make_step([0, 0], [4, 3]).is_causal_square(Span(window=2))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[1, 2, 3]], (1, 3)),
        ([[4]], (4, 1)),
        ([[1, 2], [3, 4]], (1, 2)),
        ([[1], [3], [5]], (1, 2)),
        ([[1, 3]], None),
        ([[1, 2], [4, 3]], None),
        ([[3], [1]], None),
        ([[1, 2], [3, 0]], None),
        ([[0]], None),
        ([[]], None),
    ],
)
def test_evenly_spaced_tables_are_read_through_strides(table, expected):
    pages = torch.tensor(table, dtype=torch.int32)
    assert make_step_with(pages).affine == expected


def make_step_with(pages):
    rows = len(pages)
    return Step(list(range(rows)), [0] * rows, [1] * rows, pages, PAGE_SIZE, CPU)
