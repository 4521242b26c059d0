"""Bisect on planted faults: pass, site, operation, and a folder that shows the fault alone."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import faulty_passes
import pytest
import torch
from programs import assert_untouched, latent_program, llama_program, snapshot, token_ids

import kvxform
from kvxform.bisecting.records import BisectResult
from kvxform.bisecting.replaying import load_passes
from kvxform.errors import KvxformError
from kvxform.ir.program import Program
from kvxform.pass_base import PASSES

ROOT = Path(__file__).parents[2]
ATTENTION, MLP = "layers.1.attn", "layers.1.mlp"


@dataclass(frozen=True)
class Plant:
    """A faulty pass, and what must be said of it.

    Attributes:
        cls: The pass.
        recipe: Name, or passes, of a recipe with it.
        code: How it fails.
        changed: Words of a line that says what is wrong.
        operations: At most so many are left.
        steps: Passes that are left.
        good: File of the pass without the fault.
        module: Where it fails.
        options: Of the model.
    """

    cls: type
    recipe: Any
    code: str
    changed: str
    operations: int
    steps: int = 1
    good: str = ""
    module: str = ATTENTION
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.cls.pass_name()


PLANTS = [
    Plant(
        faulty_passes.RotateV,
        "kv4",
        "KVX212",
        "weight v of layer 1",
        operations=11,
        good="passes/rotation/rotate_v.py",
    ),
    Plant(
        faulty_passes.RotateQk,
        "kv4",
        "KVX212",
        "kvx.hadamard",
        operations=3,
        good="passes/rotation/rotate_qk.py",
    ),
    Plant(
        faulty_passes.FuseNorms,
        "kv4",
        "KVX212",
        "weight layers.*.mlp",
        operations=6,
        good="passes/rotation/fuse_norms.py",
        module=MLP,
    ),
    Plant(
        faulty_passes.InsertCache,
        "exact",
        "KVX212",
        "window",
        operations=3,
        good="passes/base/insert_cache.py",
        options={"attention": {"window": 9}},
    ),
    Plant(
        faulty_passes.PageCache,
        "exact",
        "KVX215",
        "",
        operations=20,
        steps=2,
        good="passes/memory/page_cache.py",
    ),
    Plant(
        faulty_passes.SwapHeads,
        ["fuse-norms", "swap-heads", "insert-cache"],
        "KVX212",
        "weight v of layer 1",
        operations=25,
    ),
    Plant(faulty_passes.FoldScale, ["fold-scale", "insert-cache"], "KVX212", "scale", operations=8),
    Plant(faulty_passes.BreakDown, ["break-down"], "ZeroDivisionError", "", operations=2),
    Plant(faulty_passes.MistypeHeads, ["mistype-heads"], "KVX215", "", operations=2),
]
QUICK = ("rotate-qk", "break-down")
CODEC = {"codec": "int", "bits": 4}
INT4 = ["insert-cache", {"quantize-kv": {"key": CODEC, "value": CODEC}}]


def small(layers: int = 3, **options: Any) -> Program:
    program = llama_program(layers=layers, dtype=torch.float64, **options)
    program.info = dataclasses.replace(program.info, context_length=None)
    return program


def recipe_of(passes: Any) -> Any:
    if isinstance(passes, str):
        return passes
    return {"version": 1, "name": "planted", "passes": passes}


def bisect(plant: Plant, monkeypatch: pytest.MonkeyPatch, out: Path | None = None) -> BisectResult:
    monkeypatch.setitem(PASSES, plant.name, plant.cls)
    program = small(**plant.options)
    return kvxform.bisect(program, recipe_of(plant.recipe), out=out, progress=False)


def exit_code(script: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Run a script in this process, so that torch is not imported once more."""
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


