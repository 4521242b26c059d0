"""Packages over paged caches, step by step, against the definition of the cache."""

from __future__ import annotations

import dataclasses
import json

import onnx
import onnx_ir as ir
import pytest
import torch
from cached import cached_program, defined_cache, defined_logits
from paged_reference import open_paged, paged_package
from programs import apply, token_ids

from kvxform.codecs.base import make_codec
from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions, legal_levels
from kvxform.errors import CacheFullError, CodegenError, KvxformError
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.runtime.onnx_engine import Engine
from kvxform.runtime.onnx_rows import OnnxModel
from kvxform.runtime.onnx_session import OnnxSession

TOKENS, BLOCK = 40, 16
TOLERANCE = 1e-3  # where two ways of rounding meet, a code may flip; logits are about 2
INT4 = {"codec": "int", "bits": 4}
FP8 = {"codec": "fp8", "format": "e4m3", "scaled": False}


def static(bits, axis="tensor"):
    count = 1 if axis == "tensor" else 2 * 16  # heads x channels
    scale = [(3 + 0.01 * i) / 2 ** (bits - 1) for i in range(count)]
    return {"codec": "static-int", "bits": bits, "axis": axis, "scale": scale}


PLANS = {
    "exact": None,
    "int8": {"key": static(8), "value": static(8)},
    "int8-channel": {"key": static(8, "channel"), "value": static(8)},
    "int4": {"key": static(4), "value": static(4, "channel")},
    "fp8": {"key": FP8, "value": FP8},
}


def program_of(plan, context=64, **model):
    program = cached_program(plan, None, dtype=torch.float32, **model)
    program.info = dataclasses.replace(program.info, context_length=context)
    return program


@pytest.mark.parametrize(
    "case", ["exact", "int4", "fp8", pytest.param("int8-channel", marks=pytest.mark.slow)]
)
def test_rows_of_different_lengths_are_as_if_alone(case, tmp_path, monkeypatch):
    program = program_of(PLANS[case])
    ids, counts = token_ids(program, 3, TOKENS), (20, 9, 1)
    expected = [defined_logits(program, row) for row in ids]
    session = open_paged(paged_package(program, tmp_path / "out"), monkeypatch)
    prompts = torch.zeros(3, 20, dtype=torch.int64)
    mask = (torch.arange(20) < torch.tensor(counts)[:, None]).long()
    prompts[mask.bool()] = torch.cat([ids[r, :n] for r, n in enumerate(counts)])
    every = session.prefill(prompts, mask, all_logits=True)
    for row, count in enumerate(counts):
        close(every[row, :count], expected[row][:count])
    for step in range(3):
        tokens = torch.stack([ids[r, n + step] for r, n in enumerate(counts)])
        logits = session.decode(tokens)
        for row, count in enumerate(counts):
            close(logits[row], expected[row][count + step])
    assert session.sequence_lengths() == tuple(n + 3 for n in counts)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """Return a program of int8, its package with logits of all tokens, and one with the last."""
    program, folder = program_of(PLANS["int8"]), tmp_path_factory.mktemp("paged")
    return (
        program,
        paged_package(program, folder / "all"),
        paged_package(program, folder / "last", logits="last"),
    )


@pytest.mark.parametrize("kind", ["all", "last"])
def test_prompts_in_pieces_continue_what_is_cached(kind, int8, monkeypatch):
    program, every, last = int8
    session = open_paged(every if kind == "all" else last, monkeypatch)
    ids = token_ids(program, 2, TOKENS)
    expected = torch.stack([defined_logits(program, row) for row in ids])
    close(session.prefill(ids[:, :20], chunk_size=7), expected[:, 19])
    close(session.decode(ids[:, 20]), expected[:, 20])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    found = session.prefill(ids[:, 21:25], mask, all_logits=True)
    close(found[0], expected[0, 21:25])
    close(found[1, 0], expected[1, 21])
    assert session.sequence_lengths() == (25, 22)
    assert session.mask.sum(1).tolist() == [25, 22]


