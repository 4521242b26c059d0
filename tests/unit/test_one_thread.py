"""Work on logits beside the runtime: the values of torch, without waking its threads."""

from __future__ import annotations

import pytest
import torch
from buffer_graphs import VOCAB, open_graph
from torch.utils._python_dispatch import TorchDispatchMode

from kvxform.runtime.generate import GenerationOptions, run_loop
from kvxform.runtime.inputs import make_batch
from kvxform.runtime.one_thread import copy_alone, largest
from kvxform.runtime.onnx_buffers import BufferCache

VIEWS = {"alias", "detach", "empty", "empty_like", "select", "slice", "view"}
VIEWS |= {"resolve_conj", "resolve_neg", "to"}  # they change nothing here


class LogitOperations(TorchDispatchMode):
    """Names of the operations that read or make something as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
        if any(x.shape[-1:] == (VOCAB,) for x in tensors):
            self.names.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_into_a_part_of_a_tensor(dtype):
    source = torch.randn(2, 5, 7).to(dtype)
    target = torch.zeros(3, 4, 7, dtype=dtype)
    copy_alone(source[:, 3], target[1:, 2])
    assert torch.equal(target[1:, 2], source[:, 3])
    assert target.count_nonzero() == source[:, 3].count_nonzero()


def test_the_first_of_equal_values_is_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, -1.0, 0.0]], requires_grad=True)
    found = largest(logits)
    assert found.tolist() == [1, 0]
    assert found.dtype is torch.int64


def test_steps_wake_no_threads_of_torch(tmp_path):
    cache = BufferCache(open_graph(tmp_path, last=True), 16, None, cuda_graph=False)
    ids = torch.tensor([[1, 2, 3, 4]])
    with LogitOperations() as prompt:
        logits = cache.append(make_batch(ids, None, VOCAB), 2, every=False)
    with LogitOperations() as steps:
        new = run_loop(ids, logits, cache.step, GenerationOptions(max_new_tokens=4))
    assert prompt.names <= VIEWS | {"new_zeros"}
    assert steps.names <= VIEWS
    assert steps.names, "logits were seen"
    assert new.shape == (1, 8)


def test_threads_of_torch_stay_as_they_were(tmp_path):
    before = torch.get_num_threads()
    cache = BufferCache(open_graph(tmp_path), 16, None, cuda_graph=False)
    cache.append(make_batch(torch.tensor([[1, 2]]), None, VOCAB), None, every=False)
    cache.step(torch.tensor([3]))
    assert torch.get_num_threads() == before