def check(plant: Plant, found: BisectResult) -> None:
    assert found.pass_name == plant.name
    assert found.failure.startswith(plant.code)
    (culprit,) = found.culprits
    assert culprit.module == plant.module
    assert culprit.layers == ((1,) if plant.module == ATTENTION else ())
    part = found.subgraph
    assert part is not None
    assert part.nodes <= plant.operations < part.nodes_before
    assert len(part.steps) == plant.steps
    assert part.failure.startswith(plant.code)
    assert any(plant.changed in change for change in part.changes) or not plant.changed
    assert plant.module in part.output
    assert found.note == ""


@pytest.mark.parametrize(
    "plant",
    [pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.slow) for p in PLANTS],
)
def test_planted_faults_are_found_and_shown_alone(plant, monkeypatch, tmp_path, capsys):
    found = bisect(plant, monkeypatch, tmp_path / "repro")
    check(plant, found)
    assert found.repro == tmp_path / "repro"
    assert exit_code(found.repro / "repro.py", monkeypatch) == 1
    assert plant.code in capsys.readouterr().out
    if plant.good:
        assert exit_code(found.repro / "repro.py", monkeypatch, str(ROOT / plant.good)) == 0
        assert "no fault" in capsys.readouterr().out


@pytest.mark.slow
def test_a_repro_runs_in_a_process_of_its_own_without_the_tests(monkeypatch, tmp_path):
    plant = PLANTS[0]
    found = bisect(plant, monkeypatch, tmp_path / "repro")
    assert found.repro is not None
    for words, expected in (([], 1), ([str(ROOT / plant.good)], 0), (["none.py"], 2)):
        command = [sys.executable, str(found.repro / "repro.py"), *words]
        run = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert run.returncode == expected, run.stdout + run.stderr


def test_faults_at_two_sites_are_both_found_the_costlier_first(monkeypatch):
    monkeypatch.setattr(faulty_passes, "LAYERS", (0, 2))
    found = bisect(PLANTS[0], monkeypatch)
    assert sorted(culprit.layers for culprit in found.culprits) == [(0,), (2,)]
    first, second = (culprit.cost or 0.0 for culprit in found.culprits)
    assert first > second > 0
    assert "layers 0, 2" in found.where


@pytest.fixture(scope="module")
def usual_kl() -> float:
    """KL of int4 without a fault, which any wider bound allows."""
    plain = kvxform.bisect(small(), recipe_of(INT4), bound={"max_kl": 1.0}, progress=False)
    assert plain.is_clean
    kl = plain.stages[-1].kl
    assert kl is not None
    return kl


def test_a_bound_is_traced_to_the_layer_that_breaks_it(usual_kl, monkeypatch, tmp_path):
    monkeypatch.setitem(PASSES, "quantize-kv", faulty_passes.QuantizeKv)
    limits, out = {"max_kl": 1.5 * usual_kl}, tmp_path / "repro"
    found = kvxform.bisect(small(), recipe_of(INT4), bound=limits, out=out, progress=False)
    assert found.pass_name == "quantize-kv"
    assert found.failure.startswith("KVX501")
    assert [culprit.layers for culprit in found.culprits] == [(1,)]
    assert found.subgraph is not None
    assert any("key codec of layer 1" in c and "clip=0.1" in c for c in found.subgraph.changes)
    assert exit_code(out / "repro.py", monkeypatch) == 1
    good = ROOT / "passes/quantize/quantize_kv.py"
    assert exit_code(out / "repro.py", monkeypatch, str(good)) == 0


