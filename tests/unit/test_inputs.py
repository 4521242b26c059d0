"""Checks of ids and masks, and padding there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.errors import KvxformError
from kvxform.runtime.inputs import check_tokens, make_batch

VOCAB = 50


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_real_tokens_move_left_and_back(rows):
    width = max(first + count for first, count in rows)
    ids = torch.randint(1, VOCAB, (len(rows), width))
    mask = torch.zeros_like(ids)
    for i, (first, count) in enumerate(rows):
        mask[i, first : first + count] = 1
    batch = make_batch(ids, mask, VOCAB)
    assert batch.counts == [count for _, count in rows]
    assert batch.input_ids.shape[1] == max(batch.counts)
    for i, (first, count) in enumerate(rows):
        assert torch.equal(batch.input_ids[i, :count], ids[i, first : first + count])
        assert not batch.input_ids[i, count:].any()
    back = batch.to_caller(batch.input_ids[..., None])[..., 0]
    assert torch.equal(back, ids * mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_masks_of_any_dtype(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]]).to(dtype)
    assert make_batch(torch.ones(2, 3, dtype=torch.int32), mask, VOCAB).counts == [2, 3]


IDS = torch.ones(2, 3, dtype=torch.int64)
BAD = {
    "must be a tensor; got list": ([1, 2], None),
    r"shape \[batch, tokens\] and not be empty; got \[3\]": (IDS[0], None),
    r"not be empty; got \[2, 0\]": (IDS[:, :0], None),
    "int64 or int32; got float32": (IDS.float(), None),
    "lie in 0..49; got 50": (IDS * 50, None),
    "lie in 0..49; got -1": (-IDS, None),
    r"shape \[2, 3\], as input_ids; got \[2, 2\]": (IDS, IDS[:, :2]),
    "as input_ids; got list": (IDS, [1]),
    "only 0 and 1": (IDS, IDS * 2),
    r"one run of ones; got \[1, 0, 1\] at row 1": (IDS, torch.tensor([[1, 1, 1], [1, 0, 1]])),
    r"one run of ones; got \[0, 0, 0\] at row 0": (IDS, torch.tensor([[0, 0, 0], [1, 1, 1]])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_has_one_clear_line(message):
    with pytest.raises(KvxformError, match=rf"^KVX704 \[session\] .*{message}") as caught:
        make_batch(*BAD[message], VOCAB)
    assert "\n" not in str(caught.value)


def test_tokens_of_a_decode_step():
    assert check_tokens(IDS[:, 0].int(), VOCAB).dtype == torch.int64
    with pytest.raises(KvxformError, match=r"shape \[batch\]"):
        check_tokens(IDS, VOCAB)
