"""ONNX files that onnx_ir reads although they are damaged."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kvxform.diffing.onnx_checks import check_graph
from kvxform.errors import ArtifactError

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def graph(stored: ir.TensorProtocol | None = None) -> ir.Graph:
    """Return `y = x + c`."""
    tensor = ir.tensor(np.ones(2, np.float32), name="c") if stored is None else stored
    x, c = ir.Value(name="x", type=FLOAT), ir.Value(name="c", type=FLOAT, const_value=tensor)
    node = ir.node("Add", [x, c], outputs=[ir.Value(name="y", type=FLOAT)], name="/add")
    return ir.Graph([x], node.outputs, nodes=[node], initializers=[c], name="g")


def refusal(damaged: ir.Graph) -> str:
    with pytest.raises(ArtifactError) as caught:
        check_graph(damaged)
    assert caught.value.code == "KVX602"
    return str(caught.value)


def test_a_whole_graph_passes():
    check_graph(graph())


@pytest.mark.parametrize("place", ["operator", "node", "value", "note"])
def test_words_are_text(place):
    damaged, word = graph(), b"\xcdx"
    node = damaged[0]
    if place == "operator":
        node.op_type = word
    elif place == "node":
        node.name = word
    elif place == "value":
        damaged.outputs[0].name = word
    else:
        node.metadata_props["kvxform.node"] = word
    assert "must be UTF-8" in refusal(damaged)


def test_what_is_read_is_given():
    damaged = graph()
    damaged[0].replace_input_with(0, ir.Value(name="nobody", type=FLOAT))
    assert "'nobody'" in refusal(damaged)
    damaged = graph()
    damaged.outputs[0] = ir.Value(name="nothing", type=FLOAT)
    assert "'nothing'" in refusal(damaged)


def test_constants_fill_their_shape():
    proto = ir.serde.serialize_tensor(ir.tensor(np.ones(2, np.float32), name="c"))
    proto.raw_data = proto.raw_data[:-1]
    assert "values of their shape" in refusal(graph(ir.serde.deserialize_tensor(proto)))
