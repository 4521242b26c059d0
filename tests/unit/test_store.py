"""Weights in files: values survive that pages are given back, and no file is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvxform.ir import store as module
from kvxform.ir.store import WeightStore, pieces, resident_file_bytes, watching

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "scratch", limit=0, smallest=1)


def mapped(path: Path, values: Tensor) -> Tensor:
    path.write_bytes(b"".join(pieces(values)))
    storage = torch.UntypedStorage.from_file(str(path), False, values.nbytes)
    return torch.empty(0, dtype=values.dtype).set_(storage).view(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_kept_weight_is_the_weight(store: WeightStore, dtype: torch.dtype) -> None:
    values = torch.arange(5 * 7 * 3).view(5, 7, 3).to(dtype)
    for given in (values, values.transpose(0, 2), values[1:, 2]):
        kept = store.keep(given)
        assert kept is not given
        assert (kept.dtype, kept.shape) == (given.dtype, given.shape)
        assert torch.equal(kept, given)


def test_files_have_no_name_while_they_are_in_use(store: WeightStore, tmp_path: Path) -> None:
    kept = store.keep(torch.ones(MIB))
    assert list((tmp_path / "scratch").iterdir()) == []
    assert float(kept.sum()) == MIB


def test_nothing_is_left_when_a_run_fails(store: WeightStore, tmp_path: Path) -> None:
    def run() -> None:
        with store.watch():
            store.keep(torch.ones(1000)).sum()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@linux
def test_giving_pages_back_frees_memory_and_keeps_values(store: WeightStore) -> None:
    values = torch.randn(4 * MIB)
    kept, expected = store.keep(values), float(values.double().sum())
    store.release()
    before = resident_file_bytes()
    assert float(kept.double().sum()) == expected
    assert resident_file_bytes() - before > 12 * MIB
    store.release()
    assert resident_file_bytes() - before < 2 * MIB
    assert torch.equal(kept, values)


@linux
def test_watched_calls_stay_within_the_limit(store: WeightStore) -> None:
    kept = [store.keep(torch.randn(2 * MIB)) for _ in range(4)]
    store.release()
    before = resident_file_bytes()
    with watching(store):
        for weight in kept:
            weight.sum()
            assert resident_file_bytes() - before < 2 * MIB
    for weight in kept:
        weight.sum()
    assert resident_file_bytes() - before > 24 * MIB


def test_without_a_store_nothing_is_watched() -> None:
    with watching(None):
        assert float(torch.ones(3).sum()) == 3


@linux
def test_weights_in_mapped_files_are_adopted(store: WeightStore, tmp_path: Path) -> None:
    values = torch.randn(4 * MIB)
    weight = mapped(tmp_path / "weights", values)
    weight.sum()
    before = resident_file_bytes()
    store.adopt([weight])
    store.release()
    assert before - resident_file_bytes() > 12 * MIB
    assert torch.equal(weight, values)


@linux
def test_a_mapping_that_was_written_to_is_left_alone(store: WeightStore, tmp_path: Path) -> None:
    weight = mapped(tmp_path / "weights", torch.zeros(MIB))
    weight[5] = 1.0
    store.adopt([weight])
    store.release()
    assert float(weight[5]) == 1.0


def test_tensors_in_memory_are_never_given_back(store: WeightStore) -> None:
    weight = torch.randn(4 * MIB)
    copy = weight.clone()
    store.adopt([weight, torch.empty(3, device="meta")])
    store.release()
    assert torch.equal(weight, copy)


@linux
def test_a_tied_weight_under_two_names_stays_one(store: WeightStore) -> None:
    kept = store.keep(torch.randn(MIB))
    alias = kept.detach()
    store.adopt([kept, alias])
    store.release()
    assert alias.data_ptr() == kept.data_ptr()
    assert torch.equal(alias, kept)


def test_a_weight_that_is_gone_is_forgotten(store: WeightStore) -> None:
    first = store.keep(torch.ones(MIB))
    del first
    second = torch.zeros(MIB)  # may lie at the same address
    second += 2
    store.release()
    assert float(second.sum()) == 2 * MIB


def test_small_and_meta_tensors_stay_where_they_are(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, smallest=1000)
    for tensor in (torch.ones(249), torch.ones(10_000, device="meta"), torch.empty(0)):
        assert store.keep(tensor) is tensor


def test_a_folder_that_cannot_be_written_costs_memory_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    weight = torch.ones(MIB)
    assert WeightStore(tmp_path / "file" / "scratch", smallest=1).keep(weight) is weight


def test_conversions_while_loading_go_to_files(store: WeightStore) -> None:
    weight = torch.randn(64, 32)
    with store.loading():
        narrow = weight.to(torch.bfloat16)
        joined = torch.stack([weight, weight])
        same = weight.to(torch.float32)
    assert same is weight
    assert torch.equal(narrow, weight.bfloat16())
    assert torch.equal(joined[1], weight)
    if sys.platform == "linux":
        clean = module.unwritten_file_ranges()
        for made in (narrow, joined):
            assert any(low <= made.data_ptr() < high for low, high in clean)
