"""Rows that are reordered, forked, cropped, copied and given more room."""

from __future__ import annotations

import pytest
import torch
from cached import cached_program
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from programs import token_ids

from kvxform.errors import CacheFullError, KvxformError
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4}
CHANNEL = {"codec": "int", "bits": 4, "axis": "channel", "group": 4, "zero": "float"}
PLANS = {
    "exact": None,
    "int4": {"key": INT4, "value": INT4, "regions": {"sink": 2}},
    "sliding": {"key": INT4, "value": INT4, "regions": {"sink": 2, "recent": 5}},
    "block": {"key": CHANNEL, "value": INT4, "key_regions": {"recent": 8, "flush": "block"}},
}
SALIENCY = {"codec": "saliency", "chunk": 8, "last": 0.25, "random": 0.25}
PLANS["ranked"] = {"key": SALIENCY, "value": SALIENCY}
LONGEST, ROWS, PAGE = 60, 3, 16
MODELS = {name: OptimizedModel(cached_program(plan, PAGE)) for name, plan in PLANS.items()}
IDS = token_ids(MODELS["exact"].program, 6, LONGEST)


def feed(session, row, tokens):
    return session.prefill(torch.tensor([tokens]), rows=[row])[0]


def fresh(model, tokens):
    session = model.new_session(1, LONGEST)
    return session, feed(session, 0, tokens)


def assert_holds(session, expected):
    """The session must hold exactly the token lists of `expected`, by row."""
    model_bytes = session.plan.bytes_at([len(t) for t in expected.values()], session.max_seq_len)
    shared = session.saved_pages * session.plan.page_bytes(session._pool.page_size)
    assert session.rows == sorted(expected)
    assert session.sequence_lengths() == tuple(len(expected[row]) for row in session.rows)
    assert session.cache_bytes() == model_bytes - shared


class SessionMachine(RuleBasedStateMachine):
    """Random calls; every row must always be as if it had been filled alone, in one piece."""

    @initialize(name=st.sampled_from(sorted(PLANS)))
    def start(self, name):
        self.model = MODELS[name]
        self.session = self.model.new_session(ROWS, LONGEST)
        self.tokens = {}

    def appended(self, row, logits, new):
        self.tokens[row] = self.tokens.get(row, []) + new
        expected = self.model(torch.tensor([self.tokens[row]]))[0, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)

    @rule(row=st.integers(0, ROWS - 1), source=st.integers(0, 5), count=st.integers(1, 23))
    def prefill(self, row, source, count):
        new = IDS[source, :count].tolist()
        if len(self.tokens.get(row, [])) + count <= LONGEST:
            self.appended(row, feed(self.session, row, new), new)

    @precondition(lambda self: self.tokens and max(map(len, self.tokens.values())) < LONGEST)
    @rule(source=st.integers(0, 5))
    def decode(self, source):
        rows = sorted(self.tokens)
        new = IDS[source, : len(rows)]
        logits = self.session.decode(new)
        for row, one, token in zip(rows, logits, new.tolist(), strict=True):
            self.appended(row, one, [token])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reorder(self, data):
        live = st.sampled_from(sorted(self.tokens))
        order = data.draw(st.lists(live, min_size=1, max_size=ROWS))
        self.session.reorder(order)
        self.tokens = {i: list(self.tokens[source]) for i, source in enumerate(order)}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def crop(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)))
        keep = data.draw(st.integers(0, len(self.tokens[row])))
        if not self.session.can_crop(keep, [row]):
            with pytest.raises(KvxformError, match="KVX705"):
                self.session.crop(keep, [row])
            return
        self.session.crop(keep, [row])
        self.tokens[row] = self.tokens[row][:keep]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)))
        self.session.free([row])
        del self.tokens[row]

    @rule()
    def copy(self):
        self.session = self.session.copy()

    @invariant()
    def holds_what_it_must(self):
        if not hasattr(self, "session"):
            return
        assert_holds(self.session, self.tokens)


TestSession = SessionMachine.TestCase
TestSession.settings = settings(deadline=None, max_examples=25, stateful_step_count=14)