def test_a_row_of_nothing_new_costs_no_run(int8, monkeypatch):
    program, every, _ = int8
    session = open_paged(every, monkeypatch)
    ids = token_ids(program, 2, 12)
    session.prefill(ids, torch.tensor([[1] * 12, [1] * 3 + [0] * 9]), chunk_size=4)
    assert session._cache._engine.session.runs == 3
    assert session.sequence_lengths() == (12, 3)


def test_rows_can_be_read_reordered_and_cropped(int8, monkeypatch):
    program, every, _ = int8
    model = OnnxModel(program, open_paged(every, monkeypatch))
    rows = model.new_session(max_batch_size=2, max_seq_len=64)
    ids = token_ids(program, 2, 30)
    rows.prefill(ids[:, :20])
    assert rows.cache_bytes() == rows.planned_bytes()
    found = rows.logical_cache(1)
    keys, values = defined_cache(program, ids[1, :20], 1)
    close(found.v[1], values)
    codes = rows.stored_planes(1)[1]["key"]["codes"]
    close(make_codec(program.plan.site(1).key.codec).decode({"codes": codes}, keys.dtype), keys)
    rows.reorder([1, 0])
    rows.crop(17)  # within the second block
    expected = [defined_logits(program, ids[r, :18])[-1] for r in (1, 0)]
    close(rows.decode(ids[[1, 0], 17]), torch.stack(expected))


def test_the_pool_grows_and_is_used_again(int8, monkeypatch):
    _, every, _ = int8
    session = open_paged(every, monkeypatch)
    ids = torch.ones(1, 60, dtype=torch.int64)
    session.prefill(ids[:, :10])
    small = session.cache_bytes()
    expected = session.decode(ids[:, 0])
    session.prefill(ids[:, :49])  # four blocks of 16
    blocks, size = session.planned_rows()
    assert (blocks - 1) * size >= 60
    assert session.cache_bytes() > small
    before = session.cache_bytes()
    session.reset()
    assert session.cache_bytes() == 0
    session.prefill(ids[:, :10])
    assert session.cache_bytes() == before
    assert torch.equal(session.decode(ids[:, 0]), expected)


def test_a_batch_of_another_size_can_follow(int8, monkeypatch):
    program, every, _ = int8
    session = open_paged(every, monkeypatch)
    ids = token_ids(program, 3, 20)
    for rows in (3, 1, 2):
        session.reset()
        session.prefill(ids[:rows, :9])
        expected = [defined_logits(program, row[:10])[-1] for row in ids[:rows]]
        close(session.decode(ids[:rows, 9]), torch.stack(expected))


def test_a_session_with_a_length_has_its_blocks_at_once(int8, monkeypatch):
    _, every, _ = int8
    session = open_paged(every, monkeypatch, max_length=48)
    session.prefill(torch.ones(2, 3, dtype=torch.int64))
    assert session.planned_rows() == (1 + 2 * 3, BLOCK)
    with pytest.raises(CacheFullError, match="KVX703"):
        session.prefill(torch.ones(2, 46, dtype=torch.int64))


def test_a_failed_call_leaves_rows_as_they_were(int8, monkeypatch):
    program, every, _ = int8
    session = open_paged(every, monkeypatch)
    ids = token_ids(program, 1, 20)
    session.prefill(ids[:, :5])
    engine, run = session._cache._engine, Engine.run

    def fail(self, binding, graph=None):
        monkeypatch.setattr(Engine, "run", run)
        raise KvxformError("KVX706", "no")

    monkeypatch.setattr(Engine, "run", fail)
    with pytest.raises(KvxformError):
        session.prefill(ids[:, 5:20])
    assert session.sequence_lengths() == (5,)
    close(session.decode(ids[:, 5])[0], defined_logits(program, ids[0, :6])[-1])
    assert engine.session.runs == 2


