"""A decoder of one layer whose cache is two shared buffers, written by hand, and its equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from kvxform.runtime.onnx_engine import Engine

VOCAB, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
PASTS = ("past_key_values.0.key", "past_key_values.0.value")
FORM = {"level": "L3", "runtime": "1.30", "logits": "all", "cache": "buffer"}


def weights() -> dict[str, Tensor]:
    """Return the matrices of the decoder, seeded; float32."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "embed": (VOCAB, HEADS * DIM),
        "wq": (HEADS * DIM, HEADS * DIM),
        "wk": (HEADS * DIM, KV_HEADS * DIM),
        "wv": (HEADS * DIM, KV_HEADS * DIM),
        "head": (HEADS * DIM, VOCAB),
    }
    return {name: torch.randn(size, generator=generator) / 4 for name, size in sizes.items()}


def expected_logits(ids: Tensor) -> Tensor:
    """Return logits `[S, vocab]` of one sequence `[S]`, by the definition of attention."""
    w = weights()
    x = w["embed"][ids] + torch.arange(len(ids))[:, None] / 64
    q = (x @ w["wq"]).view(-1, HEADS, DIM)
    k, v = ((x @ w[name]).view(-1, KV_HEADS, DIM) for name in ("wk", "wv"))
    out = torch.zeros_like(q)
    for t in range(len(ids)):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = k[: t + 1, group] @ q[t, head] / DIM**0.5
            out[t, head] = scores.softmax(0) @ v[: t + 1, group]
    return out.flatten(1) @ w["head"]


def write_graph(folder: Path, *, last: bool = False) -> Path:
    """Write `model.onnx`: products, GroupQueryAttention, products; positions are added."""
    w = {name: x.numpy() for name, x in weights().items()}
    w |= {"one": np.array([1], np.int64), "step": np.array([1 / 64], np.float32)}
    w |= {"two": np.array([2], np.int64), "minus": np.array([-1], np.int64)}
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input_ids"], ["tokens"]),
        node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["places", "two"], ["column"]),
        node("Mul", ["column", "step"], ["shift"]),
        node("Add", ["tokens", "shift"], ["x"]),
        *(node("MatMul", ["x", f"w{n}"], [n]) for n in "qkv"),
        node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0),
        node("Sub", ["lengths", "one"], ["ends"]),
        node("Cast", ["ends"], ["seqlens"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["columns"], start=1, end=2),
        node("Squeeze", ["columns"], ["total64"]),
        node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["q", "k", "v", *PASTS, "seqlens", "total"],
            ["y", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
        node("MatMul", ["y", "head"], ["every" if last else "logits"]),
    ]
    if last:  # of equally long rows
        nodes.append(node("Gather", ["every", "minus"], ["logits"], axis=1))
    cache = ["batch_size", KV_HEADS, "max_sequence_length", DIM]
    value, ids = helper.make_tensor_value_info, ["batch_size", "sequence_length"]
    inputs = [value(n, TensorProto.INT64, ids) for n in ("input_ids", "position_ids")]
    inputs.append(value("attention_mask", TensorProto.INT64, ["batch_size", "total"]))
    graph = helper.make_graph(
        nodes,
        "toy",
        inputs + [value(n, TensorProto.FLOAT, cache) for n in PASTS],
        [value("logits", TensorProto.FLOAT, ["batch_size", "tokens", VOCAB])]
        + [value(f"present.0.{n}", TensorProto.FLOAT, cache) for n in ("key", "value")],
        [onnx.numpy_helper.from_array(x, name) for name, x in w.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    return folder


def open_graph(folder: Path, *, last: bool = False) -> Engine:
    """Write the graph and load it on the CPU."""
    write_graph(folder, last=last)
    return Engine(folder, FORM | {"logits": "last" if last else "all"}, "cpu", threads=1)
