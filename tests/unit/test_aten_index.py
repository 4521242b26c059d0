"""Operations that pick, order, repeat and place entries, against torch, at two sizes of batch."""

from __future__ import annotations

import pytest
import torch
from onnx_tools import Call, type_of_value
from programs import BATCH, TOKENS
from torch import fx

from kvxform.codegen.onnx.emission import find_emitter

aten = torch.ops.aten


def floats(*shape):
    return torch.randn(*shape)


def classes(*shape):
    return torch.randint(0, 4, shape)


CALLS = {
    "index of the first axis": (
        aten.index.Tensor,
        lambda b, s: (floats(4, 3, 2), [classes(b * s)]),
        {},
    ),
    "index of a later axis": (
        aten.index.Tensor,
        lambda b, s: (floats(b, s, 4), [None, None, classes(2, 3)]),
        {},
    ),
    "index select": (
        aten.index_select.default,
        lambda b, s: (floats(b, 4, s), 1, torch.tensor([3, 0])),
        {},
    ),
    "gather": (aten.gather.default, lambda b, s: (floats(b, s, 4), -1, classes(b, s, 2)), {}),
    "topk": (aten.topk.default, lambda b, s: (floats(b, s, 4), 2), {}),
    "smallest of another axis": (
        aten.topk.default,
        lambda b, s: (floats(b, 4, s), 3, 1, False),
        {},
    ),
    "scatter": (
        aten.scatter.src,
        lambda b, s: (
            floats(b, s, 4),
            2,
            torch.tensor([[[1, 3]]]).expand(b, s, 2),
            floats(b, s, 2),
        ),
        {},
    ),
    "scatter of a number": (
        aten.scatter.value,
        lambda b, s: (floats(b * s, 4), 1, classes(b * s, 1), 1.5),
        {},
    ),
    "index add": (
        aten.index_add.default,
        lambda b, s: (floats(4, b, s), 0, torch.tensor([2, 2, 1]), floats(3, b, s)),
        {},
    ),
    "one hot": (aten.one_hot.default, lambda b, s: (classes(b, s), 4), {}),
    "repeat the first axis": (
        aten.repeat_interleave.self_int,
        lambda b, s: (floats(b * s, 4), 2, 0),
        {},
    ),
    "repeat heads": (
        aten.repeat_interleave.self_int,
        lambda b, s: (floats(b, 2, s, 4), 3, -3),
        {},
    ),
    "stack": (aten.stack.default, lambda b, s: ([floats(b, s), floats(b, s)], -1), {}),
    "unbind": (aten.unbind.int, lambda b, s: (floats(b, 3, s), 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_equals_torch(name):
    target, make_args, kwargs = CALLS[name]
    call = Call(target, make_args, **kwargs)
    assert not any("/" in op for op in call.op_types)
    for batch, tokens in ((2, 5), (1, 1)):
        torch.manual_seed(1)
        call.check(batch, tokens)


def node_of(target, *args, **kwargs):
    """Return a call on placeholders for the tensors among `args`."""
    graph, nodes = fx.Graph(), []

    def enter(x):
        if isinstance(x, list):
            return [enter(item) for item in x]
        if not isinstance(x, torch.Tensor):
            return x
        nodes.append(graph.placeholder(f"x{len(nodes)}"))
        nodes[-1].meta = {"type": type_of_value(x)}
        return nodes[-1]

    return graph.call_function(target, tuple(enter(list(args))), kwargs)


OTHER_FORMS = {
    "a mask": (aten.index.Tensor, (floats(4, 3), [torch.ones(4, dtype=torch.bool)]), {}),
    "two indices": (aten.index.Tensor, (floats(4, 3), [classes(2), classes(2)]), {}),
    "a run-time count": (aten.topk.default, (floats(BATCH, TOKENS), None), {}),
    "classes by content": (aten.one_hot.default, (classes(BATCH),), {}),
    "a weighted sum": (
        aten.index_add.default,
        (floats(4, 3), 0, classes(2), floats(2, 3)),
        {"alpha": 2},
    ),
    "all entries in a row": (aten.repeat_interleave.self_int, (floats(4, 3), 2), {}),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms_are_left_to_torch(name):
    target, args, kwargs = OTHER_FORMS[name]
    assert find_emitter(node_of(target, *args, **kwargs)) is None
