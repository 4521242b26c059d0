"""The Triton lowering in Triton's interpreter, against the eager lowering and the equations."""

from __future__ import annotations

import pytest
import torch
from lowered import (
    SMALL_KIVI,
    assert_same_cache,
    both,
    divergence,
    lowered_program,
    prompts,
    recipe_for,
    relative,
)
from models import tiny_hf
from programs import latent_program, llama_program

import kvxform
from kvxform.codegen.triton import prefilling
from kvxform.codegen.triton.decoding import Decoding
from kvxform.codegen.triton.lowering import TritonExecutable
from kvxform.codegen.triton.prefilling import Prefilling
from kvxform.pipeline import run_pipeline
from kvxform.runtime.model import OptimizedModel
from kvxform.verify import prober
from kvxform.verify.cache_state import check_schedule
from kvxform.verify.probe import make_probe, run_source
from kvxform.verify.schedules import full_schedules, row_schedules
from kvxform.verify.tolerances import TOLERANCES

pytestmark = pytest.mark.triton

INT8_AND_SINK = {
    "version": 1,
    "name": "sink",
    "passes": [
        "cache-latent",
        "insert-cache",
        "rotate-qk",
        {
            "quantize-kv": {
                "key": {"codec": "int", "bits": 8},
                "value": None,
                "regions": {"sink": 3},
            }
        },
    ],
}
ONE = {"layers": 1, "heads": 2, "kv_heads": 1}  # a step of it takes the interpreter half a second
FLOAT32 = TOLERANCES[torch.float32]
RECIPES = {"exact": "exact", "int8": "int8", "kv4": "kv4", "small-kivi": SMALL_KIVI}


def names(recipes):
    return pytest.mark.parametrize("recipe", [RECIPES[n] for n in recipes], ids=recipes)