ATTENTIONS = {
    "window": {"attention": {"window": 9}},
    "softcap": {"attention": {"softcap": 2.0}},
    "sinks": {"attention": {"sink_logits": torch.linspace(-1, 2, 4)}},
    "interleaved": {"interleaved": True},
    "part of the channels": {"rotary_dim": 8},
    "no RoPE": {"rotary_dim": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_options_of_attention(name, tmp_path, monkeypatch):
    program = program_of(PLANS["int8"], **ATTENTIONS[name])
    ids = token_ids(program, 1, 30)
    session = open_paged(paged_package(program, tmp_path / "out"), monkeypatch)
    close(session.prefill(ids, all_logits=True)[0], defined_logits(program, ids[0]))


@pytest.mark.parametrize("context", [64, None])
def test_keys_that_are_turned_after_rope_get_positions_from_the_graph(
    context, tmp_path, monkeypatch
):
    program = program_of(PLANS["int8"], context)
    if context is not None:  # else there is no last position for a table of cosines
        program, _ = apply(RotateQk(block=16), program)
    session = open_paged(paged_package(program, tmp_path / "out"), monkeypatch)
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    nodes = [n for n in graph if n.op_type == "PagedAttention"]
    assert nodes
    assert all("do_rotary" not in node.attributes for node in nodes)
    ids = token_ids(program, 2, 20)
    expected = torch.stack([defined_logits(program, row) for row in ids])
    close(session.prefill(ids[:, :9]), expected[:, 8])
    close(session.decode(ids[:, 9]), expected[:, 9])


def test_the_graph_is_what_the_engine_of_genai_feeds(int8):
    program, every, last = int8
    inputs = ["input_ids", "cumulative_sequence_lengths", "past_sequence_lengths", "block_table"]
    for folder, rows in ((every, "num_tokens"), (last, "batch_size")):
        graph = ir.load(folder / "model.onnx").graph
        names = [x.name for x in graph.inputs]
        assert names[:5] == [*inputs, "attention_metadata"]
        planes = [f"past_key_values.{n}.{s}_codes" for n in (0, 1) for s in ("key", "value")]
        assert names[5:] == planes
        (logits,) = (x for x in graph.outputs if x.name == "logits")
        assert list(logits.shape) == [rows, program.info.vocab_size]
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    config = json.loads((every / "genai_config.json").read_text())
    assert config["engine"]["dynamic_batching"]["block_size"] == BLOCK
    named = config["model"]["decoder"]["inputs"]
    assert {named[name] for name in (*inputs, "attention_metadata")} <= set(names)
    assert named["past_key_names"] == "past_key_values.%d.key_codes"


def test_a_half_precision_program_is_exported_by_its_level(tmp_path, monkeypatch):
    program = cached_program(PLANS["fp8"], BLOCK, dtype=torch.float16)
    options = OnnxOptions(level="L4", provider="cuda", logits="last")
    session = open_paged(export_onnx(program, tmp_path / "out", options), monkeypatch)
    ids = token_ids(program, 1, 12)
    expected = defined_logits(program, ids[0])[-1]
    torch.testing.assert_close(session.prefill(ids)[0], expected, rtol=0, atol=3e-2)
    types = {x.dtype for x in ir.load(tmp_path / "out" / "model.onnx").graph.inputs}
    assert ir.DataType.FLOAT8E4M3FN in types


REFUSED = {
    "float32 is no": ({}, {"dtype": torch.float32}, 16, "compute dtype"),
    "heads of 12": ({}, {"head_dim": 12}, 16, "multiple of 8"),
    "int4 per token": (
        {"key": INT4, "value": INT4},
        {},
        16,
        "static-int",
    ),
    "fp8 with scales": ({"key": {"codec": "fp8"}, "value": {"codec": "fp8"}}, {}, 16, "static-int"),
    "int8 keys alone": ({"key": static(8)}, {}, 16, "one dtype"),
    "a window of chunks": ({}, {"attention": {"chunk": 8}}, 16, "chunks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_cannot_keep_is_refused(name, tmp_path):
    plan, model, page, reason = REFUSED[name]
    program = cached_program(plan or None, page, **{"dtype": torch.float16, **model})
    assert reason in dict(legal_levels(program, OnnxOptions(provider="cuda")))["L4"]
    with pytest.raises(CodegenError, match=f"KVX403.*{reason}"):
        export_onnx(program, tmp_path / "out", OnnxOptions(level="L4", provider="cuda"))


def test_pages_run_on_cuda_alone(int8):
    with pytest.raises(KvxformError, match=r"KVX704.*CUDA"):
        OnnxSession(int8[1], provider="cpu")
