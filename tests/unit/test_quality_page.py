"""The quality page: blocks are filled from rows, method pages get the recipes that they name."""

from __future__ import annotations

import importlib
import json
import re
import time
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from kvxform.recipe import bundled_recipes

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
    passkey = {"length": 4096, "depths": [0.1, 0.9], "found": [1.0, 0.5], "rate": 0.75}
    passkey |= {"chosen": [1.0, 0.8], "nll": [0.1, 0.7]}
    return {
        "key": name,
        "name": name,
        "run": 0,
        "made_by": {"footprint": 0, "prefill": 0},
        "footprint": footprint if bits else None,
        "prefill": result(perplexity),
        "decode": result(perplexity, window=256),
        "attention": {"mean": 0.99} if bits else None,
        "encoding": {"build_s": 1.5, "cpu_tokens_per_s": 1000.0, "gpu_tokens_per_s": None}
        if bits
        else None,
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
    rows = [
        row("kivi2", 3.0, 21.0) | {"passkeys": []},
        row("kv4", 4.5, 20.2),
        row("source", 0, 20.0),
        failed,
    ]
    file = {"benchmark": "quality", "runs": [run], "rows": rows}
    (tmp_path / "quality.json").write_text(json.dumps(file))
    moved = [row("kv4", 4.5, 20.4), row("unknown", 4.5, 20.4), row("source", 0, 20.0)]
    file = {"benchmark": "transfer", "runs": [run], "rows": moved}
    (tmp_path / "transfer.json").write_text(json.dumps(file))
    return importlib.import_module("performance_page").read_results(tmp_path)


def load(name):
    return importlib.import_module(name)


def test_blocks_are_filled_source_first_then_by_falling_bits(results):
    text = "a\n<!-- table: summary -->\nold\n<!-- end -->\nb\n"
    filled = load("quality_page").fill_page(text, results)
    names = [line.split("|")[1].strip() for line in filled.splitlines() if line.startswith("|")]
    assert names[2:] == ["source", "kv4", "kivi2"]
    assert "+5.00%" in filled
    assert "4k 75%" in filled
    assert "a device" in filled
    assert load("quality_page").fill_page(filled, results) == filled


def test_every_table_of_the_page_can_be_made(results):
    page = load("quality_page")
    blocks = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in page.TABLES)
    filled = page.fill_page(blocks, results)
    assert page.MISSING not in filled
    assert "| kv4    | +1.00%                         | +2.00%" in filled
    assert "unknown" not in filled
    assert "- They keep it, 95 % or more: none.\n" in filled
    assert "- They lose a part, 50 % to 94 %: `kv4` (75%).\n" in filled
    assert "- Not measured: `kivi2`.\n" in filled
    assert "| kivi2  | 256    | 21.000 " in filled
    assert "| 75%   | 90%    | 100% (0.10) | 50% (0.70) |" in filled


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