@pytest.mark.parametrize("name", PLANS)
def test_forked_rows_share_pages_until_they_write(name):
    session = MODELS[name].new_session(3, LONGEST)
    tokens = IDS[0, :40].tolist()
    feed(session, 0, tokens)
    pages = session._pool.num_used
    session.reorder([0, 0, 0])
    assert session._pool.num_used == pages > 0
    assert session.saved_pages == 2 * pages
    for row in range(3):
        feed(session, row, IDS[row + 1, :9].tolist())
    for row in range(3):
        alone, _ = fresh(MODELS[name], tokens + IDS[row + 1, :9].tolist())
        for layer in range(2):
            cache, own = session.logical_cache(layer), alone.logical_cache(layer)
            torch.testing.assert_close(cache.k[row], own.k[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(cache.v[row], own.v[0], rtol=0, atol=1e-12)
    assert session.saved_pages == 4  # two full pages, three owners
    session.free()
    assert session._pool.num_used == session.saved_pages == session.cache_bytes() == 0


def test_tokens_that_wait_for_their_group_leave_pages_shared():
    plan = {"key": CHANNEL, "value": CHANNEL}
    session = OptimizedModel(cached_program(plan, PAGE)).new_session(2, LONGEST)
    feed(session, 0, IDS[0, :20].tolist())
    session.reorder([0, 0])
    session.decode(IDS[1, :2])  # token 21 of a group of four
    assert (session._pool.num_used, session.saved_pages) == (2, 2)
    for column in range(3):
        session.decode(IDS[2:4, column])  # token 24 fills it: the second page is written
    assert (session._pool.num_used, session.saved_pages) == (3, 1)


def test_a_page_between_the_ends_of_keys_and_values_stays_shared():
    plan = {"key": INT4, "value": INT4, "key_regions": {"recent": 30}}
    session = OptimizedModel(cached_program(plan, PAGE)).new_session(2, LONGEST)
    feed(session, 0, IDS[0, :40].tolist())
    session.reorder([0, 0])
    session.decode(IDS[1, :2])  # a key enters the first page, a value the third
    assert (session._pool.num_used, session.saved_pages) == (5, 1)


def test_a_fork_without_room_for_its_copy_loses_nothing():
    session = MODELS["exact"].new_session(2, LONGEST, num_pages=3)
    tokens = IDS[0, :40].tolist()
    feed(session, 0, tokens)
    session.reorder([0, 0])
    before = (session.sequence_lengths(), session.cache_bytes(), session._pool._owned)
    with pytest.raises(CacheFullError, match=r"KVX702 .* needs 1 free pages .* got 0"):
        session.decode(IDS[1, :2])
    assert before == (session.sequence_lengths(), session.cache_bytes(), session._pool._owned)
    session.free([1])
    logits = session.decode(IDS[1, :1])
    _, expected = fresh(MODELS["exact"], [*tokens, int(IDS[1, 0])])
    torch.testing.assert_close(logits[0], expected)


def test_the_last_owner_of_a_page_writes_without_a_copy():
    session = MODELS["exact"].new_session(2, LONGEST, num_pages=4)
    feed(session, 0, IDS[0, :40].tolist())
    session.reorder([0, 0])
    session.decode(IDS[1, :2])  # three pages, one of them twice
    assert session.free_pages == 0


@pytest.mark.parametrize("name", ["int4", "block"])
def test_a_step_that_fails_after_a_copy_changes_nothing(name, monkeypatch):
    session = MODELS[name].new_session(2, LONGEST)
    tokens = IDS[0, :42].tolist()
    feed(session, 0, tokens)
    session.reorder([0, 0])

    def seen():
        return session.sequence_lengths(), session.cache_bytes(), session.saved_pages

    before = seen()
    with monkeypatch.context() as patch:
        patch.setattr(session._cache, "attend", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            session.prefill(IDS[1:3, :9])
    assert seen() == before
    for row, logits in enumerate(session.prefill(IDS[1:3, :9])):
        _, expected = fresh(MODELS[name], tokens + IDS[row + 1, :9].tolist())
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("length", [7, 24, 31])
def test_crop_works_where_it_says_so(name, length):
    tokens, more = IDS[0, :length].tolist(), IDS[1, :6].tolist()
    legal = []
    for keep in range(length + 1):
        session, _ = fresh(MODELS[name], tokens)
        before = session.sequence_lengths(), session.cache_bytes()
        if session.can_crop(keep):
            legal.append(keep)
            session.crop(keep)
            _, expected = fresh(MODELS[name], tokens[:keep] + more)
            torch.testing.assert_close(feed(session, 0, more), expected, rtol=0, atol=1e-10)
        else:
            with pytest.raises(KvxformError, match=rf"^KVX705 .* got {keep} of {length} tokens"):
                session.crop(keep)
            assert before == (session.sequence_lengths(), session.cache_bytes())
    everything = list(range(length + 1))
    expected_legal = {
        "exact": everything,
        "int4": everything,
        "sliding": [n for n in everything if n <= 2 or length <= 7] + [length] * (length > 7),
        "block": [n for n in everything if n % 8 == 0 or n // 8 == length // 8],
        "ranked": [n for n in everything if n % 8 == 0 or n == length],
    }
    assert legal == expected_legal[name]
    assert MODELS[name].new_session().is_croppable == (name in ("exact", "int4"))


def test_the_refusal_of_a_crop_says_how_far_it_goes():
    session, _ = fresh(MODELS["block"], IDS[0, :22].tolist())
    with pytest.raises(KvxformError) as caught:
        session.crop(12)
    assert str(caught.value) == (
        "KVX705 [session] a sequence can be cropped only while the tokens that become its last are "
        "still exact; got 12 of 22 tokens at row 0. "
        "Hint: keep at least 16, or use a recipe without recent tokens."
    )


def test_rows_are_cropped_to_lengths_of_their_own():
    session = MODELS["exact"].new_session(2, LONGEST)
    session.prefill(IDS[:2, :12])
    session.crop([3, 9])
    assert session.sequence_lengths() == (3, 9)
    session.crop(5, rows=[1])
    assert session.sequence_lengths() == (3, 5)
    session.crop(0)
    assert session.sequence_lengths() == (0, 0)
    assert session.logical_cache(0).k[0].shape == (2, 0, 16)
    assert session.cache_bytes() == 0


@pytest.mark.parametrize("page_size", [None, PAGE], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", PLANS)
def test_a_session_that_grows_keeps_what_it_holds(name, page_size):
    model = OptimizedModel(cached_program(PLANS[name], page_size))
    session = model.new_session(1, 12)
    feed(session, 0, IDS[0, :11].tolist())
    session.resize(max_batch_size=2, max_seq_len=LONGEST)
    session.reorder([0, 0])
    logits = session.prefill(IDS[1:3, :20])
    for row in range(2):
        tokens = IDS[0, :11].tolist() + IDS[row + 1, :20].tolist()
        torch.testing.assert_close(logits[row], fresh(model, tokens)[1], rtol=0, atol=1e-10)
        assert_holds(session, dict.fromkeys(range(2), tokens))


def test_a_copy_is_independent():
    session, _ = fresh(MODELS["sliding"], IDS[0, :12].tolist())
    twin = session.copy()
    first = feed(session, 0, IDS[1, :9].tolist())
    second = feed(twin, 0, IDS[2, :9].tolist())
    for logits, row in ((first, 1), (second, 2)):
        tokens = IDS[0, :12].tolist() + IDS[row, :9].tolist()
        torch.testing.assert_close(logits, fresh(MODELS["sliding"], tokens)[1], rtol=0, atol=1e-10)


REFUSALS = {
    r"order must name live rows, of \[0\]; got \[0, 1\]": lambda s: s.reorder([0, 1]),
    "the session has 2 rows; got 3": lambda s: s.reorder([0, 0, 0]),
    "a crop keeps 0 to 8 tokens; got 9 at row 0": lambda s: s.crop(9),
    "a crop keeps 0 to 8 tokens; got -1 at row 0": lambda s: s.crop(-1),
    r"one length for each of 1 rows; got \[1, 2\]": lambda s: s.crop([1, 2]),
    "crop needs rows that have been prefilled; got 1": lambda s: s.crop(1, rows=[1]),
    "can only become larger": lambda s: s.resize(max_batch_size=1),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_calls_are_refused_and_change_nothing(message):
    session = MODELS["int4"].new_session(2, LONGEST)
    feed(session, 0, IDS[0, :8].tolist())
    before = session.sequence_lengths(), session.cache_bytes(), session.max_batch_size
    with pytest.raises(KvxformError, match=rf"^KVX704 .*{message}"):
        REFUSALS[message](session)
    assert before == (session.sequence_lengths(), session.cache_bytes(), session.max_batch_size)
