"""cache-residual, checkpoint: ids and a window are kept, and nothing else changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import (
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)

import kvxform
from kvxform.capture import capture
from kvxform.codegen.eager.checkpoint import CheckpointCache
from kvxform.codegen.onnx.capability import check_program as check_onnx
from kvxform.codegen.triton.capability import check_plan as check_triton
from kvxform.errors import CodegenError, PassError, RecipeError
from kvxform.ir.artifact import load_program, save_program
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.cache_residual import CacheResidual
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.prober import Prober

WINDOW = 5


def checkpointed(program: Program, window: int = WINDOW) -> Program:
    rewritten, found = apply(CacheResidual(hot_window=window), program)
    assert fired(found) == 1
    return rewritten


def cached(program: Program) -> Program:
    return apply(InsertCache(), program)[0]


def rotated(program: Program) -> Program:
    return apply(RotateQk(), cached(program))[0]


def prerope(program: Program) -> Program:
    return apply(CachePrerope(), cached(program))[0]


@pytest.mark.parametrize(
    ("make", "prepare"),
    [
        (llama_program, rotated),
        (llama_program, prerope),
        (gpt2_program, cached),
        (latent_program, cached),
        (lambda: llama_program(attention={"window": 4}), cached),
        (lambda: llama_program(attention={"softcap": 5.0}), cached),
    ],
)
def test_steps_give_what_the_whole_cache_gives(make, prepare):
    source = make()
    ids = token_ids(source, tokens=18)
    expected = run(source, ids)
    model = OptimizedModel(checkpointed(prepare(source)))
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-9)
    session = model.new_session(max_batch_size=2, max_seq_len=20)
    session.prefill(ids[:, :9], chunk_size=4)
    for t in range(9, 18):
        torch.testing.assert_close(session.decode(ids[:, t]), expected[:, t], rtol=0, atol=1e-9)
    assert session.cache_bytes() == model.plan.bytes_at([18, 18], 20)


@settings(deadline=None, max_examples=10)
@given(window=st.integers(0, 9), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_windows_and_chunks_change_nothing(window, chunks):
    source = llama_program()
    ids = token_ids(source, tokens=sum(chunks))
    expected = run(source, ids)
    model = OptimizedModel(checkpointed(cached(source), window))
    session = model.new_session(max_batch_size=2, max_seq_len=64)
    done = 0
    for n in chunks:
        logits = session.prefill(ids[:, done : done + n])
        done += n
        torch.testing.assert_close(logits, expected[:, done - 1], rtol=0, atol=1e-9)
    assert session.cache_bytes() == model.plan.bytes_at([done, done], 64)


def test_the_state_is_right_after_every_step():
    """Ragged rows, reorders, forks and crops: ids of rows are theirs."""
    source = llama_program()
    source.info = dataclasses.replace(source.info, context_length=None)
    program = checkpointed(cached(source))
    checks = Prober(source, OptimizedModel, program.plan).check_full(program)
    assert {"chunked prefill", "ragged batch", "batch reorder"} <= {c.schedule for c in checks}
    assert all(0 < check.input_error < 1e-9 for check in checks)


@pytest.mark.slow
def test_wrong_ids_are_found(monkeypatch):
    source = llama_program()
    program = checkpointed(cached(source))
    prober = Prober(source, OptimizedModel, program.plan)
    monkeypatch.setattr(CheckpointCache, "move_rows", lambda *_: None)
    with pytest.raises(kvxform.errors.VerifyError, match="KVX502"):
        prober.check_full(program)


def test_memory_is_bounded_by_the_window():
    source = llama_program(layers=6)
    plain = cached(source)
    model = OptimizedModel(checkpointed(plain))
    session = model.new_session(max_batch_size=1, max_seq_len=64)
    ids = token_ids(source, tokens=64)[:1]
    session.prefill(ids[:, :WINDOW])
    assert session.cache_bytes() == WINDOW * (plain.plan.bytes_per_token + 8)
    session.prefill(ids[:, WINDOW:])
    assert session.cache_bytes() == WINDOW * plain.plan.bytes_per_token + 8 * 64
    one_layer, stream = plain.plan.bytes_per_token / 6, 32 * 8
    peak = session.cache.peak_bytes
    assert one_layer * 64 < peak < 64 * (one_layer + 3 * stream)
    assert (model.plan.recomputed_tokens(64), model.plan.recomputed_tokens(4)) == (59, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_twenty_turns_are_token_identical(family):
    model = ALL[family].build(torch.float32)
    recipes = [
        {"version": 1, "name": "t", "passes": ["insert-cache", *more]}
        for more in ([], [{"cache-residual": {"hot_window": 12}}])
    ]
    sessions = [kvxform.optimize(model, r).new_session(1, 160) for r in recipes]
    generator = torch.Generator().manual_seed(3)
    replies: list[list[int]] = [[], []]
    for _ in range(20):
        turn = torch.randint(3, 90, (1, 4), generator=generator)
        for session, reply in zip(sessions, replies, strict=True):
            token = session.prefill(turn).argmax(-1)
            for _ in range(3):
                reply.append(int(token))
                token = session.decode(token).argmax(-1)
    assert replies[0] == replies[1]
    assert len(set(replies[0])) > 10
    assert sessions[1].cache_bytes() < sessions[0].cache_bytes() / 5


def test_readers_of_a_shared_cache_get_all_of_it():
    from numeric.test_shared_kv import model as shared_model

    program = capture(shared_model()).program
    ids = torch.randint(0, program.info.vocab_size, (1, 17))
    found = OptimizedModel(checkpointed(cached(program)))
    session = found.new_session(1, 32)
    session.prefill(ids[:, :8])
    got = torch.stack([session.decode(ids[:, t]) for t in range(8, 17)], 1)
    torch.testing.assert_close(got, run(program, ids)[:, 8:], rtol=0, atol=1e-9)


def test_the_layout_is_saved(tmp_path):
    program = checkpointed(cached(llama_program()))
    save_program(program, tmp_path)
    assert load_program(tmp_path).plan == program.plan
    assert program.facts["cache.layout"] == "checkpoint(5)"


def test_other_lowerings_refuse_it():
    program = checkpointed(cached(llama_program(dtype=torch.float32)))
    with pytest.raises(CodegenError, match="K and V of all tokens in its inputs"):
        check_onnx(program)
    with pytest.raises(CodegenError, match="K and V of all tokens in memory"):
        check_triton(program.plan)


def test_codecs_and_pages_are_near_misses():
    program = checkpointed(cached(llama_program()))
    assert reasons(PageCache().match(program)) == [
        "tokens out of the window are computed anew, not kept"
    ]
    int4 = {"codec": "int", "bits": 4}
    with pytest.raises(PassError, match="kept as it is where tokens are computed anew"):
        apply(QuantizeKv(int4, int4), program)
    passes = ["insert-cache", {"quantize-kv": {"key": int4, "value": int4}}, "cache-residual"]
    with pytest.raises(RecipeError, match="say nothing of what they are made from"):
        plan_pipeline(llama_program(), load_recipe({"version": 1, "name": "t", "passes": passes}))
    again = CacheResidual(hot_window=WINDOW).match(program)
    assert reasons(again) == ["ids are already what is kept"]
    with pytest.raises(RecipeError, match="must not be negative"):
        CacheResidual(hot_window=-1)
