"""PagedAttention by its schema, in numpy, and a session that runs packages with it on the CPU.

ONNX Runtime has a kernel for CUDA alone. Everything else of a graph is run by `onnx.reference`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from kvxform.codegen.onnx.capability import check_program
from kvxform.codegen.onnx.export import emit_model
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.package import write_package
from kvxform.ir.program import Program
from kvxform.runtime import onnx_engine
from kvxform.runtime.onnx_engine import ELEMENTS
from kvxform.runtime.onnx_session import OnnxSession

ABSENT = np.zeros(0, np.float32)  # an output left out; the evaluator gives it to inputs left out
LIMITS = {"int8": 127, "int4": 7}
NAMES = {
    TensorProto.FLOAT: "tensor(float)",
    TensorProto.FLOAT16: "tensor(float16)",
    TensorProto.INT32: "tensor(int32)",
    TensorProto.INT64: "tensor(int64)",
    TensorProto.INT8: "tensor(int8)",
    TensorProto.UINT8: "tensor(uint8)",
    TensorProto.FLOAT8E4M3FN: "tensor(float8e4m3fn)",
}


def encode(x: np.ndarray, scale: np.ndarray | None, element: str, dtype: Any) -> np.ndarray:
    """Return what is stored of one token's heads `[Hk, D]`."""
    if not element:
        return x.astype(dtype)
    scaled = x.astype(np.float32) / scale.reshape(-1, x.shape[-1] if scale.size > 1 else 1)
    if element == "float8e4m3fn":
        return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    most = LIMITS[element]
    codes = np.clip(np.rint(scaled), -most - 1, most).astype(np.int8)
    if element == "int8":
        return codes
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def decode(stored: np.ndarray, scale: np.ndarray | None, element: str) -> np.ndarray:
    """Return float32 values `[Hk, T, D]` of what is stored."""
    if element == "int4":
        nibbles = np.stack([stored & 15, stored >> 4], -1).astype(np.float32) - 8
        stored = nibbles.reshape(*stored.shape[:-1], -1)
    values = stored.astype(np.float32)
    return (
        values * scale.reshape(-1, 1, values.shape[-1] if scale.size > 1 else 1)
        if element
        else values
    )


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Turn `[heads, D]` of one token by cosines and sines `[n]`; later channels stay."""
    out, n = x.copy(), len(cos)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    if not interleaved:
        first, second = slice(n), slice(n, 2 * n)
    a, b = x[:, first], x[:, second]
    out[:, first], out[:, second] = a * cos - b * sin, b * cos + a * sin
    return out


class PagedAttention(OpRun):
    """com.microsoft.PagedAttention, token by token."""

    op_domain = "com.microsoft"

    def _run(self, q, k, v, k_cache, v_cache, bounds, past, table, *rest, **attributes):
        rest = (*rest, *[None] * (9 - len(rest)))
        rest = [None if x is None or x.size == 0 else x for x in rest]
        cos, sin, slots, sinks, _, _, k_scale, v_scale, metadata = rest
        get = {name: value for name, value in attributes.items() if value is not None}.get
        heads, kv_heads = get("num_heads"), get("kv_num_heads")
        width = q.shape[1] // heads
        k_cache, v_cache, out = k_cache.copy(), v_cache.copy(), np.zeros_like(q)
        k_kind, v_kind = get("k_cache_dtype", ""), get("v_cache_dtype", "")
        assert slots is None
        assert metadata[0] >= np.diff(bounds).max()
        assert metadata[1] >= (np.diff(bounds) + past).max() >= metadata[2]
        for row, before in enumerate(past):
            for token in range(bounds[row], bounds[row + 1]):
                at = before + token - bounds[row]
                block, place = table[row, at // k_cache.shape[1]], at % k_cache.shape[1]
                assert block > 0, "the null block is never written"
                query = q[token].reshape(heads, width).astype(np.float32)
                key = k[token].reshape(kv_heads, width).astype(np.float32)
                if get("do_rotary", 0):
                    turn = cos[at], sin[at], bool(get("rotary_interleaved", 0))
                    query, key = rotate(query, *turn), rotate(key, *turn)
                value = v[token].reshape(kv_heads, width)
                k_cache[block, place] = encode(key, k_scale, k_kind, k_cache.dtype)
                v_cache[block, place] = encode(value, v_scale, v_kind, v_cache.dtype)
                seen = [
                    table[row, t // k_cache.shape[1]] * k_cache.shape[1] + t % k_cache.shape[1]
                    for t in range(at + 1)
                ]
                window = get("local_window_size", -1)
                seen = seen[-window:] if window > 0 else seen
                keys = decode(_rows(k_cache, seen), k_scale, k_kind)
                values = decode(_rows(v_cache, seen), v_scale, v_kind)
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    scores = keys[group] @ query[head] * get("scale", width**-0.5)
                    if get("softcap", 0.0):
                        scores = get("softcap") * np.tanh(scores / get("softcap"))
                    sink = 0.0 if sinks is None else np.exp(np.float32(sinks[head]))
                    weights = np.exp(scores)
                    y = weights @ values[group] / (weights.sum() + sink)
                    out[token, head * width : (head + 1) * width] = y
        return out, k_cache, v_cache


class SkipSimplifiedLayerNormalization(OpRun):
    """com.microsoft.SkipSimplifiedLayerNormalization: a sum, and the RMS norm of it."""

    op_domain = "com.microsoft"

    def _run(self, x, skip, gain, *, epsilon=None):
        total = x.astype(np.float32) + skip.astype(np.float32)
        root = np.sqrt(np.square(total).mean(-1, keepdims=True) + epsilon)
        y = (total / root).astype(x.dtype) * gain
        return y, ABSENT, ABSENT, total.astype(x.dtype)


def _rows(cache: np.ndarray, slots: list[int]) -> np.ndarray:
    """Return tokens of a pool by slot, `[Hk, tokens, width]`."""
    return cache.reshape(-1, *cache.shape[2:])[slots].transpose(1, 0, 2)


class _Binding:
    """Places in memory by name, as torch tensors."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def bind_input(self, name, *place: Any) -> None:
        self.inputs[name] = _tensor_at(*place)

    def bind_output(self, name, *place: Any) -> None:
        self.outputs[name] = _tensor_at(*place)


