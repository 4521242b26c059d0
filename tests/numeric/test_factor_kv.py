"""factor-kv on models of many kinds, through the pipeline, sessions and ONNX."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import ALL
from family_checks import Subject, compare_export, relative, source_logits, token_ids
from onnx_tools import open_export

from kvxform.pipeline import run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.report import Report
from kvxform.runtime.model import OptimizedModel

SLOW = ("qwen2", "falcon", "llama", "phi", "stablelm", "olmo2")  # biases and groups; one KV head
FAMILIES = [  # MHA with biases, without RoPE; QK-norm
    "qwen3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", *SLOW)),
]


def recipe(*, passes: tuple[object, ...] = (), **options: object) -> Recipe:
    """Return factor-kv behind what it needs; float64 unless told otherwise."""
    options = {"dtype": "float64", **options}
    prerope = {"cache-prerope": {"allow_zero": True}}
    data = ["insert-cache", {"page-cache": {"page_size": 32}}, prerope, {"factor-kv": options}]
    return load_recipe({"version": 1, "name": "toy", "passes": [*data, *passes]})


def factored(program, wanted: Recipe, **options) -> tuple[OptimizedModel, Report]:
    text = token_ids(8, 40, seed=5)
    done, report = run_pipeline(
        program, wanted, executor=OptimizedModel, calibration=text, **{"verify": "none", **options}
    )
    return OptimizedModel(done, report=report, recipe=wanted), report


@pytest.mark.parametrize("name", FAMILIES)
def test_families_at_full_rank_and_within_the_window(name):
    subject, ids = Subject.of(ALL[name], torch.float64), token_ids(2, 40)
    expected = source_logits(subject.model, ids)
    for options, is_exact in (
        ({"k_density": 1.0, "v_density": 1.0, "recent": 0}, True),
        ({"k_density": 0.25, "v_density": 0.25, "recent": 40}, True),
        ({"k_density": 0.25, "v_density": 0.25, "recent": 20}, False),
    ):
        optimised, report = factored(subject.program, recipe(**options))
        error = relative(optimised(ids), expected)
        assert (error <= 1e-8) == is_exact, f"{options}: {error:.1e}"
        (record,) = (p for p in report.passes if p.name == "factor-kv")
        owners = len(optimised.plan.owners)
        assert record.matched == owners
        assert len(record.losses) == 2 * owners
        assert all((loss.error < 1e-6) == (options["k_density"] == 1.0) for loss in record.losses)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"k_density": 0.5, "v_density": 0.25}, marks=pytest.mark.slow),
        {"bits": 4, "recent": 3, "sink": 2},
    ],
    ids=["half", "int4"],
)
def test_onnx_holds_and_reads_the_same(options, tmp_path):
    """A package has the planned planes as inputs, and continues from them."""
    subject = Subject.of(ALL["qwen2"], torch.float32)
    optimised, _ = factored(subject.program, recipe(**{"dtype": "float32", "recent": 4, **options}))
    session = open_export(optimised.program, tmp_path)
    ids = token_ids(2, 40)
    found = session.prefill(ids[:, :37], all_logits=True)
    steps = [found, *(session.decode(ids[:, t])[:, None] for t in range(37, 40))]
    compare_export(torch.cat(steps, 1), optimised(ids), lossy=True)
    plan = optimised.plan.sites[0].key
    widths = {spec.name: spec.width for spec in plan.planes}
    assert widths == ({"codes": 4, "scale": 8, "zero": 8} if "bits" in options else {"value": 8})
    shapes = {x.name: x.shape for x in session._cache._engine.session.get_inputs()}
    for plane, width in widths.items():
        suffix = "" if plane == "value" else f"_{plane}"
        shape = shapes[f"past_key_values.0.key{suffix}"]
        assert (shape[1], shape[3]) == (1, width), "one row for both heads"


@pytest.mark.slow
def test_the_bundled_recipes_run_and_are_verified():
    for name, density, bits in (("cskv-50", 0.5, None), ("cskv-80-int4", 0.2, 4)):
        wanted = load_recipe({**load_recipe(name).to_data(), "bounds": {}})
        program = Subject.of(ALL["llama"], torch.float32).program
        program = dataclasses.replace(
            program, info=dataclasses.replace(program.info, context_length=None)
        )
        optimised, report = factored(program, wanted, verify="probe")
        codec = optimised.plan.sites[0].key.codec
        assert codec["rank"] == round(16 * density / (2 if bits else 1)) * (2 if bits else 1)
        assert (codec["inner"]["codec"] == "int") == bool(bits)
        assert report.passes[-1].cache is not None
