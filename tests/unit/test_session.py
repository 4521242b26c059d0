"""Rows, lengths, refusals and what a failure leaves behind."""

import gc

import pytest
import torch
from cached import cached_program
from programs import llama_program, token_ids

from kvxform.errors import CacheFullError, CodegenError, KvxformError
from kvxform.ir.cache import resolve_handle
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4}
WINDOWS = {"key": INT4, "value": INT4, "regions": {"sink": 2, "recent": 8}}


@pytest.fixture(scope="module")
def model():
    return OptimizedModel(cached_program(WINDOWS))


@pytest.fixture(scope="module")
def ids(model):
    return token_ids(model.program, 3, 40)


def state(session):
    return session.sequence_lengths(), session.cache_bytes(), session.free_pages, session.rows


def test_rows_come_and_go(model, ids):
    session = model.new_session(4, 40)
    session.prefill(ids[:2, :20], rows=[3, 1])
    assert session.rows == [1, 3]
    session.prefill(ids[2:, :5])  # row 0 by default
    assert session.sequence_lengths() == (5, 20, 20)
    alone = [session_logits(model, ids[i], 21) for i in (0, 1)]
    logits = session.decode(ids[:2, 20], rows=[3, 1])
    assert torch.allclose(logits, torch.stack(alone), atol=1e-12)
    session.free([3])
    assert session.sequence_lengths() == (5, 21)
    session.free()
    assert state(session) == ((), 0, 12, [])


def session_logits(model, tokens, n):
    session = model.new_session(1, 40)
    session.prefill(tokens[None, : n - 1])
    return session.decode(tokens[n - 1 : n])[0]


def test_page_table_follows_flashinfer(model, ids):
    session = model.new_session(2, 40)
    session.prefill(ids[:2, :30])
    session.free([0])
    session.prefill(ids[:1, :9])
    table = session.page_table()  # 9 tokens: sink and recent; 30 tokens: 20 in the body
    assert table.indptr.tolist() == [0, 0, 2]
    assert table.indices.tolist() == [3, 4]
    assert table.last_page_len.tolist() == [16, 4]


def test_logical_cache_lists_live_rows(model, ids):
    session = model.new_session(3, 40)
    session.prefill(ids[:2, :20], rows=[2, 0])
    session.decode(ids[:1, 20], rows=[2])
    cache = session.logical_cache(1)
    assert [k.shape for k in cache.k] == [(2, 20, 16), (2, 21, 16)]
    assert [v.shape for v in cache.v] == [(2, 20, 16), (2, 21, 16)]


def test_full_pool_changes_nothing(model, ids):
    session = model.new_session(2, 40, num_pages=2)
    session.prefill(ids[:1, :42][:, :40])  # 30 tokens in the body, two pages
    before = state(session)
    with pytest.raises(CacheFullError, match="KVX702"):
        session.prefill(ids[1:2], rows=[1])
    assert state(session) == before
    session.free()
    expected = session.prefill(ids[1:2])
    assert torch.equal(expected, model.new_session(1, 40).prefill(ids[1:2]))


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_prompt_longer_than_the_session_changes_nothing(model, ids, chunk_size):
    session = model.new_session(2, 24)
    session.prefill(ids[:2, :20])
    before = state(session)
    with pytest.raises(CacheFullError, match=r"KVX703 \[session\] .* 24 tokens; got 25"):
        session.prefill(ids[:2, 20:25], chunk_size=chunk_size)
    assert state(session) == before
    expected = model.new_session(2, 24).prefill(ids[:2, :24])
    assert torch.allclose(session.prefill(ids[:2, 20:24]), expected, atol=1e-12)
    with pytest.raises(CacheFullError, match="KVX703"):
        session.decode(ids[:2, 24])
    assert session.sequence_lengths() == (24, 24)


def test_a_step_that_fails_changes_nothing(model, ids, monkeypatch):
    session, twin = model.new_session(2, 40), model.new_session(2, 40)
    for each in (session, twin):
        each.prefill(ids[:1, :13])
    before = state(session)
    attend = session._cache.attend

    def fail_late(layer, *args, **kwargs):
        if layer == 1:
            raise MemoryError
        return attend(layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session._cache, "attend", fail_late)
        with pytest.raises(MemoryError):
            session.prefill(ids[:2, 13:33])
    assert state(session) == before
    for first, last in ((13, 14), (14, 40)):
        expected = twin.prefill(ids[:1, first:last])
        assert torch.equal(session.prefill(ids[:1, first:last]), expected)


REFUSALS = {
    "names? one row for each of 1 prompts": lambda s, x: s.prefill(x[:1], rows=[0, 1]),
    "must be different": lambda s, x: s.prefill(x[:2], rows=[0, 0]),
    "the session has 2 rows; got 3": lambda s, x: s.prefill(x),
    r"in 0\.\.1; got \[2\]": lambda s, x: s.prefill(x[:1], rows=[2]),
    r"in 0\.\.1; got \[-1\]": lambda s, x: s.free([-1]),
    "chunk_size must be at least 1; got 0": lambda s, x: s.prefill(x[:1], chunk_size=0),
    "one token for each of 1 rows; got 2": lambda s, x: s.decode(x[:2, 0]),
    r"rows that have been prefilled; got \[1\]": lambda s, x: s.decode(x[:1, 0], rows=[1]),
    r"lie in 0\.\.47": lambda s, x: s.decode(x[:1, 0] + 1000),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_calls_are_refused_and_change_nothing(model, ids, message):
    session = model.new_session(2, 40)
    session.prefill(ids[:1, :8])
    before = state(session)
    with pytest.raises(KvxformError, match=rf"^KVX704 .*{message}"):
        REFUSALS[message](session, ids[:, :8])
    assert state(session) == before


def test_handle_dies_with_its_session(model, ids):
    session = model.new_session(1, 40)
    session.prefill(ids[:1, :4])
    handle = session._cache.handle
    assert resolve_handle(handle) is session._cache
    del session
    gc.collect()
    with pytest.raises(KvxformError, match="KVX701"):
        resolve_handle(handle)


def test_session_of_a_program_without_cache_is_refused():
    with pytest.raises(CodegenError, match=r"KVX401 .* Hint: add insert-cache"):
        OptimizedModel(llama_program()).new_session()


@pytest.mark.parametrize("sizes", [(0, 10), (1, 0), (-1, 5)])
def test_sizes_that_make_no_sense(model, sizes):
    with pytest.raises(KvxformError, match="KVX704"):
        model.new_session(*sizes)