class ReferenceSession:
    """What `Engine` needs of a session of ONNX Runtime; `runs` counts."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        operators = [PagedAttention, SkipSimplifiedLayerNormalization]
        self._model, self._run = model, ReferenceEvaluator(model, new_ops=operators)
        self.runs = 0

    def get_inputs(self) -> list[Any]:
        return [_Port(x) for x in self._model.graph.input]

    def get_outputs(self) -> list[Any]:
        return [_Port(x) for x in self._model.graph.output]

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: object) -> None:
        self.runs += 1
        feeds = {name: _to_numpy(x) for name, x in binding.inputs.items()}
        names = list(binding.outputs)
        for name, value in zip(names, self._run.run(names, feeds), strict=True):
            _to_numpy(binding.outputs[name])[...] = value


class _Port:
    def __init__(self, info: onnx.ValueInfoProto) -> None:
        tensor = info.type.tensor_type
        self.name, self.type = info.name, NAMES[tensor.elem_type]
        self.shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]


def _tensor_at(device: str, index: int, element: int, shape: list[int], place: int) -> torch.Tensor:
    dtype = next(d for d, number in ELEMENTS.items() if number == element)
    count = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_char * count).from_address(place)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype is torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return x.numpy()


def paged_package(
    program: Program, folder: Path, logits: str = "all", block_size: int = 16
) -> Path:
    """Write a package at L4 of any dtype; the table of levels has half precision alone."""
    form = Form("L4", 23, "cuda", "1.31", "paged", logits, "source", block_size)
    _, fallback = check_program(program)
    folder.mkdir()
    write_package(emit_model(program, fallback, form), program, folder, None, None, None, form)
    return folder


def open_paged(folder: Path, monkeypatch: Any, **options: Any) -> OnnxSession:
    """Open a package on the reference, with the memory on the CPU."""
    monkeypatch.setattr(onnx_engine, "open_graph", lambda _, path, *__: ReferenceSession(path))
    monkeypatch.setattr(onnx_engine, "check_runtime", lambda *_: None)
    return OnnxSession(folder, provider="reference", **options)