def test_layers_that_break_a_bound_together_are_ranked_by_cost(usual_kl):
    limits = {"max_kl": usual_kl / 2}
    found = kvxform.bisect(small(), recipe_of(INT4), bound=limits, progress=False)
    costs = [culprit.cost or 0.0 for culprit in found.culprits]
    assert found.pass_name == "quantize-kv"
    assert costs == sorted(costs, reverse=True)
    assert all(cost > 0 for cost in costs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "last"),
    [
        ("kv4", "quantize-kv"),
        ("gqa-svd-half-kv4", "merge-kv-heads"),
        ("cla2-kv4", "share-kv-layers"),
        ("kvx-2", "klt"),
        ("minicache", "merge-layer-pairs"),
    ],
)
def test_every_kind_of_method_can_be_shown_alone(recipe, last, monkeypatch, tmp_path):
    program = latent_program(layers=3) if recipe == "kv4" else small(4)
    program.info = dataclasses.replace(program.info, context_length=None)
    text = token_ids(program, 8, 64)
    out = tmp_path / "repro"
    found = kvxform.bisect(
        program, recipe, bound={"max_kl": 1e-9}, calibration=text, out=out, progress=False
    )
    assert found.pass_name == last
    assert found.culprits
    assert found.subgraph is not None
    assert found.subgraph.nodes < found.subgraph.nodes_before / 4
    assert exit_code(out / "repro.py", monkeypatch) == 1


def test_a_recipe_without_a_fault_is_clean_and_writes_nothing(tmp_path):
    program = small(2)
    before = snapshot(program)
    found = kvxform.bisect(program, "exact", out=tmp_path / "repro", progress=False)
    assert found.is_clean
    assert found.culprits == ()
    assert not any(stage.is_failing for stage in found.stages)
    assert not (tmp_path / "repro").exists()
    assert_untouched(program, before)


def test_two_runs_write_the_same_bytes(monkeypatch, tmp_path):
    plant = PLANTS[-2]
    assert plant.name == "break-down"
    for run in ("a", "b"):
        bisect(plant, monkeypatch, tmp_path / run)
    first = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert len(first) >= 8
    for path in first:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    data = json.loads((tmp_path / "a" / "kvxform.json").read_text())
    assert data["pass_name"] == "break-down"


def test_what_users_do_wrong_is_no_fault_of_a_pass(tmp_path):
    with pytest.raises(KvxformError, match=r"KVX511 .* did you mean 'max_kl'"):
        kvxform.bisect(small(1), "kv4", bound={"max_lk": 0.1}, progress=False)
    with pytest.raises(KvxformError, match="KVX213"):
        kvxform.bisect(small(1), recipe_of(["page-cache"]), progress=False)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(KvxformError, match="KVX601"):
        kvxform.bisect(small(1), "kv4", out=tmp_path, progress=False)


def test_a_file_that_defines_no_such_pass_is_refused(tmp_path):
    (tmp_path / "other.py").write_text("X = 1\n")
    with pytest.raises(KvxformError, match=r"KVX801 .* must define the pass rotate-v"):
        load_passes("other.py", tmp_path, "rotate-v")
    with pytest.raises(KvxformError, match=r"KVX801 .* must come from a Python file"):
        load_passes("none.py", tmp_path, "rotate-v")


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("RotateV", "rotation/rotate_v.py"),
        ("RotateQk", "rotation/rotate_qk.py"),
        ("QuantizeKv", "quantize/quantize_kv.py"),
    ],
)
def test_faults_deep_in_smollm2_are_found(name, good, monkeypatch, tmp_path):
    cls = getattr(_passes_with_fault_at(17, tmp_path), name)
    monkeypatch.setitem(PASSES, cls.pass_name(), cls)
    out = tmp_path / "repro"
    found = kvxform.bisect("smollm2-135m", "kv4", out=out, progress=False)
    assert found.pass_name == cls.pass_name()
    assert [culprit.layers for culprit in found.culprits] == [(17,)]
    assert exit_code(out / "repro.py", monkeypatch) == 1
    assert exit_code(out / "repro.py", monkeypatch, str(ROOT / "passes" / good)) == 0
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) < 16 << 20


def _passes_with_fault_at(layer: int, folder: Path) -> ModuleType:
    """Return the faulty passes from a file of their own, which repro folders copy."""
    import importlib.util

    text = Path(faulty_passes.__file__).read_text()
    path = folder / "deep_faults.py"
    path.write_text(text.replace("LAYERS = (1,)", f"LAYERS = ({layer},)"))
    spec = importlib.util.spec_from_file_location("deep_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deep_faults"] = module
    spec.loader.exec_module(module)
    return module
