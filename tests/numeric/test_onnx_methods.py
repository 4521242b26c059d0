"""Whole models in ONNX with every codec and every change of basis, against the eager lowering."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from onnx_codecs import klt_codec
from onnx_tools import open_export
from programs import apply, llama_program, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.base import CODECS, layers_of, make_codec
from kvxform.codecs.slerp_pair import SlerpPairCodec
from kvxform.codecs.truncate import TruncateCodec
from kvxform.ir.types import TensorType
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.runtime.model import OptimizedModel

HEADS, HEAD_DIM, PROMPT, NEW = 2, 16, 40, 12
TOLERANCE = 2e-3  # where sums round differently, a code may flip
INT2, INT4 = {"codec": "int", "bits": 2}, {"codec": "int", "bits": 4}
RUNS = {**INT2, "axis": "channel", "group": 8}
RANKED = {"codec": "saliency", "high": INT4, "low": INT2, "chunk": 16, "last": 0.25, "random": 0.25}
RANGES = [[3.0] * HEAD_DIM] * HEADS
STREAMS = [
    {"codec": "token-norm", "inner": RUNS},
    {"codec": "lloyd-max", "levels": 5},
    {"codec": "fib-vq", "words": 16, "k": 2, "gain": "projected"},
    {"codec": "octahedral"},
    {"codec": "polar", "bits": [3, 4, 4, 4]},
    {"codec": "fp8"},
    {"codec": "outliers", "share": 0.1, "axis": "channel", "inner": {**RUNS, "clip": "search"}},
    {"codec": "low-rank-residual", "inner": INT2, "rank": 2, "block": 8},
    klt_codec((tuple(i % 5 for i in range(HEAD_DIM)),) * HEADS).to_dict(),
    klt_codec((tuple(i % 3 for i in range(HEAD_DIM)),) * HEADS, memory=2, gain=True).to_dict(),
    {"codec": "nuq", "bits": 4, "levels": "normal", "center": RANGES, "width": RANGES},
    {"codec": "none", "dtype": "float16"},
    {"codec": "static-int", "bits": 4, "scale": [0.5]},
    {
        "codec": "static-int",
        "bits": 8,
        "axis": "channel",
        "scale": [0.05] * HEAD_DIM * HEADS,
        "center": True,
        "offset": [0.1] * HEAD_DIM * HEADS,
    },
]
RANKED_PAIR = [RANKED, {**RANKED, "separable": True}]  # K and V are ranked alike


def program_of(streams, *, prerope=False, regions=None):
    """Return a model whose streams take these codecs in turn, two a layer."""
    program = llama_program(
        dtype=torch.float32, layers=len(streams) // 2, kv_heads=HEADS, head_dim=HEAD_DIM
    )
    program.info = dataclasses.replace(program.info, context_length=None)
    program, _ = apply(InsertCache(), program)
    if prerope:
        program, _ = apply(CachePrerope(), program)
    pairs = zip(streams[::2], streams[1::2], strict=True)
    layers = {str(i): {"key": k, "value": v} for i, (k, v) in enumerate(pairs)}
    first = {**layers.pop("0"), "regions": regions}
    program, _ = apply(QuantizeKv(**first, layers=layers), program)
    return program


def assert_like_eager(program, folder):
    """Assert equal logits in one piece, after an empty cache too, and equal greedy tokens."""
    model, session = OptimizedModel(program), open_export(program, folder)
    prompts = token_ids(program, 2, PROMPT)
    expected = model(prompts)
    found = session.prefill(prompts, all_logits=True)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())
    )
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    expected_tokens = model.generate(prompts, **options)
    assert torch.equal(session.generate(prompts, **options), expected_tokens)


def assert_prefill_like(session, ids, expected):
    found = session.prefill(ids, all_logits=True)
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * largest)


def test_every_codec_is_in_a_model():
    used = {type(part) for spec in STREAMS + RANKED_PAIR for part in layers_of(make_codec(spec))}
    elsewhere = {TruncateCodec}  # needs joined heads: test_factor_kv
    refused = {SlerpPairCodec}  # pairs of layers: test_merge_layer_pairs
    assert used | elsewhere | refused == set(CODECS.values())


def test_every_codec_in_one_model_is_as_in_eager(tmp_path):
    assert_like_eager(program_of(STREAMS), tmp_path / "out")


def test_ranked_tokens_are_as_in_eager(tmp_path):
    """Whether a prompt comes in one piece, in parts or by tokens."""
    program = program_of(RANKED_PAIR, regions={"sink": 3})
    model, session = OptimizedModel(program), open_export(program, tmp_path / "out")
    ids = token_ids(program, 2, PROMPT + NEW)
    expected = model(ids)
    largest = float(expected.abs().max())
    last = 0
    for count in (2, 1, 20, 1, 16):
        found = session.prefill(ids[:, last : last + count], all_logits=True)
        wanted = expected[:, last : last + count]
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * largest)
        last += count
    for t in range(last, PROMPT + NEW):
        found = session.decode(ids[:, t])
        torch.testing.assert_close(found, expected[:, t], rtol=0, atol=TOLERANCE * largest)
    session.reset()
    assert_prefill_like(session, ids, expected)


def give_weight(program, before, name, value):
    """Return a node that reads a new weight, put before `before`."""
    program.weights[name] = value
    with program.graph.inserting_before(before):
        node = program.graph.create_node("get_attr", name)
    node.meta = {**before.meta, "type": TensorType(value.dtype, tuple(value.shape))}
    return node


def put_in_bases(program, heads):
    """Store K and V of every layer times orthogonal matrices, of `heads` heads each."""
    for append in list(program.calls(kvx.CACHE_APPEND)):
        attention = program.attention_node(append.kwargs["layer"])
        for i, name in enumerate(("key", "value")):
            size = heads * HEAD_DIM
            matrices = torch.linalg.qr(torch.randn(HEADS // heads, size, size)).Q
            there = give_weight(program, append, f"{append.name}.{name}", matrices)
            back = give_weight(program, attention, f"{append.name}.{name}.back", matrices.mT)
            source = append.args[i]
            with program.graph.inserting_before(append):
                turned = program.graph.call_function(kvx.ROTATE, (source, there))
            turned.meta = dict(source.meta)
            append.args = (*append.args[:i], turned, *append.args[i + 1 :])
            attention.kwargs = {**attention.kwargs, f"{name}_basis": back}


@pytest.mark.parametrize(("heads", "prerope"), [(1, True), (2, False)])
def test_bases_are_undone_when_streams_are_read(heads, prerope, tmp_path):
    exact = {"codec": "none", "dtype": "float32"}
    regions = {"sink": 3, "recent": 8, "dtype": "float32"}
    program = program_of([exact, exact], prerope=prerope, regions=regions)
    ids = token_ids(program, 1, PROMPT)
    expected = OptimizedModel(program)(ids)
    put_in_bases(program, heads)
    session = open_export(program, tmp_path / "out")
    for first, last in ((0, 16), (16, PROMPT)):
        found = session.prefill(ids[:, first:last])
        torch.testing.assert_close(found, expected[:, last - 1], rtol=0, atol=1e-4)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    rotations = [node for node in graph.node if "rotate" in node.name]
    assert len(rotations) >= 4 * len(program.sites)  # K and V, new and as read


def test_padded_rows_of_keys_before_rope_are_as_if_alone(tmp_path):
    program = program_of([INT4, INT4], prerope=True)
    ids = token_ids(program, 2, 30)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :11] = 0
    prompts = torch.zeros(2, 20, dtype=torch.int64)
    prompts[mask.bool()] = torch.cat([ids[0, :20], ids[1, :9]])
    model = OptimizedModel(program)
    expected = [model(row[None])[0] for row in ids]
    session = open_export(program, tmp_path / "out")
    found = [session.prefill(prompts, mask)]
    found += [session.decode(torch.stack([ids[0, 20 + t], ids[1, 9 + t]])) for t in range(5)]
    for t, logits in enumerate(found):
        wanted = torch.stack([expected[0][19 + t], expected[1][8 + t]])
        largest = float(wanted.abs().max())
        torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.slow
def test_every_codec_of_keys_before_rope_is_as_in_eager(tmp_path):
    program = program_of(STREAMS, prerope=True, regions={"sink": 3})
    assert_like_eager(program, tmp_path / "out")
