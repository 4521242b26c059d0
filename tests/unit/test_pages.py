"""Pages are owned once, tables agree with each other, and a refusal changes nothing."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvxform.errors import CacheFullError
from kvxform.runtime.pages import NULL_PAGE, PageCopy, PagePool

NUM_PAGES, PAGE_SIZE = 12, 16
SEQUENCES = range(4)


class PoolMachine(RuleBasedStateMachine):
    """Random calls against a model that only counts pages."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.counts = dict.fromkeys(SEQUENCES, 0)

    @rule(wanted=st.dictionaries(st.sampled_from(SEQUENCES), st.integers(0, 8), min_size=1))
    def grow(self, wanted):
        before = {s: self.pool.pages(s) for s in SEQUENCES}
        grown = {s: max(n, wanted.get(s, 0)) for s, n in self.counts.items()}
        if sum(grown.values()) > NUM_PAGES - 1:
            with pytest.raises(CacheFullError, match="KVX702"):
                self.pool.grow(wanted)
            assert before == {s: self.pool.pages(s) for s in SEQUENCES}
            return
        self.pool.grow(wanted)
        self.counts = grown
        for s in SEQUENCES:
            assert self.pool.pages(s)[: len(before[s])] == before[s]

    @precondition(lambda self: any(self.counts.values()))
    @rule(sequence=st.sampled_from(SEQUENCES), keep=st.integers(0, 8))
    def shrink(self, sequence, keep):
        pages = self.pool.pages(sequence)
        assert self.pool.shrink(sequence, keep) == list(pages[keep:])
        self.counts[sequence] = min(keep, self.counts[sequence])

    @invariant()
    def every_page_has_one_owner(self):
        owned = [page for s in SEQUENCES for page in self.pool.pages(s)]
        assert len(set(owned)) == len(owned)
        assert NULL_PAGE not in owned
        assert all(0 < page < NUM_PAGES for page in owned)
        assert {s: len(self.pool.pages(s)) for s in SEQUENCES} == self.counts
        assert self.pool.num_used == len(owned)
        assert self.pool.num_free + self.pool.num_used == NUM_PAGES - 1

    @invariant()
    def both_tables_say_the_same(self):
        tokens = [n * PAGE_SIZE - s for s, n in self.counts.items()]
        tokens = [max(0, n) for n in tokens]
        padded = self.pool.block_table(list(SEQUENCES))
        table = self.pool.page_table(list(SEQUENCES), tokens)
        assert padded.dtype == table.indptr.dtype == table.indices.dtype == torch.int32
        assert int(table.indptr[0]) == 0
        for i, n in enumerate(tokens):
            row = table.indices[table.indptr[i] : table.indptr[i + 1]]
            assert torch.equal(row, padded[i, : len(row)])
            assert not padded[i, self.counts[i] :].any()
            assert 1 <= table.last_page_len[i] <= PAGE_SIZE
            assert PAGE_SIZE * (len(row) - 1) + table.last_page_len[i] == n


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)


def test_lowest_free_page_comes_first():
    pool = PagePool(8, PAGE_SIZE)
    pool.grow({"a": 2, "b": 2})
    assert (pool.pages("a"), pool.pages("b")) == ((1, 2), (3, 4))
    pool.shrink("a", 0)
    pool.grow({"b": 3, "c": 2})
    assert (pool.pages("b"), pool.pages("c")) == ((3, 4, 1), (2, 5))


def test_full_pool_says_what_to_do():
    pool = PagePool(4, PAGE_SIZE)
    with pytest.raises(CacheFullError) as caught:
        pool.grow({0: 2, 1: 2})
    assert str(caught.value) == (
        "KVX702 [session] the step needs 4 free pages of 16 tokens; got 3. "
        "Hint: free rows, or make a session with more num_pages."
    )


def forked(num_pages, owners):
    pool = PagePool(num_pages, PAGE_SIZE)
    pool.grow({0: 3})
    pool.reorder([0] * owners)
    return pool


def test_forked_sequences_share_pages_until_one_writes():
    pool = forked(8, 3)
    assert (pool.num_used, pool.num_saved) == (3, 6)
    copies = pool.grow({1: 4}, {1: [2, 3]})
    assert copies == [PageCopy(1, 2, 3, 5)]  # page 4 is the new one at the end
    assert pool.pages(0) == pool.pages(2) == (1, 2, 3)
    assert pool.pages(1) == (1, 2, 5, 4)
    assert pool.shrink(1, 0) == [5, 4]
    assert pool.shrink(0, 0) == []
    assert pool.shrink(2, 1) == [2, 3]
    assert (pool.num_used, pool.num_saved) == (1, 0)


def test_the_last_owner_needs_no_copy_and_no_free_page():
    pool = forked(6, 3)
    copies = pool.grow(dict.fromkeys(range(3), 3), {key: {2} for key in range(3)})
    assert [c.sequence for c in copies] == [0, 1]
    assert pool.num_free == 0
    assert {pool.pages(s)[2] for s in range(3)} == {3, 4, 5}


def test_too_few_pages_for_copies_change_nothing():
    pool = forked(5, 3)
    before = [pool.pages(s) for s in range(3)]
    with pytest.raises(CacheFullError, match=r"needs 2 free pages .* got 1"):
        pool.grow(dict.fromkeys(range(3), 3), {key: {2} for key in range(3)})
    assert before == [pool.pages(s) for s in range(3)]


def test_a_shared_page_behind_a_written_one_stays_shared():
    """Keys may end on an earlier page than values, which already fill the later one."""
    pool = forked(8, 2)
    assert [(c.index, c.old) for c in pool.grow({0: 3}, {0: {1}})] == [(1, 2)]
    assert pool.pages(0)[2] == pool.pages(1)[2]


def test_copies_are_undone():
    pool = forked(8, 2)
    copies = pool.grow({0: 3, 1: 3}, {0: {1, 2}, 1: {1, 2}})
    assert pool.num_saved == 1
    assert pool.undo(copies) == [4, 5]
    assert pool.pages(0) == pool.pages(1) == (1, 2, 3)
    assert (pool.num_used, pool.num_saved) == (3, 3)


def test_reorder_frees_what_nobody_keeps():
    pool = PagePool(8, PAGE_SIZE)
    pool.grow({0: 1, 1: 2, 2: 1})
    assert pool.reorder([1, 1]) == [1, 4]
    assert pool.pages(0) == pool.pages(1) == (2, 3)
    pool.add_pages(10)
    pool.grow({2: 5})
    assert pool.pages(2) == (1, 4, 5, 6, 7)
    assert pool.num_free == 2


def test_empty_batch_has_empty_tables():
    assert PagePool(4, PAGE_SIZE).block_table([]).shape == (0, 0)
    assert PagePool(4, PAGE_SIZE).page_table([], []).indptr.tolist() == [0]