def test_method_pages_are_short_and_say_what_holds():
    for path in sorted(load("quality_page").METHODS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, path.name
        assert "**Contract.**" in text, path.name
        assert "Limits.**" in text or "**Where it applies.**" in text, path.name
        assert "Recipe" in text or "Pass" in text, path.name


def test_every_recipe_of_a_method_has_a_page():
    pages = "".join(path.read_text() for path in load("quality_page").METHODS.glob("*.md"))
    plain = {"exact", "int8", "kv4"} | {n for n in bundled_recipes() if n.startswith("onnx-")}
    methods = {n.removesuffix("-kv4") for n in bundled_recipes() if n != "quarot-kv4"} - plain
    assert {n for n in methods if not re.search(rf"`{n}(-kv4)?`", pages)} == set()


def test_the_plot_is_the_same_each_time(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = load("quality_page")
    rows = [*page.rows_of(results), row("unencoded", 31.5, 20.1)]  # saves nothing: left out
    for name in ("a.svg", "b.svg"):
        page.draw_quality(rows, tmp_path / name, highlight=("kv4",))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    drawn = (tmp_path / "a.svg").read_text()
    assert "kivi2" in drawn
    assert "unencoded" not in drawn
    assert "10.00%" in drawn, "changes of 1 and 5 % have lines with a label around them"
    assert "mathdefault" not in drawn, "lines between decades have none"


def test_parts_of_rows_are_joined_and_remember_their_runs(tmp_path):
    book = load("quality").Book(tmp_path / "a.json")
    first = book.start_run({"command": "one"})
    book.add("kv4", first, {"name": "kv4", "prefill": 1})
    second = book.start_run({"command": "two"})
    load("quality").Book(tmp_path / "a.json").add("kv4", second, {"name": "kv4", "passkeys": []})
    (row,) = book.read().rows.values()
    assert row["made_by"] == {"name": 1, "prefill": 0, "passkeys": 1}
    assert (row["prefill"], row["passkeys"], row["run"]) == (1, [], 0)
    assert [run["command"] for run in book.read().runs] == ["one", "two"]


def test_rows_of_recipe_files_go_by_the_name_of_the_file():
    key = load("quality").row_key
    assert [key("recipes/int4-x.yaml"), key("kvx-4"), key("fibquant-1.5")] == [
        "int4-x",
        "kvx-4",
        "fibquant-1.5",
    ]


def test_commands_leave_places_of_this_machine_out():
    command = load("quality").public_command
    words = ["/x/quality.py", "--model", "/m.gguf", "--text", "/a/b/test.txt", "--jobs", "2"]
    assert command(words) == "python benchmarks/quality.py --text test.txt --jobs 2"


def test_what_failed_once_is_forgotten_when_it_is_there(tmp_path):
    book = load("quality").Book(tmp_path / "a.json")
    number = book.start_run({"command": "one"})
    book.add("kv4", number, {"name": "kv4", "error decode": "no"})
    book.add("kv4", number, {"name": "kv4", "decode": 1})
    (row,) = book.read().rows.values()
    assert "error decode" not in row
    assert row["made_by"] == {"name": 0, "decode": 0}


class Inline:
    """A multiprocessing context whose processes run at once, here."""

    SimpleQueue = SimpleQueue

    class Process:
        def __init__(self, target, args):
            self.start = lambda: target(*args)

        def join(self, timeout):
            assert timeout > 0

        def is_alive(self):
            return False


def test_rows_go_to_new_interpreters_each_of_them_once(monkeypatch):
    """A fork could not use CUDA once the parent has asked for a device, so none is made."""
    quality, methods, taken = load("quality"), [], []
    monkeypatch.setattr(
        quality.multiprocessing, "get_context", lambda method: methods.append(method) or Inline
    )
    monkeypatch.setattr(quality, "measure_rows", lambda names, *_: taken.append(list(names)))
    options = SimpleNamespace(jobs=2, grace=1.0)
    quality.run_side_by_side(["a", "b", "c"], None, 0, options, time.monotonic())
    assert methods == ["spawn"]
    assert sorted(name for names in taken for name in names) == ["a", "b", "c"]
    assert len(taken) == 2


def test_the_parent_of_processes_opens_no_model_and_no_device(tmp_path, monkeypatch, capsys):
    quality, asked = load("quality"), []
    for place, name in ((quality, "open_run"), (quality.torch.cuda, "_lazy_init")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("the parent must not"))
    monkeypatch.setattr(quality, "run_side_by_side", lambda names, *_: asked.extend(names))
    words = ["quality.py", "--jobs", "2", "--device", "cuda", "--formats", "source,kv4"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(tmp_path / "q.json")])
    quality.main()
    assert asked == ["source", "kv4"]
    assert len(quality.Book(tmp_path / "q.json").read().runs) == 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    models, tokenizers = load("models"), load("tiny_tokenizers")
    texts = load("kvxform.texts")
    model = models.tiny_hf("llama", vocab_size=150, head_dim=64, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "m")
    tokenizers.byte_pair_tokenizer([texts.default_text()[:20000]], 150).save_pretrained(
        tmp_path / "m"
    )
    small = ["--window", "24", "--windows", "1", "--decode-window", "8", "--passkey", ""]
    words = ["quality.py", "--model", str(tmp_path / "m"), "--formats", "source,kv4", *small]
    words += ["--json", str(tmp_path / "q.json"), "--parts", "prefill,attention,decode"]
    monkeypatch.setattr("sys.argv", [*words, "--only", "kv4", "--seconds", "1000"])
    load("quality").main()
    monkeypatch.setattr("sys.argv", [*words, "--missing", "--jobs", "2"])
    load("quality").main()
    rows = {row["key"]: row for row in json.loads((tmp_path / "q.json").read_text())["rows"]}
    assert set(rows["kv4"]["made_by"].values()) == {0}
    assert set(rows["source"]["made_by"].values()) == {1}
    assert rows["source"]["prefill"]["kl"] == 0
    assert "kv4" in capsys.readouterr().out
