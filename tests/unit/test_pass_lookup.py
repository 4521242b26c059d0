"""Passes of installed packages: found by entry point, loaded when named, broken ones told apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from programs import llama_program

from kvxform.cli.main import main
from kvxform.errors import RecipeError
from kvxform.explain.explaining import make_question
from kvxform.ir.program import Program
from kvxform.order import plan_passes
from kvxform.pass_base import PASSES
from kvxform.pass_lookup import find_pass, installed_points, known_names, list_passes
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe
from kvxform.testing import check_pass

PASS = """
    from dataclasses import dataclass
    from typing import ClassVar

    from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, register_pass


    @register_pass
    @dataclass(frozen=True)
    class {cls}(GraphPass):
        '''Bind every weight of an output projection anew.'''

        times: int = 1
        numerics: ClassVar = EXACT
        source: ClassVar[str] = "somebody else"

        def match(self, program):
            if self.pass_name() in program.passes:
                return [NoMatch("it is bound", done=True)]
            found = [site for site in program.sites if site.o is not None]
            return [Match(s.layer) for s in found] or [NoMatch("no output projection")]

        def rewrite(self, program, match, rewriter):
            name = program.site(match.layer).o.weight
            rewriter.set_weight(name, program.weights[name].clone())
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return `install(name, code, **entry_points)`: a package as pip leaves it."""
    passes = dict(PASSES)

    def install(name: str, code: str, points: dict[str, str]) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[kvxform.passes]", *lines]))
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
        installed_points.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    installed_points.cache_clear()
    PASSES.clear()
    PASSES.update(passes)


@pytest.fixture
def rebind(install):
    """Install a good pass, `rebind-outputs`."""
    points = {"rebind-outputs": "rebinding:RebindOutputs"}
    install("rebinding", PASS.format(cls="RebindOutputs"), points)


def recipe(*steps):
    return load_recipe({"version": 1, "name": "mine", "passes": [*steps]})


def test_a_pass_is_loaded_only_when_it_is_named(rebind):
    assert "rebind-outputs" in known_names()
    assert "rebinding" not in sys.modules
    load_recipe("kv4")
    assert "rebinding" not in sys.modules
    assert find_pass("rebind-outputs").__name__ == "RebindOutputs"
    assert "rebinding" in sys.modules


def test_recipes_use_it_with_its_options(rebind):
    found = recipe({"rebind-outputs": {"times": 2}}, "insert-cache")
    program, report = plan_pipeline(llama_program(), found)
    assert isinstance(program, Program)
    assert program.passes == ("rebind-outputs", "insert-cache")
    assert report.passes[0].matched == 2
    with pytest.raises(RecipeError, match=r"KVX102 \[rebind-outputs\].*did you mean 'times'"):
        recipe({"rebind-outputs": {"time": 2}})


def test_explain_and_check_pass_know_it(rebind):
    (planned,) = make_question("rebind-outputs", None).passes
    assert planned.name == "rebind-outputs"
    assert check_pass("rebind-outputs", examples=1, new_process=False).applied == 1


def test_an_unknown_name_gets_the_nearest_hint(rebind):
    with pytest.raises(RecipeError, match=r"KVX104.*did you mean 'rebind-outputs'"):
        recipe("rebind-output")


def test_the_list_says_where_each_comes_from(rebind, install, capsys):
    install("broken", "import no_such_module", {"lost": "broken:Lost"})
    origins = {entry.name: entry for entry in list_passes()}
    assert origins["rotate-v"].origin == "kvxform"
    assert origins["rebind-outputs"].origin == "rebinding 1.2"
    assert "No module named 'no_such_module'" in origins["lost"].error
    assert main(["passes"]) == 0
    shown = capsys.readouterr()
    lines = {line.split()[0]: line for line in shown.out.splitlines()}
    assert lines["rebind-outputs"].endswith("rebinding 1.2")
    assert "lost" not in lines
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("KVX221 [lost] the module must be importable")
    assert main(["passes", "--json"]) == 0
    data = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert data["rebind-outputs"]["origin"] == "rebinding 1.2"
    assert data["lost"]["error"].startswith("KVX221")


@pytest.mark.parametrize(
    ("code", "value", "words"),
    [
        ("1 / 0", "odd:Odd", "ZeroDivisionError: division by zero"),
        ("Odd = 3", "odd:Odd", "must be a class derived from GraphPass, not 3"),
        ("", "odd:Odd", "has no attribute 'Odd'"),
        (PASS.format(cls="OtherName"), "odd:OtherName", "must be that of the pass, 'other-name'"),
        (
            "from kvxform.pass_base import GraphPass\nclass Odd(GraphPass): pass",
            "odd:Odd",
            "must be a dataclass with match and rewrite",
        ),
    ],
)
def test_a_broken_package_gives_one_clear_line(install, code, value, words):
    install("odd", code, {"odd": value})
    before = dict(PASSES)
    with pytest.raises(RecipeError) as found:
        recipe("odd")
    assert str(found.value).startswith("KVX221 [odd] ")
    assert words in str(found.value)
    assert "odd 1.2" in str(found.value)
    assert "\n" not in str(found.value)
    assert before == PASSES, "what it registered is gone"
    assert plan_passes(load_recipe("kv4").passes, llama_program().facts, auto_order=False)


def test_a_package_cannot_take_the_place_of_our_pass(install):
    own = PASSES["rotate-v"]
    install("taker", PASS.format(cls="RotateV"), {"mine": "taker:RotateV"})
    with pytest.raises(RecipeError, match=r"KVX222 \[rotate-v\].*kvxform and taker 1\.2"):
        find_pass("mine")
    assert PASSES["rotate-v"] is own
    assert find_pass("rotate-v") is own


def test_a_package_that_claims_the_name_of_ours_is_told_off(install):
    install("claimer", PASS.format(cls="RotateV"), {"rotate-v": "claimer:RotateV"})
    ours, theirs = sorted((e for e in list_passes() if e.name == "rotate-v"), key=lambda e: e.error)
    assert (ours.origin, ours.error) == ("kvxform", "")
    assert theirs.error.startswith("KVX222 [rotate-v]")
    assert "claimer" not in sys.modules


def test_two_packages_with_one_name_are_refused(install):
    for name in ("first", "second"):
        install(name, PASS.format(cls="SameName"), {"same-name": f"{name}:SameName"})
    with pytest.raises(RecipeError, match=r"KVX222 \[same-name\].*first 1\.2 and second 1\.2"):
        find_pass("same-name")
    errors = [entry.error for entry in list_passes() if entry.name == "same-name"]
    assert errors[0].startswith("KVX222")


def test_the_pass_of_the_documentation_keeps_its_promises(install):
    text = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "GraphPass)" in b]
    install("documented", code, {"rebind-outputs": "documented:RebindOutputs"})
    assert check_pass("rebind-outputs", examples=2, new_process=False).applied == 2


def test_importing_kvxform_looks_for_no_package():
    code = "import kvxform, sys; sys.exit('kvxform.pass_lookup' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
