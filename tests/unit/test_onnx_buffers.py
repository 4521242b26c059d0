"""A cache of shared buffers: ragged rows, pieces, growth and replacement, against the equations."""

from __future__ import annotations

import pytest
import torch
from buffer_graphs import KV_HEADS, VOCAB, expected_logits, open_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvxform.errors import CacheFullError, KvxformError
from kvxform.runtime import onnx_buffers
from kvxform.runtime.inputs import make_batch
from kvxform.runtime.onnx_buffers import BufferCache

KEY = "past_key_values.0.key"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return open_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def last_engine(tmp_path_factory):
    return open_graph(tmp_path_factory.mktemp("graph"), last=True)


def new_cache(engine, max_length=None, limit=None):
    return BufferCache(engine, max_length, limit, cuda_graph=False)


def random_rows(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in counts]


def batch_of(rows):
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    mask = torch.tensor([[int(i < len(row)) for i in range(width)] for row in rows])
    return make_batch(ids, mask, VOCAB)


def assert_last(found, rows):
    wanted = torch.stack([expected_logits(row)[-1] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=lengths, chunk=st.none() | st.integers(1, 4), more=st.integers(1, 5))
def test_prompts_then_prompts_then_tokens(engine, first, chunk, more):
    second = [1 + (n * 7 + more) % 5 for n in first]
    rows, new = random_rows(first), random_rows(second, 1)
    cache = new_cache(engine)
    found = cache.append(batch_of(rows), chunk, every=True)
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits[: len(row)], expected_logits(row), rtol=0, atol=1e-5)
    rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
    assert_last(cache.append(batch_of(new), chunk, every=False), rows)
    for step in range(2):
        tokens = torch.arange(len(rows)) + step
        rows = [torch.cat([row, tokens[i : i + 1]]) for i, row in enumerate(rows)]
        assert_last(cache.step(tokens), rows)
    assert cache.lengths == tuple(map(len, rows))


def test_buffers_grow_and_what_is_cached_stays(engine, monkeypatch):
    monkeypatch.setattr(onnx_buffers, "FIRST_CAPACITY", 4)
    cache, rows = new_cache(engine, limit=19), random_rows([3, 1])
    cache.append(batch_of(rows), None, every=False)
    sizes = [cache.planned_rows()]
    for step in range(16):
        tokens = torch.tensor([step, step + 1])
        rows = [torch.cat([row, tokens[i : i + 1]]) for i, row in enumerate(rows)]
        assert_last(cache.step(tokens), rows)
        sizes.append(cache.planned_rows())
    assert sorted(set(sizes)) == [(2, 4), (2, 8), (2, 16), (2, 19)]
    assert cache.bytes() == sum(x.nbytes for x in cache._planes.values())


def test_a_given_length_is_taken_at_once_and_the_memory_stays(engine):
    cache = new_cache(engine, max_length=12)
    cache.append(batch_of(random_rows([5, 2])), None, every=False)
    first = cache._planes[KEY].data_ptr()
    assert cache._planes[KEY].shape[:3] == (2, KV_HEADS, 12)
    cache.reset()
    assert (cache.lengths, cache.bytes(), cache.planned_rows()) == ((), 0, (0, 0))
    rows = random_rows([4, 4], 2)
    assert_last(cache.append(batch_of(rows), None, every=False), rows)
    assert cache._planes[KEY].data_ptr() == first


def test_planes_are_copies_and_can_be_put_back_in_another_order(engine):
    cache, rows = new_cache(engine), random_rows([6, 3])
    cache.append(batch_of(rows), None, every=False)
    planes, mask = cache.planes(), cache.mask
    assert mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert planes[KEY].shape == (2, KV_HEADS, 6, 8)
    order = torch.tensor([1, 0, 1])
    cache.replace({name: plane[order] for name, plane in planes.items()}, mask[order])
    rows = [torch.cat([rows[i], torch.tensor([7])]) for i in order]
    assert_last(cache.step(torch.tensor([7, 7, 7])), rows)
    cache.planes()[KEY].zero_()  # nobody else's memory
    assert cache.planes()[KEY].any()


def test_logits_of_the_last_token_alone_are_collected_token_by_token(last_engine):
    cache, rows = new_cache(last_engine), random_rows([5, 5])
    assert_last(cache.append(batch_of(rows), None, every=False), rows)
    cache.reset()
    found = cache.append(batch_of(rows), None, every=True)
    wanted = torch.stack([expected_logits(row) for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_buffers_that_do_not_fit_leave_the_rows_as_they_were(engine, monkeypatch):
    cache, rows = new_cache(engine, limit=1 << 50), random_rows([4])
    cache.append(batch_of(rows), None, every=False)
    monkeypatch.setattr(onnx_buffers, "FIRST_CAPACITY", 1 << 49)
    cache._size = 1, 4
    with pytest.raises(CacheFullError, match=r"^KVX703 .*buffers for 1 rows of 5\d* tokens"):
        cache.step(torch.tensor([1]))
    assert cache.lengths == (4,)
    monkeypatch.undo()
    assert_last(cache.step(torch.tensor([1])), [torch.cat([rows[0], torch.tensor([1])])])


def test_a_run_that_fails_leaves_the_rows_as_they_were(engine, monkeypatch):
    cache, rows = new_cache(engine), random_rows([4, 2])
    cache.append(batch_of(rows), None, every=False)
    runs = []

    def fail_at_second_run(binding, options):
        runs.append(binding)
        if len(runs) == 2:
            raise RuntimeError("out of memory\nat some place")
        original(binding, options)

    original = engine.session.run_with_iobinding
    monkeypatch.setattr(engine.session, "run_with_iobinding", fail_at_second_run)
    with pytest.raises(KvxformError, match=r"^KVX706 .*got out of memory\. Hint"):
        cache.append(batch_of(random_rows([3, 1], 5)), None, every=False)
    assert cache.lengths == (4, 2)
    monkeypatch.undo()
    assert_last(
        cache.step(torch.tensor([1, 2])),
        [torch.cat([r, torch.tensor([i + 1])]) for i, r in enumerate(rows)],
    )
