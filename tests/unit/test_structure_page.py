"""benchmarks/structure_page.py: tables, and a plain word on who loses; rows of structure.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvxform.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUN = {
    "command": "python benchmarks/structure.py",
    "device": "a device",
    "driver": "1.2",
    "versions": {"torch": "2.0"},
    "commit": "abc",
    "date": "2026-01-01T00:00:00+00:00",
}
PAGE = "Words.\n\n<!-- table: {} -->\nold\n<!-- end -->\nMore words.\n"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def quality(kl):
    return {"perplexity": 10 + kl, "reference_perplexity": 10, "kl": kl, "top1_agreement": 0.9}


def row(name, size, before, after=None):
    found = {
        "key": name,
        "name": name,
        "run": 0,
        "bytes_per_token": size,
        "bits_per_source_value": size / 1000,
        "owners": 30,
        "before": quality(before),
    }
    if after is not None:
        healing = {"steps_local": 1, "steps": 2, "batch_size": 8, "window": 512, "notes": []}
        healing |= {"parameters": 5e6, "layers": [{"before": 0.5, "after": 0.25}]}
        found |= {"after": quality(after), "healing": healing, "healing_seconds": 30.0}
    return found


@pytest.fixture
def results():
    rows = [
        row("int8", 12240.0, 0.001),
        row("kv4", 6500.0, 0.05),
        row("cla2", 11520.0, 2.0, 0.04),
        row("gqa-half", 7680.0, 3.0, 0.2),
        row("cla2-kv4", 3240.0, 2.1, 0.5),
        {"key": "broken", "name": "broken", "run": 0, "error": "no"},
    ]
    rows[1]["run"] = 1
    runs = [{**RUN, "command": f"{RUN['command']} --rows {name}"} for name in ("a,b", "c")]
    return {"structure": {"runs": runs, "rows": rows}}


def fill(name, results):
    return importlib.import_module("structure_page").fill_page(PAGE.format(name), results)


def test_rows_by_bytes_with_both_figures(results):
    page = fill("quality", results)
    assert page.startswith("Words.\n\n<!-- table: quality -->\n")
    assert page.endswith("<!-- end -->\nMore words.\n")
    names = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert names == ["int8", "cla2", "gqa-half", "kv4", "cla2-kv4"]
    assert "10.000" in page
    assert "2.0000" in page
    assert "0.0400" in page
    assert page.count("a device") == 1, "runs of some rows each are one command"
    assert "--rows" not in page


def test_who_loses_is_said(results):
    page = fill("verdict", results)
    assert "`gqa-half` loses to `kv4`: KL 0.2000 and 0.0500 nats, at 1.2 times" in page
    assert "`cla2` beats `kv4`: KL 0.0400" in page
    assert "as small as `cla2-kv4`" in page
    results["structure"]["rows"].append(row("kvx-2", 3300.0, 0.02))
    page = fill("verdict", results)
    assert "`cla2-kv4` loses to `kvx-2`: KL 0.5000 and 0.0200 nats, at 1.0 times" in page


def test_training_and_missing_results(results):
    assert "5.00 M" in fill("training", results)
    assert "Not measured yet." in fill("quality", {})


def test_every_row_has_a_recipe():
    structure = importlib.import_module("structure")
    for name in structure.ROWS:
        recipe = structure.recipe_of(name)
        assert recipe.name == name
        if name in structure.PLAIN:
            assert recipe.passes[-1].name == "quantize-kv"
    tenth = structure.recipe_of("kvsharer-10").passes[0].options
    quarter = load_recipe("kvsharer-25").passes[0].options
    assert tenth == {**quarter, "share": 0.1}