def run_both(program, prompt=44, steps=2):
    """Feed the same to both: a ragged prompt in two chunks, then single tokens."""
    eager, triton = both(program)
    ids = prompts(program, 2, prompt + steps)
    mask = torch.ones_like(ids[:, :prompt])
    mask[1, : prompt // 3] = 0
    found = []
    for model in (eager, triton):
        session = model.new_session(2, prompt + steps)
        logits = [session.prefill(ids[:, :prompt], mask, chunk_size=prompt - 5)]
        logits += [session.decode(ids[:, prompt + i]) for i in range(steps)]
        found.append((session, torch.cat(logits)))
    return (*found[1], *found[0])


@names(["exact", "kv4", "small-kivi"])
def test_triton_gives_what_eager_gives(recipe):
    got_session, got, session, expected = run_both(lowered_program(recipe, **ONE))
    if recipe == "exact":
        assert relative(got, expected) <= 1e-5
    assert divergence(got, expected) <= 1e-6
    assert_same_cache(got_session, session, 1e-2)


@pytest.mark.parametrize(
    "recipe", ["kv4", pytest.param("exact", marks=pytest.mark.slow), INT8_AND_SINK], ids=str
)
def test_a_latent_is_stored_once_and_read_twice(recipe):
    source = latent_program(dtype=torch.float32, layers=1, heads=2)
    program = lowered_program(recipe, source=source)
    (site,) = program.plan.sites
    assert site.payload == "latent"
    got_session, got, session, expected = run_both(program, 20)
    if recipe == "exact":
        assert relative(got, expected) <= 1e-5
    assert divergence(got, expected) <= 1e-6
    assert got_session.cache_bytes() == session.cache_bytes() == program.plan.bytes_at([22, 16], 22)
    for held, wanted in zip(
        got_session.logical_cache(0).k, session.logical_cache(0).k, strict=True
    ):
        assert relative(held, wanted) <= 1e-2


@pytest.mark.slow
@names(RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_layers_of_every_recipe(recipe, dtype):
    program = lowered_program(recipe, dtype, heads=2, kv_heads=1)
    got_session, got, session, expected = run_both(program, 70, 4)
    bound = TOLERANCES[dtype]
    if recipe == "exact":
        assert relative(got, expected) <= bound.logits
    assert divergence(got, expected) <= bound.lossy_kl
    assert_same_cache(got_session, session, 5e-2)


def test_norms_and_tables():
    key = {"codec": "token-norm", "inner": {"codec": "int", "axis": "channel", "group": 32}}
    options = {
        "key": key,
        "value": {"codec": "lloyd-max", "levels": 16},
        "key_regions": {"recent": 32, "flush": "block"},
    }
    passes = ["insert-cache", {"page-cache": {"page_size": 32}}, "rotate-qk"]
    recipe = {"version": 1, "name": "m", "passes": [*passes, {"quantize-kv": options}]}
    program = lowered_program(recipe, heads=2, kv_heads=2, layers=1)
    got_session, got, session, expected = run_both(program)
    assert divergence(got, expected) <= 1e-4
    assert_same_cache(got_session, session, 5e-2)


def test_a_contiguous_cache_is_pages_side_by_side():
    recipe = {"version": 1, "name": "contiguous", "passes": ["insert-cache"]}
    got_session, got, session, expected = run_both(lowered_program(recipe, **ONE), steps=1)
    assert relative(got, expected) <= 1e-5
    assert_same_cache(got_session, session, 1e-5)
    for each in (session, got_session):
        each.resize(max_seq_len=200)  # more pages of the kernels to a page of the session
    assert_same_cache(got_session, session, 1e-5)
    ids = torch.tensor([3, 4])
    assert relative(got_session.decode(ids), session.decode(ids)) <= 1e-5


def test_long_prompts_are_attended_in_slices_of_rows(monkeypatch):
    program = lowered_program(SMALL_KIVI, **ONE)
    ids = prompts(program, 3, 40)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    _, triton = both(program)
    whole = triton.new_session(3, 50).prefill(ids, mask)
    row_bytes = 40 * 2 * 64 * 4
    monkeypatch.setattr(prefilling, "DENSE_BYTES", 2 * row_bytes)
    gathered = []
    gather = Prefilling._gather
    monkeypatch.setattr(
        Prefilling, "_gather", lambda *args: gathered.append(args[3].batch_size) or gather(*args)
    )
    assert relative(triton.new_session(3, 50).prefill(ids, mask), whole) <= 1e-6
    assert gathered == [2, 1]


@pytest.mark.parametrize(
    "attention",
    [
        {"window": 9, "softcap": 3.0, "sink_logits": torch.tensor([0.4, -1.0])},
        {"chunk": 16, "alibi_slopes": torch.tensor([0.3, 0.05])},
    ],
    ids=["window, softcap, sinks", "chunks, alibi"],
)
def test_options_of_scores(attention):
    program = lowered_program("int8", attention=attention, **ONE)
    plain = lowered_program("int8", **ONE)
    _, got, _, expected = run_both(program, 30, 1)
    assert relative(got, expected) <= 1e-4
    assert relative(run_both(plain, 30, 1)[3], expected) > 1e-2, "options matter"


def test_a_reader_reads_the_cache_of_its_owner():
    program = lowered_program(SMALL_KIVI, heads=2, kv_heads=1)
    append = program.append_node(1)
    append.replace_all_uses_with(program.append_node(0))
    program.graph.erase_node(append)
    program.plan = program.plan.replace_site(1, owner=0)
    got_session, got, session, expected = run_both(program, 40, 2)
    assert relative(got, expected) <= 1e-4
    assert_same_cache(got_session, session, 1e-3)


def test_rows_are_moved_forked_and_freed():
    program = lowered_program(SMALL_KIVI, **ONE)
    sessions = []
    for model in both(program):
        session = model.new_session(3, 90)
        session.prefill(prompts(program, 2, 70), torch.ones(2, 70, dtype=torch.int64))
        session.reorder([1, 0, 1])
        session.decode(torch.tensor([5, 6, 7]))  # the forks part, on pages of their own
        session.free([0])
        sessions.append(session)
    assert_same_cache(sessions[1], sessions[0], 1e-4)
    twin = sessions[1].copy()
    twin.free()
    assert_same_cache(sessions[1], sessions[0], 1e-4)


@pytest.mark.parametrize(
    ("launcher", "new"), [(Decoding, [9]), (Prefilling, [9, 8, 7])], ids=["decode", "prefill"]
)
def test_a_step_that_fails_leaves_no_trace(monkeypatch, launcher, new):
    program = lowered_program(SMALL_KIVI, **ONE)
    _, triton = both(program)
    session = triton.new_session(1, 90)
    session.prefill(prompts(program, 1, 63))  # the next token encodes a block of keys
    before = session.logical_cache(0)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "attend", fail)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(torch.tensor([new]))
    assert session.sequence_lengths() == (63,)
    after = session.logical_cache(0)
    for kept, found in zip(before.k + before.v, after.k + after.v, strict=True):
        assert torch.equal(kept, found)


@names(["kv4", "small-kivi"])
def test_state_by_the_equations(recipe):
    source = llama_program(dtype=torch.float32, head_dim=64, **ONE)
    _, triton = both(lowered_program(recipe, **ONE))
    probe = make_probe(48, (40, 20))
    schedule = prober.probe_schedule(probe.lengths, 1)
    check = check_schedule(triton, schedule, probe, run_source(source, probe), torch.float32)
    check.require(FLOAT32, recipe if isinstance(recipe, str) else "kivi")
    assert check.is_lossy
    assert check.read_error > 0, "reads were compared"


@pytest.mark.slow
@names(RECIPES)
def test_every_schedule(recipe):
    source = llama_program(dtype=torch.float32, head_dim=64, **ONE)
    _, triton = both(lowered_program(recipe, **ONE))
    probe = make_probe(48, (80, 50, 24, 80))
    probe.input_ids[3, :40] = probe.input_ids[0, :40]
    run = run_source(source, probe)
    schedules = (
        *full_schedules(probe.lengths[:3], 6),
        *row_schedules(triton.plan, probe.lengths, 40, 4),
    )
    for schedule in schedules:
        check = check_schedule(triton, schedule, probe, run, torch.float32)
        check.require(FLOAT32, schedule.name)


def test_generate_and_huggingface_run_on_it():
    program = lowered_program("exact", **ONE)
    eager, triton = both(program)
    ids = prompts(program, 2, 9)
    expected = eager.generate(ids, max_new_tokens=3)
    assert torch.equal(triton.generate(ids, max_new_tokens=3), expected)
    adapter = triton.as_huggingface()
    assert torch.equal(adapter.generate(ids, max_new_tokens=3, do_sample=False), expected)


def test_pipeline_compares_the_target_with_eager(monkeypatch):
    monkeypatch.setattr(prober, "PROBE_LENGTHS", (12, 7))
    recipe = recipe_for("int8")
    program = llama_program(dtype=torch.float32, head_dim=64, **ONE)

    def lowered(finished):
        return OptimizedModel(finished, recipe=recipe)

    stages = []
    _, report = run_pipeline(
        program,
        recipe,
        executor=OptimizedModel,
        lowered=lowered,
        progress=lambda stage: stages.append(stage.name),
    )
    assert report.lowering is not None
    assert (report.lowering.name, report.lowering.metric) == ("triton", "kl")
    assert report.lowering.vs_eager.kl <= report.lowering.tolerance
    assert report.lowering.cache.schedules == ("ragged prefill and decode",)
    assert stages[-1] == "target triton"
    assert type(report).from_json(report.to_json()).lowering is not None


def test_optimize_save_and_load(monkeypatch, tmp_path):
    monkeypatch.setattr(prober, "PROBE_LENGTHS", (10, 6))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_hf("llama", head_dim=64, dtype=torch.float32, **sizes)
    opt = kvxform.optimize(model, "int8", target="triton", progress=False)
    assert opt.report.recipe["target"] == {"lowering": "triton"}
    assert opt.report.lowering.cache.read_error <= FLOAT32.reads
    opt.save(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = kvxform.load(tmp_path / "out")
    assert isinstance(loaded._executable, TritonExecutable)
    assert torch.equal(loaded(ids), opt(ids))
    eager = kvxform.load(tmp_path / "out", target="eager")
    assert relative(loaded(ids), eager(ids)) <= 1e-4
