"""README and CONTRIBUTING say what is true: the code block runs, tables and paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import write_llama

import kvxform.passes  # noqa: F401  (fills the registry)
from kvxform.pass_base import PASSES
from kvxform.recipe import bundled_recipes, load_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def python_block() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    model = write_llama(tmp_path / "model")
    block = python_block()
    assert block.count('"smollm2-135m"') == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.replace('"smollm2-135m"', repr(str(model))), names)
    assert capsys.readouterr().out.splitlines()[0] == "144.0 4.5"
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out-onnx" / "model.onnx").is_file()
    assert names["ids"].shape == (1, len("The capital of France is") + 16)
    assert names["again"].plan == names["opt"].plan


def test_the_table_of_passes_is_the_registry():
    rows = re.findall(
        r"^\| `([a-z-]+)` \| ([\w ]+) \|.*\| (.*) \|$", read("passes.md"), re.MULTILINE
    )
    assert {name: contract for name, contract, _ in rows} == {
        name: cls.numerics.exactness.value for name, cls in PASSES.items()
    }
    for name, _, source in rows:
        for number in re.findall(r"arXiv [\d.]+", source):
            assert number in PASSES[name].source, f"{name}: {number}"


def test_the_table_of_recipes_is_what_they_say_of_themselves():
    rows = re.findall(r"^\| `([a-z0-9.-]+)` \| (.*) \|$", read("recipes.md"), re.MULTILINE)
    assert dict(rows) == {name: load_recipe(name).about for name in bundled_recipes()}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if not x.startswith("http")]
    for link in links:
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    folders = "passes|codegen|kvxform|tests|docs|examples|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
