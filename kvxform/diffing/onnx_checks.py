"""What an ONNX file must keep to before it is read; onnx_ir takes much that is damaged."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from kvxform.diffing.onnx_nodes import constants_of
from kvxform.errors import ArtifactError


def check_graph(graph: ir.Graph) -> None:
    """Check names, the flow of values, and constants that the file itself holds.

    Raises:
        ArtifactError: KVX602 with the first thing that is wrong.
    """
    for word in _words(graph):
        if isinstance(word, bytes):  # protobuf hands over text that is none as bytes
            raise ArtifactError("KVX602", "words in an ONNX file must be UTF-8", got=repr(word))
    _check_flow(graph)
    _check_constants(graph)


def _words(graph: ir.Graph) -> Iterator[object]:
    """Yield every name, and what notes say."""
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        yield value.name
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from (node.op_type, node.domain, node.name, *node.attributes)
        yield from (x.name for x in (*node.inputs, *node.outputs) if x is not None)
        yield from (*node.metadata_props, *node.metadata_props.values())


def _check_flow(graph: ir.Graph) -> None:
    """Refuse a graph in which something is read that nothing gives; onnx_ir only warns of it."""
    given = {*graph.inputs, *graph.initializers.values()}
    read = [(value, node.name or "") for node in graph for value in node.inputs]
    for value, reader in (*read, *((x, "outputs") for x in graph.outputs)):
        if value is not None and value.producer() is None and value not in given:
            rule = "what an ONNX file reads must be given by a node, or by the file"
            raise ArtifactError("KVX602", rule, got=repr(value.name), at=reader)


def _check_constants(graph: ir.Graph) -> None:
    """Refuse a constant whose bytes do not make up its shape."""
    try:
        for tensor in constants_of(graph).values():
            if not isinstance(tensor, ir.ExternalTensor):
                tensor.numpy()
    except (ValueError, TypeError) as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        rule = "constants of an ONNX file must have the values of their shape"
        raise ArtifactError("KVX602", rule, got=got) from error
