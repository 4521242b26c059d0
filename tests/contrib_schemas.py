"""Operators of `com.microsoft` for onnx: ONNX Runtime's own schemas, with shapes by the book.

onnx skips what it does not know. With these schemas its checker looks at the inputs, the types and
the attributes of such nodes too, and its shape inference goes on behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
from onnx import defs
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext
from onnxruntime.capi import onnxruntime_pybind11_state as ort

DOMAIN = "com.microsoft"


def _like(*pairs: tuple[int, int]) -> Callable[[InferenceContext], None]:
    """Return an inference of outputs that are as inputs: pairs of output and input."""

    def infer(context: InferenceContext) -> None:
        for output, source in pairs:
            if output < context.get_num_outputs() and context.has_input(source):
                context.set_output_type(output, context.get_input_type(source))

    return infer


def _with_last(size: Callable[[InferenceContext], int], source: int = 0) -> Any:
    """Return an inference of an output as input `source`, but for the last size."""

    def infer(context: InferenceContext) -> None:
        kind = onnx.TypeProto()
        kind.CopyFrom(context.get_input_type(source))
        last = kind.tensor_type.shape.dim[-1]
        last.Clear()
        last.dim_value = size(context)
        context.set_output_type(0, kind)

    return infer


def _attention(heads: str) -> Callable[[InferenceContext], None]:
    """Return the inference of an attention: rows of all heads, and the caches as they were."""

    def infer(context: InferenceContext) -> None:
        if context.has_input(1):
            _like((0, 0))(context)
        else:  # one product with queries, keys and values side by side
            packed = _last(context.get_input_type(0))
            groups = _attribute(context, heads) + 2 * _attribute(context, "kv_num_heads")
            _with_last(lambda c: packed // groups * _attribute(c, heads))(context)
        _like((1, 3), (2, 4))(context)

    return infer


def _rows_of_table(context: InferenceContext) -> None:
    bits, table = _attribute(context, "bits"), context.get_input_type(0)
    kind = onnx.TypeProto()
    kind.CopyFrom(context.get_input_type(1))
    kind.tensor_type.elem_type = context.get_input_type(2).tensor_type.elem_type
    kind.tensor_type.shape.dim.add().dim_value = _last(table) * 8 // bits
    context.set_output_type(0, kind)


def _last(kind: onnx.TypeProto) -> int:
    return kind.tensor_type.shape.dim[-1].dim_value


def _attribute(context: InferenceContext, name: str) -> int:
    return int(context.get_attribute(name).i)


INFERENCES: dict[str, Callable[[InferenceContext], None]] = {
    "BiasGelu": _like((0, 0)),
    "FastGelu": _like((0, 0)),
    "FusedMatMul": _with_last(lambda c: _last(c.get_input_type(1))),
    "GatherBlockQuantized": _rows_of_table,
    "GroupQueryAttention": _attention("num_heads"),
    "MatMulNBits": _with_last(lambda c: _attribute(c, "N")),
    "PagedAttention": _attention("num_heads"),
    "QuickGelu": _like((0, 0)),
    "RotaryEmbedding": _like((0, 0)),
    "SkipSimplifiedLayerNormalization": _like((0, 0), (3, 0)),
}


@functools.cache
def register_contrib_schemas() -> frozenset[str]:
    """Make the operators known to onnx, once; return their names."""
    found = {}
    for schema in ort.get_all_operator_schema():
        if schema.domain == DOMAIN and schema.name in INFERENCES:
            found[schema.name] = schema
    for name, schema in sorted(found.items()):
        known = _converted(schema)
        known.set_type_and_shape_inference_function(INFERENCES[name])
        defs.register_schema(known)
    return frozenset(found)


def _converted(schema: Any) -> OpSchema:
    """Return a schema of ONNX Runtime as one of onnx."""

    def parameter(x: Any) -> OpSchema.FormalParameter:
        option = getattr(OpSchema.FormalParameterOption, str(x.option).rpartition(".")[2])
        return OpSchema.FormalParameter(
            x.name,
            x.typeStr,
            param_option=option,
            is_homogeneous=x.isHomogeneous,
        )

    def attribute(x: Any) -> OpSchema.Attribute:
        kind = getattr(OpSchema.AttrType, str(x.type).rpartition(".")[2])
        return OpSchema.Attribute(x.name, kind, required=x.required)

    return OpSchema(
        schema.name,
        schema.domain,
        schema.since_version,
        inputs=[parameter(x) for x in schema.inputs],
        outputs=[parameter(x) for x in schema.outputs],
        type_constraints=[
            (t.type_param_str, t.allowed_type_strs, "") for t in schema.type_constraints
        ],
        attributes=[attribute(x) for x in schema.attributes.values()],
    )
