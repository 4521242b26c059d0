"""GroupQueryAttention over codes on the CPU: a branch for several new tokens.

The kernel for codes is made for one new token a row. With several, it decodes the cache anew for
each few of them and takes 3 to 5 times as long as the kernel for floats. So the node is an `If`.
One new token a row is the operator as it is. Several are encoded, written into the buffers and
decoded again beside what is cached, and the operator attends to floats. Codes, and what each query
reads, are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from kvxform.codecs.static_int import StaticIntCodec
from kvxform.codegen.onnx.block_formats import BlockFormat
from kvxform.codegen.onnx.builder import BOOL, INT64, Builder
from kvxform.codegen.onnx.codec_base import FLOAT, TOKENS, UINT8
from kvxform.codegen.onnx.codec_scales import clip
from kvxform.codegen.onnx.contrib import Attributes, ContribAttention
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.forms import BUFFER_OPSET, MICROSOFT

INT32 = ir.DataType.INT32
HALF4 = 8  # codes of 4 bits lie in [-8, 7]
OF_CODES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")
OF_ROPE = ("do_rotary", "rotary_interleaved")


@dataclass(frozen=True)
class GroupedCall:
    """One GroupQueryAttention.

    Attributes:
        inputs: In the order of the operator, up to the scales.
        dtypes: Of what it attends to, and of both buffers.
        attributes: By name.
    """

    inputs: tuple[ir.Value | None, ...]
    dtypes: tuple[ir.DataType | None, ...]
    attributes: Attributes

    def emit(self, b: Builder, role: str) -> tuple[ir.Value, ...]:
        """Emit the node; return `[B, S, H * D]` and both buffers."""
        return b.ops(
            "GroupQueryAttention",
            *self.inputs,
            dtypes=self.dtypes,
            role=role,
            domain=MICROSOFT,
            **self.attributes,
        )


def has_prompt_branch(e: Emission, attention: ContribAttention) -> bool:
    """Whether several new tokens get a branch: codes, float32, on the CPU, with `TensorScatter`."""
    codecs = [format_.codec for format_ in attention.formats.values()]
    is_coded = all(isinstance(codec, StaticIntCodec) for codec in codecs)
    is_here = e.form.provider == "cpu" and e.form.opset >= BUFFER_OPSET
    return is_coded and is_here and e.program.dtype is torch.float32


def attend_by_length(
    e: Emission, attention: ContribAttention, call: GroupedCall
) -> tuple[ir.Value, ...]:
    """Emit a call as an `If` on the number of new tokens; return the outputs of the call."""
    b = e.builder
    is_step = e.shared(("one new token",), lambda: _is_one(e))
    with b.branch("step") as step_nodes:
        step = call.emit(b, "group_query_attention")
    with b.branch("prompt") as prompt_nodes:
        prompt = _Prompt(b, attention, call).emit()
    return b.ops(
        "If",
        is_step,
        dtypes=call.dtypes,
        role="group_query_attention",
        then_branch=ir.Graph([], step, nodes=step_nodes, name="step"),
        else_branch=ir.Graph([], prompt, nodes=prompt_nodes, name="prompt"),
    )


def _is_one(e: Emission) -> ir.Value:
    b = e.builder
    return b.op("Equal", b.op("Squeeze", e.symbol("S")), b.const(1), dtype=BOOL)


class _Prompt:
    """The branch for several new tokens.

    Args:
        b: Where nodes go.
        attention: The layer.
        call: The operator over codes.
    """

    def __init__(self, b: Builder, attention: ContribAttention, call: GroupedCall) -> None:
        self._b, self._attention, self._call = b, attention, call
        self._heads = attention.site.num_kv_heads
        self._width = attention.site.streams["key"].head_dim

    def emit(self) -> tuple[ir.Value, ...]:
        """Emit everything; return what the operator over codes does."""
        b, inputs = self._b, self._call.inputs
        q, *new = self._operands()
        before = self._before()
        buffers: list[ir.Value] = []
        read: list[ir.Value] = []
        past: list[ir.Value] = []
        for (side, format_), x, buffer in zip(self._attention.sides, new, inputs[3:5], strict=True):
            assert buffer is not None, "both buffers are there"
            with b.part(side):
                codes, values = self._encode(x, format_)
                buffers.append(self._write(buffer, codes, before, format_))
                read.append(values)
                past.append(self._decode(self._cached(buffer, before), format_, len(past)))
        attributes = {
            name: value
            for name, value in self._call.attributes.items()
            if name not in (*OF_CODES, *OF_ROPE)
        }
        floats = GroupedCall(
            (q, *read, *past, *inputs[5:7], *(None,) * 4, inputs[11]), (FLOAT,) * 3, attributes
        )
        return floats.emit(b, "attention")[0], *buffers

    def _operands(self) -> list[ir.Value]:
        """Return queries, keys and values as rows of heads, after RoPE."""
        b, (first, *others) = self._b, self._call.inputs[:3]
        site = self._attention.site
        assert first is not None, "queries are there"
        q, k, v = first, *others
        if k is None or v is None:
            sizes = [n * self._width for n in (site.num_q_heads, self._heads, self._heads)]
            q, k, v = b.ops("Split", first, b.const(sizes), dtypes=[FLOAT] * 3, axis=2)
        if self._attention.rope is not None:
            positions = self._positions()
            q = self._turn(q, positions, site.num_q_heads)
            k = self._turn(k, positions, self._heads)
        return [q, k, v]

    def _turn(self, x: ir.Value, positions: ir.Value, heads: int) -> ir.Value:
        rope = self._attention.rope
        assert rope is not None, "asked for by the caller"
        options = {"interleaved": int(rope.interleaved), "num_heads": heads}
        turned = 2 * _columns(rope.tables[0])
        if turned < self._width:
            options["rotary_embedding_dim"] = turned
        return self._b.op(
            "RotaryEmbedding",
            *(x, positions, *rope.tables),
            dtype=FLOAT,
            role="rope",
            domain=MICROSOFT,
            **options,
        )

    def _before(self) -> ir.Value:
        """Return the cached tokens of each row, int64 `[B]`; 0 in first prompts, also ragged."""
        b = self._b
        last, new = self._last_slots(), self._new_tokens()
        return b.op("Max", b.op("Sub", b.op("Add", last, b.const(1)), new), b.const(0))

    def _positions(self) -> ir.Value:
        """Return positions of the new tokens, int64 `[B, S]`."""
        b = self._b
        first = b.op("Unsqueeze", self._before(), b.const([1]))
        count = b.op("Squeeze", self._new_tokens())
        return b.op("Add", first, b.op("Range", b.const(0), count, b.const(1)))

    def _last_slots(self) -> ir.Value:
        last = self._call.inputs[5]
        assert last is not None, "the operator needs lengths"
        return self._b.cast(last, INT64)

    def _new_tokens(self) -> ir.Value:
        """Return the number of new tokens, int64 `[1]`."""
        queries = self._call.inputs[0]
        return self._b.op("Shape", queries, dtype=INT64, start=1, end=2)

    def _encode(self, x: ir.Value, format_: BlockFormat) -> tuple[ir.Value, ir.Value]:
        """Return codes as float32, and what they are read as; both are rows `[B, S, Hk * D]`."""
        b, codec, scale = self._b, format_.codec, _row_of(format_)
        # The operator multiplies by the float32 reciprocal, too.
        steps = b.op("Mul", x, b.table(scale.reciprocal()))
        codes = clip(b, b.op("Round", steps), -float(codec.half), float(codec.half - 1))
        return codes, b.op("Mul", codes, b.table(scale))

    def _write(
        self, buffer: ir.Value, codes: ir.Value, before: ir.Value, format_: BlockFormat
    ) -> ir.Value:
        """Return a buffer with new codes in their slots; past and present are the same memory."""
        b = self._b
        rows = b.op("Reshape", codes, b.const([0, 0, self._heads, self._width]))
        stored = _pack(b, rows, self._width) if format_.dtype == UINT8 else rows
        heads = b.op("Transpose", b.cast(stored, format_.dtype), perm=[0, 2, 1, 3])
        return b.op("TensorScatter", buffer, heads, before, axis=TOKENS)

    def _cached(self, buffer: ir.Value, before: ir.Value) -> ir.Value:
        """Return the slots of a buffer that were written before, `[B, Hk, t, width]`."""
        b = self._b
        longest = b.op("ReduceMax", before, keepdims=1)
        return b.op("Slice", buffer, b.const([0]), longest, b.const([TOKENS]))

    def _decode(self, stored: ir.Value, format_: BlockFormat, side: int) -> ir.Value:
        """Return what codes `[B, Hk, t, width]` are read as, float32 `[B, Hk, t, D]`."""
        b, is_packed = self._b, format_.dtype == UINT8
        codes = _unpack(b, stored, self._width) if is_packed else b.cast(stored, FLOAT)
        return b.op("Mul", codes, self._call.inputs[12 + side])


def _pack(b: Builder, codes: ir.Value, head_dim: int) -> ir.Value:
    """Return codes of 4 bits `[..., D]` as bytes `[..., D / 2]`, the first one low; all float32."""
    joins = torch.zeros(head_dim, head_dim // 2)
    joins[::2].fill_diagonal_(1.0)
    joins[1::2].fill_diagonal_(16.0)
    nibbles = b.op("Add", codes, b.const(float(HALF4), FLOAT))
    return b.op("MatMul", nibbles, b.table(joins))


def _unpack(b: Builder, stored: ir.Value, head_dim: int) -> ir.Value:
    """Return bytes `[B, Hk, t, D / 2]` as float32 codes `[B, Hk, t, D]`, by a table."""
    byte = torch.arange(256)
    table = torch.stack([byte % 16, byte // 16], 1).float() - HALF4
    pairs = b.op("Gather", b.table(table), b.cast(stored, INT32))
    return b.op("Reshape", pairs, b.const([0, 0, 0, head_dim]))


def _row_of(format_: BlockFormat) -> torch.Tensor:
    """Return the scales of a row of heads, float32 `[1]` or `[Hk * D]`."""
    assert format_.scale is not None, "codes have scales"
    return format_.scale.float().reshape(-1)


def _columns(table: ir.Value) -> int:
    assert table.shape is not None, "an initialiser"
    return int(table.shape.numpy()[1])
