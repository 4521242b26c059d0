"""`passes`, `recipes`, help and the forms of output."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvxform.cli.main import main
from kvxform.cli.output import format_bytes, plain_table
from kvxform.pass_base import PASSES
from kvxform.recipe import bundled_recipes, load_recipe


def test_passes_lists_the_registry(capsys):
    assert main(["passes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(PASSES)
    assert main(["passes", "--json"]) == 0
    data = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert data["rotate-qk"]["contract"] == "exact"
    assert data["quantize-kv"]["contract"] == "approximate"
    assert [option["name"] for option in data["page-cache"]["options"]] == ["page_size"]
    assert data["page-cache"]["options"][0]["default"] == 64
    assert all(entry["about"] and entry["source"] for entry in data.values())


def test_recipes_lists_what_is_bundled(capsys):
    assert main(["recipes", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert tuple(entry["name"] for entry in data) == bundled_recipes()
    assert [entry["about"] for entry in data] == [load_recipe(e["name"]).about for e in data]


def test_recipes_show_is_a_recipe_again(capsys, tmp_path):
    assert main(["recipes", "show", "kivi4"]) == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe("kivi4")


def test_targets_say_what_each_lowering_runs(capsys):
    assert main(["passes", "--targets", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in table.values()} == {("eager", "onnx", "triton")}
    assert table["payload"] == {
        "eager": "k, kv, latent, pair, residual",
        "onnx": "k, kv, latent",
        "triton": "kv, latent",
    }
    codecs = {name: set(names.split(", ")) for name, names in table["codecs"].items()}
    assert {"int", "none"} <= codecs["triton"] < codecs["eager"]
    assert codecs["eager"] - codecs["onnx"] == {"slerp-pair"}
    assert main(["passes", "--targets"]) == 0
    assert "bfloat16, float16, float32" in capsys.readouterr().out


def test_recipes_schema_is_json(capsys):
    assert main(["recipes", "schema"]) == 0
    assert {"passes", "bounds", "target"} <= set(json.loads(capsys.readouterr().out)["properties"])


@pytest.mark.parametrize(
    "words", [["--help"], ["recipes"], ["recipes", "schema"], ["--version"], ["plan", "--help"]]
)
def test_listings_do_not_import_torch(words):
    code = (
        "import sys; from kvxform.cli.main import main; assert main(sys.argv[1:]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_no_words_print_the_help(capsys):
    assert main([]) == 0
    assert "Usage: kvxform" in capsys.readouterr().out


def test_plain_tables_are_aligned():
    table = plain_table(("name", "n"), [("a", "1"), ("long", "100")], right=(1,))
    assert table == "name    n\na       1\nlong  100"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (288, "288 B"),
        (23040.0, "23 040 B"),
        (65536, "64.0 KiB"),
        (188743680, "180 MiB"),
        (1509949440, "1.41 GiB"),
        (3 * 1024**5, "3145728 GiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
