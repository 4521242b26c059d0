"""Decode attention of ONNX Runtime: one `GroupQueryAttention` node over an int8 cache.

The node appends the newest token and attends in one call, over buffers that are past and present at
once, which is what its fast CUDA kernel asks for. Its scales are constants: one for all keys, one
for all values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import torch
from gpu_timing import copies_for
from onnx import TensorProto, helper
from problems import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, SCALE, Problem
from torch import Tensor

ELEMENT = {torch.float16: TensorProto.FLOAT16, torch.int8: TensorProto.INT8}
LARGEST = 127


def make_gqa_model(k_scale: float, v_scale: float) -> onnx.ModelProto:
    """Return a model of one node: int8 cache `[B, Hk, T, D]`, one scale for K and one for V."""
    half, int8, int32 = TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT32
    cache = ["B", NUM_KV_HEADS, "T", HEAD_DIM]
    new = ["B", 1, NUM_KV_HEADS * HEAD_DIM]
    out = ["B", 1, NUM_Q_HEADS * HEAD_DIM]
    value = helper.make_tensor_value_info
    inputs = [
        value("query", half, out),
        value("key", half, new),
        value("value", half, new),
        value("past_key", int8, cache),
        value("past_value", int8, cache),
        value("seqlens_k", int32, ["B"]),
        value("total", int32, []),
    ]
    outputs = [
        value("output", half, out),
        value("present_key", int8, cache),
        value("present_value", int8, cache),
    ]
    scales = [
        helper.make_tensor(name, TensorProto.FLOAT, [1], [scale])
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [x.name for x in inputs] + [""] * 5 + ["k_scale", "v_scale"],
        [x.name for x in outputs],
        domain="com.microsoft",
        num_heads=NUM_Q_HEADS,
        kv_num_heads=NUM_KV_HEADS,
        scale=SCALE,
        kv_cache_bit_width=8,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
    )
    graph = helper.make_graph([node], "attention", inputs, outputs, scales)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def quantize(x: Tensor) -> tuple[Tensor, float]:
    """Return int8 codes and the scale of the whole tensor."""
    scale = float(x.abs().amax()) / LARGEST
    return (x.float() / scale).round().clamp(-LARGEST - 1, LARGEST).to(torch.int8), scale


def prepare_calls(problem: Problem) -> tuple[list[Callable[[], Tensor]], float]:
    """Return the same work on copies of the cache, and the bytes that one call reads.

    Args:
        problem: On a GPU, or on the CPU for tests.
    """
    device = problem.q.device
    (k, k_scale), (v, v_scale) = quantize(problem.k), quantize(problem.v)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    session = _session(make_gqa_model(k_scale, v_scale), stream)
    cache_bytes = 2.0 * sum(problem.lengths) * NUM_KV_HEADS * HEAD_DIM
    copies = [(k, v)]
    if stream is not None:
        copies += [(k.clone(), v.clone()) for _ in range(copies_for(cache_bytes) - 1)]
    return [_call(session, problem, *copy, stream) for copy in copies], cache_bytes


def _session(
    model: onnx.ModelProto, stream: torch.cuda.Stream | None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if stream is None:
        providers: list[Any] = ["CPUExecutionProvider"]
    else:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        own = {"user_compute_stream": str(stream.cuda_stream)}
        providers = [("CUDAExecutionProvider", own)]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def _call(
    session: onnxruntime.InferenceSession,
    problem: Problem,
    k: Tensor,
    v: Tensor,
    stream: torch.cuda.Stream | None,
) -> Callable[[], Tensor]:
    """Return one append and attention; the newest token is the last one of each sequence."""
    device = problem.q.device
    last = torch.tensor(problem.lengths, device=device) - 1
    rows = torch.arange(len(problem.lengths), device=device)
    query = problem.q.half().flatten(1)[:, None].contiguous()
    news = [
        x[rows, :, last].half().flatten(1)[:, None].contiguous() for x in (problem.k, problem.v)
    ]
    out = torch.empty_like(query)
    held = {
        "query": query, "key": news[0], "value": news[1], "past_key": k, "past_value": v,
        "output": out, "present_key": k, "present_value": v,
    }  # fmt: skip
    binding = session.io_binding()
    for name, x in held.items():
        bind = binding.bind_input if name in _INPUTS else binding.bind_output
        bind(name, device.type, 0, ELEMENT[x.dtype], list(x.shape), x.data_ptr())
    lengths = last.int()
    binding.bind_input(
        "seqlens_k", device.type, 0, TensorProto.INT32, [len(lengths)], lengths.data_ptr()
    )
    total = torch.tensor(problem.max_length, dtype=torch.int32)  # read by the host
    binding.bind_input("total", "cpu", 0, TensorProto.INT32, [], total.data_ptr())
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    kept = (held, lengths, total)  # their memory is bound

    def attend() -> Tensor:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        session.run_with_iobinding(binding, options)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return kept[0]["output"]

    return attend


_INPUTS = ("query", "key", "value", "past_key", "past_value")
