"""The quality page: blocks are filled from rows, method pages get the recipes that they name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def result(perplexity, *, window=1024):
    return {
        "protocol": "x",
        "window": window,
        "perplexity": perplexity,
        "reference_perplexity": 20.0,
        "kl": 0.01,
        "top1_agreement": 0.9,
    }


def row(name, bits, perplexity):
    footprint = {"bits_long": bits, "bits_short": bits + 0.5, "bytes_short": 2048}
    passkey = {"length": 4096, "depths": [0.1, 0.9], "found": [1.0, 0.5], "nll": [0.1, 0.7]}
    return {
        "key": name,
        "name": name,
        "run": 0,
        "footprint": footprint if bits else None,
        "prefill": result(perplexity),
        "decode": result(perplexity, window=256),
        "attention": {"mean": 0.99} if bits else None,
        "encoding": {"build_s": 1.5, "tokens_per_s": 1000.0} if bits else None,
        "passkeys": [passkey],
    }


@pytest.fixture
def results(tmp_path):
    run = {
        "command": "python benchmarks/quality.py",
        "device": "a device",
        "driver": None,
        "versions": {"torch": "2.0"},
        "commit": "abc",
        "date": "2026-01-01",
    }
    failed = {"key": "hf-x", "name": "hf-x", "run": 0, "error": "no such package"}
    rows = [row("kivi2", 3.0, 21.0), row("kv4", 4.5, 20.2), row("source", 0, 20.0), failed]
    file = {"benchmark": "quality", "runs": [run], "rows": rows}
    (tmp_path / "quality.json").write_text(json.dumps(file))
    return importlib.import_module("performance_page").read_results(tmp_path)


def load(name):
    return importlib.import_module(name)


def test_blocks_are_filled_source_first_then_by_falling_bits(results):
    text = "a\n<!-- table: summary -->\nold\n<!-- end -->\nb\n"
    filled = load("quality_page").fill_page(text, results)
    names = [line.split("|")[1].strip() for line in filled.splitlines() if line.startswith("|")]
    assert names[2:] == ["source", "kv4", "kivi2"]
    assert "+5.00%" in filled
    assert "4k 1.5/2" in filled
    assert "a device" in filled
    assert load("quality_page").fill_page(filled, results) == filled


def test_every_table_of_the_page_can_be_made(results):
    page = load("quality_page")
    blocks = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in page.TABLES)
    filled = page.fill_page(blocks, results)
    assert page.MISSING not in filled
    assert "50% (0.70)" in filled


def test_method_pages_get_the_recipes_that_they_name(results):
    page = load("quality_page")
    text = "Recipe `kivi2`.\n<!-- measured -->\n<!-- /measured -->\nend\n"
    filled = page.fill_method(text, results)
    assert "| kivi2" in filled
    assert "kv4" not in filled
    assert filled.endswith("<!-- /measured -->\nend\n")
    assert page.MISSING in page.fill_method(text.replace("kivi2", "kvtuner"), results)


def test_the_pages_in_docs_are_up_to_date():
    page = load("quality_page")
    results = load("performance_page").read_results(page.RESULTS)
    stale = [path.name for path, new in page.fill_all(results).items() if new != page.read(path)]
    assert not stale, "run benchmarks/quality_page.py"


def test_the_plot_is_the_same_each_time(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = load("quality_page")
    for name in ("a.svg", "b.svg"):
        page.draw_quality(page.rows_of(results), tmp_path / name, highlight=("kv4",))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "kivi2" in (tmp_path / "a.svg").read_text()


def test_shares_of_processes_are_joined_into_one_run(tmp_path, monkeypatch):
    quality, results = load("quality"), load("results")
    monkeypatch.setattr("sys.argv", ["quality.py", "--jobs", "2", "--text", "/a/b/test.txt"])
    for number, name in enumerate(("kv4", "int8")):
        part = results.ResultFile(tmp_path / f"{number}.json", "quality")
        part.start_run({"device": "x"})
        part.add(name, {"name": name})
    quality.merge(tmp_path / "all.json", sorted(tmp_path.glob("?.json")))
    data = json.loads((tmp_path / "all.json").read_text())
    assert [(row["key"], row["run"]) for row in data["rows"]] == [("kv4", 0), ("int8", 0)]
    assert [run["command"] for run in data["runs"]] == [
        "python benchmarks/quality.py --jobs 2 --text test.txt"
    ]


def test_arguments_of_shares():
    own = load("quality").own_arguments
    assert own(["--jobs", "8", "--device", "cuda", "--json", "a", "--only", "x"]) == [
        "--device", "cuda",
    ]  # fmt: skip
