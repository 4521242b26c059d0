"""The Triton lowering on a CUDA device: against the eager one, and its recorded decode steps."""

from __future__ import annotations

import gc

import pytest
import torch
from lowered import both, divergence, lowered_program, prompts, relative
from programs import latent_program, llama_program

from kvxform.codegen.triton import autotune, graphs, modules
from kvxform.runtime.loading import move_program
from kvxform.verify.cache_state import check_schedule
from kvxform.verify.probe import make_probe, run_source
from kvxform.verify.schedules import full_schedules, row_schedules
from kvxform.verify.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

CASES = [
    ("exact", torch.float32),
    ("kv4", torch.float32),
    ("kivi2", torch.float32),
    ("exact", torch.float16),
    ("int8", torch.float16),
    ("kv4", torch.float16),
    ("kivi2", torch.float16),
    ("exact", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("kv4", torch.bfloat16),
    ("kivi4", torch.bfloat16),
]
cases = pytest.mark.parametrize(("recipe", "dtype"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_tuning(monkeypatch):
    """Take the first config of each kernel: results are the same, and tests are quicker."""
    monkeypatch.setattr(modules, "tune", lambda module, *_, **__: module.CONFIGS[0])


def feed(session, ids, prompt, steps):
    """Return the logits of a ragged, chunked prefill and of decode steps, `[n, vocab]`."""
    mask = torch.ones_like(ids[:, :prompt])
    mask[1, : prompt // 3] = 0
    logits = [session.prefill(ids[:, :prompt], mask, chunk_size=prompt // 2 + 3)]
    logits += [session.decode(ids[:, prompt + i]) for i in range(steps)]
    return torch.cat(logits)


def assert_close(got, expected, recipe, dtype):
    if recipe == "exact":
        assert relative(got, expected) <= TOLERANCES[dtype].logits
    assert divergence(got, expected) <= TOLERANCES[dtype].lossy_kl


@cases
def test_triton_gives_what_eager_gives(recipe, dtype):
    program = lowered_program(recipe, dtype)
    eager, triton = both(program)
    ids = prompts(program, 2, 230)
    expected = feed(eager.new_session(2, 230), ids, 150, 80)
    session = triton.new_session(2, 230)
    got = feed(session, ids, 150, 80)
    assert triton._executable.why_direct == "", "decode steps are replayed"
    assert_close(got, expected, recipe, dtype)
    assert session.cache_bytes() == triton.plan.bytes_at(session.sequence_lengths(), 230)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["exact", "int8", "kv4"])
def test_a_latent_is_stored_once_and_read_twice(recipe, dtype):
    program = lowered_program(recipe, source=latent_program(dtype=dtype))
    assert {site.payload for site in program.plan.sites} == {"latent"}
    ids, found = prompts(program, 2, 90), []
    for model in both(program):
        session = model.new_session(2, 96)
        found.append(feed(session, ids, 70, 20))
        assert session.cache_bytes() == program.plan.bytes_at([90, 67], 96)
    assert_close(found[1], found[0], recipe, dtype)


@cases
def test_every_schedule(recipe, dtype):
    source = move_program(llama_program(dtype=dtype, head_dim=64), torch.device("cuda"))
    _, triton = both(lowered_program(recipe, dtype))
    probe = make_probe(48, (240, 190, 24, 240))
    probe.input_ids[3, :170] = probe.input_ids[0, :170]
    run = run_source(source, probe)
    schedules = (
        *full_schedules(probe.lengths[:3], 20),
        *row_schedules(triton.plan, probe.lengths, 170, 12),
    )
    for schedule in schedules:
        check = check_schedule(triton, schedule, probe, run, dtype)
        check.require(TOLERANCES[dtype], schedule.name)


@pytest.mark.parametrize("recipe", ["exact", "kv4", "kivi2"])
def test_compiled_steps(recipe):
    program = lowered_program(recipe, torch.float16)
    eager, triton = both(program, compile=True)
    ids = prompts(program, 2, 170)
    expected = feed(eager.new_session(2, 170), ids, 150, 20)
    got = feed(triton.new_session(2, 170), ids, 150, 20)
    assert triton._executable.why_direct == ""
    assert_close(got, expected, recipe, torch.float16)


def test_a_session_after_another_is_recorded_too():
    program = lowered_program("exact", torch.float16)
    _, triton = both(program)
    ids = prompts(program, 2, 20)
    for _ in range(3):  # memory of the recordings of the one before is gone by then
        feed(triton.new_session(2, 64), ids, 12, 8)
        gc.collect()
        assert triton._executable.why_direct == ""


def test_recordings_belong_to_a_shape_of_a_session(monkeypatch):
    monkeypatch.setattr(graphs, "LEAST_BUCKET", 32)
    program = lowered_program("kivi2", torch.float16)
    eager, triton = both(program)
    ids = prompts(program, 3, 200)
    pairs = [(eager.new_session(3, 100), triton.new_session(3, 100)) for _ in range(2)]
    reasons = []

    def decode(pair, column, rows=None):
        tokens = ids[: 3 if rows is None else len(rows), column]
        expected, got = (session.decode(tokens, rows=rows) for session in pair)
        reasons.append(triton._executable.why_direct)
        assert divergence(got, expected) <= 1e-3

    for session in pairs[0] + pairs[1]:
        session.prefill(ids[:, :28])
    for column in range(6):  # two sessions in turn; the fifth step reaches another power of two
        decode(pairs[0], column)
        decode(pairs[1], column + 7)
    first = "the first step of this shape"
    assert reasons == [first, first, *[""] * 6, first, first, "", ""]
    reasons.clear()
    for column in range(3):
        decode(pairs[0], column, rows=[2, 0])
    for session in pairs[0]:
        session.resize(max_batch_size=4, max_seq_len=300)
    for column in range(3):
        decode(pairs[0], column)
    assert reasons == [first, "", "", first, "", ""]


def test_tuning_changes_no_result(monkeypatch):
    monkeypatch.setattr(modules, "tune", autotune.tune)
    program = lowered_program("kv4", torch.float16)
    eager, triton = both(program)
    ids = prompts(program, 2, 70)
    expected = feed(eager.new_session(2, 70), ids, 60, 10)
    assert_close(feed(triton.new_session(2, 70), ids, 60, 10), expected, "kv4", torch.float16)
