"""`verify_artifact` and its verb: all ways into a cache, every lowering, and planted faults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import cached_program
from lowered import lowered_program, recipe_for
from models import tiny_hf
from programs import apply, llama_program
from session_faults import leave_rows, physical_positions, requantise, see_the_future

import kvxform
from kvxform.cli.main import main
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.errors import ArtifactError, KvxformError
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_program import PackageWeights
from kvxform.runtime.onnx_rows import OnnxModel
from kvxform.runtime.onnx_session import OnnxSession
from kvxform.runtime.package_model import is_package, load_package_model
from kvxform.runtime.session import Session
from kvxform.verify.checking import compare_with_source
from kvxform.verify.probe import make_probe, run_source
from kvxform.verify.suites import SCHEDULES
from kvxform.verify.tolerances import tolerance_for
from kvxform.verifying import verify_artifact

INT4 = {"codec": "int", "bits": 4, "clip": 0.9}
LOSSY = {"key": INT4, "value": INT4}
RECENT = {**LOSSY, "regions": {"sink": 2, "recent": 6}}
WINDOW = {"attention": {"window": 9}}
FLOAT32 = {"dtype": torch.float32}
EXACT_PAGES = {
    "version": 1,
    "name": "exact-pages",
    "passes": ["insert-cache", {"page-cache": {"page_size": 16}}],
}


def check(target: Any, *schedules: str, **options: Any) -> Any:
    return verify_artifact(target, schedules=schedules or None, progress=False, **options)


def faulty(plant: Any) -> OptimizedModel:
    class Faulty(OptimizedModel):
        def new_session(self, *args: Any, **options: Any) -> Session:
            session = super().new_session(*args, **options)
            if session.max_batch_size > 1:
                plant(session)
            return session

    return Faulty(cached_program(LOSSY, 16, **FLOAT32))


def shared_program() -> Program:
    program = llama_program(layers=4, **FLOAT32)
    program.info = dataclasses.replace(program.info, context_length=None)
    for graph_pass in (ShareKvLayers(), InsertCache()):
        program, _ = apply(graph_pass, program)
    return program


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "out"
    return OptimizedModel(cached_program(LOSSY, 16, **FLOAT32)).save(folder)


def test_a_sound_artifact_holds_and_says_what_it_could_not_run(artifact):
    found = check(artifact, "padded", "crop-and-rewind", "ring-wrap", "shared-layers")
    assert found.is_fine
    assert {c.schedule for c in found.comparisons} == {
        "padded on both sides",
        "fork, crop and rewind",
        "all schedules",
    }
    assert set(found.left_out) == {"ring-wrap", "shared-layers"}
    assert found.is_lossy
    assert all(c.bound is not None or c.error is None for c in found.comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, LOSSY, RECENT], ids=["exact", "int4", "recent"])
def test_every_schedule_holds(options):
    found = check(OptimizedModel(cached_program(options, 16, **WINDOW)))
    assert found.is_fine, list(found.failures())
    rewind = {"crop-and-rewind"} if options is RECENT else set()
    assert set(found.left_out) == rewind | {"shared-layers"}
    ran = {c.schedule for c in found.comparisons} - {"all schedules"}
    assert ran == {SCHEDULES[key] for key in SCHEDULES if key not in found.left_out}


FAULTS = {
    "codes are encoded again": (requantise, "decode", "cached tokens"),
    "positions by page": (physical_positions, "decode", "K and V"),
    "scores": (see_the_future, "ragged", "attention"),
    "rows are not moved": (leave_rows, "batch-reorder", "lengths"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_fails_the_right_comparison(name):
    plant, schedule, words = FAULTS[name]
    failed = [c.compared for c in check(faulty(plant), schedule).failures()]
    assert any(compared.startswith(words) for compared in failed)


def test_layers_that_share_are_all_compared():
    model = OptimizedModel(shared_program())
    found = check(model, "shared-layers")
    assert found.is_fine
    assert "shared-layers" not in found.left_out

    class Swapped(OptimizedModel):
        def new_session(self, *args: Any, **options: Any) -> Session:
            session = super().new_session(*args, **options)
            logical = session.logical_cache
            session.logical_cache = lambda layer: logical(0 if layer == 3 else layer)
            return session

    (failed,) = check(Swapped(shared_program()), "shared-layers").failures()
    assert failed.compared.startswith("cached tokens")
    assert "layer 3" in failed.at


@pytest.mark.parametrize("options", [None, LOSSY], ids=["exact", "int4"])
def test_the_source_bounds_an_exact_model_and_measures_a_lossy_one(options):
    source, cached = llama_program(**FLOAT32), OptimizedModel(cached_program(options, **FLOAT32))
    probe = make_probe(source.info.vocab_size, (20,))
    tolerance = tolerance_for(torch.float32)

    def against(program: Program) -> dict[str, Any]:
        run = run_source(program, probe)
        found = compare_with_source(cached, run, probe, tolerance, is_exact=options is None)
        return {c.compared.split(",")[0]: c for c in found if "KL" not in c.compared}

    found = against(source)
    assert set(found) == {"logits", "K handed in", "V handed in"}
    assert all(c.is_fine for c in found.values())
    assert all((c.bound is None) == (options is not None) for c in found.values())
    assert all((c.error > 1e-3) == (options is not None) for c in found.values())
    name = next(name for name in source.weights if name.endswith("v.weight"))
    other = dataclasses.replace(source, weights={**source.weights, name: -source.weights[name]})
    failed = [name for name, c in against(other).items() if not c.is_fine]
    assert ("V handed in" in failed) == (options is None)


@pytest.mark.slow
def test_a_saved_model_is_compared_with_its_source_and_with_no_other(tmp_path):
    source = tiny_hf("llama")
    recipe = {"version": 1, "name": "plain", "passes": ["fuse-norms", "insert-cache"]}
    model = kvxform.optimize(source, recipe, verify="none", progress=False)
    model.save(tmp_path / "out")
    found = check(tmp_path / "out", "prefill", source=source)
    assert found.is_fine
    assert found.reference.endswith("and the source")
    bounds = [c.bound for c in found.comparisons if "against the source" in c.compared]
    assert sum(bound is not None for bound in bounds) == 3
    with pytest.raises(KvxformError, match="KVX606"):
        check(tmp_path / "out", "prefill", source=tiny_hf("gpt2"))


def test_a_package_follows_the_eager_lowering(artifact):
    schedules = ("padded", "batch-reorder", "crop-and-rewind", "page-reuse")
    found = check(artifact, *schedules, lowering="onnx")
    assert found.is_fine
    assert found.lowering == "onnx"
    assert set(found.left_out) == {"page-reuse"}
    assert sum(c.compared.startswith("cached tokens") for c in found.comparisons) == 3


@pytest.mark.slow
def test_a_package_with_exact_regions_runs_rows_of_one_length():
    found = check(OptimizedModel(cached_program(RECENT, 16, **FLOAT32)), lowering="onnx")
    assert found.is_fine
    assert set(found.left_out) == {
        "padded",
        "ragged",
        "page-reuse",
        "batch-reorder",
        "crop-and-rewind",
        "shared-layers",
        "ring-wrap",
    }


def test_a_package_that_does_something_else_fails_and_the_verb_says_so(tmp_path, capsys):
    program = cached_program(None, 16, **FLOAT32, **WINDOW)
    folder = OptimizedModel(program).save(tmp_path / "out")
    node = program.attention_node(0)
    node.kwargs = {**node.kwargs, "window": 8}
    OptimizedModel(program).export_onnx(folder / "onnx")
    words = ["verify", str(folder), "--lowering", "onnx", "--schedules", "prefill"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "of layer 1" in text  # the first that sees what the window has left out
    assert "2 of 3 comparisons failed" in text
    assert main([*words, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["is_fine"]
    assert [c["is_fine"] for c in data["comparisons"]] == [False, True, False]


STATIC = {"codec": "static-int", "bits": 8, "scale": [0.02]}
FORMS = {
    "L3 int8": ({"key": STATIC, "value": STATIC}, {"level": "L3"}),
    "weights of 4 bits": (None, {"weights": "int4"}),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_package_is_compared_with_the_program_inside_it(case, tmp_path):
    plan, options = FORMS[case]
    model = OptimizedModel(cached_program(plan, None, **FLOAT32))
    package = model.export_onnx(tmp_path / "out", OnnxOptions(**options), verify="none")
    found = check(package, "ragged", "batch-reorder")
    assert found.is_fine
    assert found.lowering == "onnx"
    assert sum(c.compared.startswith("cached tokens") for c in found.comparisons) == 2
    with pytest.raises(KvxformError, match=r"KVX801.*onnx alone"):
        check(package, lowering="eager")


def test_a_package_without_a_weight_of_its_program_is_refused(tmp_path, monkeypatch):
    model = OptimizedModel(cached_program(None, None, **FLOAT32))
    package = model.export_onnx(tmp_path / "out", verify="none")
    assert is_package(package)
    assert not is_package(tmp_path)
    monkeypatch.setattr(PackageWeights, "holds", lambda _self, name: "gate" not in name)
    with pytest.raises(ArtifactError, match=r"KVX602 .*got layers.0.mlp.gate.weight"):
        load_package_model(package)


def test_the_verb_prints_a_table_and_is_fine(artifact, capsys):
    assert main(["verify", str(artifact), "--schedules", "ragged"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("against the equations of the plan, and the model in one piece")
    assert lines[1].split() == ["schedule", "compared", "worst", "bound", "where"]
    assert lines[-1] == "everything holds"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"schedules": ["decoed"]}, "KVX801", "did you mean 'decode'"),
        ({"lowering": "cuda"}, "KVX801", "must be one of eager, triton, onnx"),
        ({"lowering": "triton"}, "KVX801", "without a recipe"),
    ],
)
def test_unknown_words_are_refused(options, code, words):
    model = OptimizedModel(cached_program(None, 16))
    with pytest.raises(KvxformError, match=words) as caught:
        verify_artifact(model, progress=False, **options)
    assert caught.value.code == code


def test_a_program_without_a_cache_is_refused():
    with pytest.raises(KvxformError, match="KVX401"):
        check(OptimizedModel(llama_program()))


def test_rows_of_a_package_go_together(artifact, tmp_path):
    model = kvxform.load(artifact)
    session = OnnxSession(model.export_onnx(tmp_path / "onnx"))
    rows = OnnxModel(model.program, session).new_session(max_batch_size=2, max_seq_len=16)
    ids = torch.randint(0, model.program.info.vocab_size, (2, 9))
    eager = model.new_session(2, 16)
    rows.prefill(ids)
    eager.prefill(ids)
    for step in (lambda s: s.reorder([1, 0]), lambda s: s.crop(7), lambda s: s.reorder([0, 0])):
        for own in (rows, eager):
            step(own)
        assert rows.sequence_lengths() == eager.sequence_lengths()
        pairs = zip(rows.stored_planes(1), eager.stored_planes(1), strict=True)
        for mine, theirs in pairs:
            assert torch.equal(mine["key"]["codes"], theirs["key"]["codes"])
    assert rows.cache_bytes() == rows.planned_bytes()
    for call in (
        lambda: rows.free([0]),
        lambda: rows.crop([3, 4]),
        lambda: rows.prefill(ids[:1], rows=[1]),
    ):
        with pytest.raises(KvxformError, match="KVX401"):
            call()
    rows.free()
    assert rows.sequence_lengths() == ()


@pytest.mark.slow
def test_kernels_are_checked_watched_and_as_they_are():
    model = OptimizedModel(lowered_program(EXACT_PAGES), recipe=recipe_for(EXACT_PAGES))
    found = check(model, "ragged")
    assert found.is_fine
    assert found.lowering == "triton"
    assert [c.compared for c in found.comparisons][-1] == "logits of replayed steps"
    assert check(model, "ragged", lowering="eager").lowering == "eager"
