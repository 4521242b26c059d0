"""Inputs of recorded decode steps, and when a step is recorded again; without a device."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kvxform.codegen.triton import graphs
from kvxform.codegen.triton.graphs import DecodeGraphs, StaticStep
from kvxform.codegen.triton.step import make_step
from kvxform.errors import KvxformError
from kvxform.ir.execution import StepInputs

CPU = torch.device("cpu")


def inputs(starts, table):
    rows = list(range(len(starts)))
    pages = torch.tensor(table).int()
    return StepInputs(rows, starts, [1] * len(starts), starts, pages, lambda: None)


def test_a_static_step_holds_what_a_step_of_its_own_would():
    static = StaticStep(2, 4, CPU)
    address = static.view(8).block_table.data_ptr()
    for starts, table in (
        ([3, 9], [[5, 0, 0], [7, 2, 4]]),
        ([4, 10], [[5, 0, 0], [7, 2, 4]]),  # the same pages: only numbers are copied
        ([5, 0], [[5], [3]]),  # fewer pages: those of before are gone
    ):
        step = inputs(starts, table)
        static.fill(torch.tensor([[1], [2]]), step, step.block_table)
        got, expected = static.view(8), make_step(step, step.block_table, CPU, is_folded=True)
        for name in ("starts", "counts", "lengths", "rows", "first"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        width = expected.block_table.shape[1]
        assert torch.equal(got.block_table[:, :width], expected.block_table)
        assert not got.block_table[:, width:].any()
        assert torch.equal(got.positions(), torch.tensor(starts)[:, None])
        assert got.block_table.data_ptr() == address
    assert static.input_ids.tolist() == [[1], [2]]


def test_pages_that_have_not_changed_are_not_copied():
    static = StaticStep(1, 2, CPU)
    step = inputs([3], [[5, 6]])
    static.fill(torch.tensor([[1]]), step, step.block_table)
    static.view(8).block_table.zero_()
    static.fill(torch.tensor([[1]]), step, step.block_table)
    assert static.view(8).block_table.tolist() == [[0, 0]]


class FakeCache:
    """What `DecodeGraphs` needs of a cache; notes which steps ran."""

    max_pages, sizes, storages = 2, None, None

    def __init__(self):
        self.recordings, self.steps, self.graph_pool = {}, [], None

    def kernel_table(self, block_table):
        return block_table

    def begin(self, step):
        self.steps.append((step.total, step.host is not None))

    def commit(self):
        pass


def test_steps_without_a_device_say_why(monkeypatch):
    monkeypatch.setattr(graphs, "LEAST_BUCKET", 8)
    planned = []
    decoding = SimpleNamespace(plan=lambda step, *_: planned.append(step.total))
    runner = DecodeGraphs(lambda ids, positions, cache: ids * 10, decoding, CPU)
    cache = FakeCache()
    for start in (6, 7, 8, 5):
        step = inputs([start], [[1, 2]])
        assert runner.decode(torch.tensor([[start]]), step, cache).tolist() == [[start * 10]]
    assert runner.why_direct == "graphs need a CUDA device"
    assert cache.steps == [(8, True), (8, True), (16, True), (8, True)]
    assert planned == [8, 8, 16, 8]
    assert list(cache.recordings) == [(1, 8), (1, 16)]


def test_recordings_of_one_cache_share_memory_and_those_of_another_do_not(monkeypatch):
    used, handles = [], iter(range(9))

    @contextlib.contextmanager
    def graph(_, pool):
        used.append(pool)
        yield

    fake = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(graphs, "LEAST_BUCKET", 8)
    decoding = SimpleNamespace(plan=lambda *_: None)
    runner = DecodeGraphs(lambda ids, *_: ids * 10, decoding, CPU)
    runner._refusal = ""  # as on a device
    for cache in (FakeCache(), FakeCache()):
        for start in (6, 7, 8, 9):
            step = inputs([start], [[1, 2]])
            runner.decode(torch.tensor([[start]]), step, cache)
        assert runner.why_direct == ""
    assert used == [0, 0, 1, 1]


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1024), (1024, 1024), (1025, 2048), (3, 1024)])
def test_sequences_are_told_apart_by_powers_of_two(tokens, bucket):
    assert graphs._round_up(tokens) == bucket


def test_tokens_are_looked_at_after_the_plan_and_before_the_step():
    order = []
    decoding = SimpleNamespace(plan=lambda *_: order.append("plan"))
    runner = DecodeGraphs(lambda *_: order.append("run"), decoding, CPU)

    def check():
        order.append("check")
        raise KvxformError("KVX704", "token ids must lie in 0..9")

    step = dataclasses.replace(inputs([3], [[1]]), check=check)
    cache = FakeCache()
    with pytest.raises(KvxformError, match="KVX704"):
        runner.decode(torch.tensor([[99]]), step, cache)
    assert order == ["plan", "check"]
    assert not cache.recordings[1, 1024].is_warm, "nothing has been compiled yet"
    assert not cache.steps
