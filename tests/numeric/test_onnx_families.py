"""Families in every ONNX form against the eager lowering; the table of forms against the truth."""

from __future__ import annotations

import functools
from pathlib import Path

import family_table
import onnx_rows
import pytest
import torch
from families import ALL
from family_checks import Subject, ragged_prompts
from onnx_rows import CASES, COLUMNS, FormCase, OnnxRow, check_form, continued, measure, optimise
from onnx_table import read, render

from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.forms import legal_levels

QUICK = ("L0 18", "L1 24", "L3 int8")
TABLE = Path(__file__).parents[2] / "docs" / "onnx-coverage.md"


@pytest.fixture(scope="module")
def models():
    """Return what gives the model after a recipe, and its tokens."""
    subject = Subject.of(ALL["llama"], torch.float32)

    @functools.cache
    def make(recipe):
        model = optimise(subject, recipe)
        return model, continued(model)

    return make


def case_of(case):
    return pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("case", [case_of(case) for case in CASES])
def test_a_form_of_llama(case, models):
    model, tokens = models(case.recipe)
    assert dict(legal_levels(model.program, case.options))[case.level] is None
    check_form(case, model, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_row_of_the_table_is_true(name):
    assert measure(ALL[name]) == read(TABLE.read_text(encoding="utf-8"))[name]


def test_the_table_lists_the_registry_and_is_what_its_rows_render_to():
    text = TABLE.read_text(encoding="utf-8")
    rows = read(text)
    assert list(rows) == list(ALL)
    assert render(rows).split("## Named")[1] == text.split("## Named")[1]


def test_every_family_has_packages_of_levels_0_1_and_2():
    """All that run with a cache at all; the others have a reason in docs/coverage.md."""
    needed = [c.name for c in CASES if c.level in ("L0", "L1", "L2")]
    eager = family_table.read(TABLE.with_name("coverage.md").read_text(encoding="utf-8"))
    rows = read(TABLE.read_text(encoding="utf-8"))
    without = [name for name in rows if "exact" in eager[name].reasons]
    assert len(rows) - len(without) >= 60
    for row in (rows[name] for name in rows if name not in without):
        cells = dict(zip(COLUMNS, row.cells, strict=True))
        assert {cells[name] for name in needed} == {"yes"}, row.name


def test_the_table_reads_as_it_was_written():
    rows = {
        "llama": OnnxRow("llama"),
        "falcon alibi": OnnxRow("falcon alibi", {"L1 23": "a: b; c"}, {"L3": "d", "L3 int8": "d"}),
    }
    text = render(rows)
    assert read(text) == rows
    assert "| falcon alibi | yes | no | yes | - |" in text
    assert "- falcon alibi; L3, L3 int8: d\n" in text


# The checks themselves: each must see what it is there for.


def test_a_package_with_other_tokens_is_told(models, monkeypatch):
    right = Builder.ops

    def wrong(self, op_type, *inputs, **options):
        if op_type == "Attention":
            options["scale"] *= 3
        return right(self, op_type, *inputs, **options)

    monkeypatch.setattr(Builder, "ops", wrong)
    case = next(c for c in CASES if c.name == "L1 23")
    with pytest.raises(AssertionError, match=r"tokens of row 0 part after .*, at a lead of"):
        check_form(case, *models("exact"))
    monkeypatch.setattr(onnx_rows, "is_lossy", lambda *_: True)  # no lead of llama is that small
    with pytest.raises(AssertionError, match="tokens of row 0 part after"):
        check_form(case, *models("exact"))


def test_leads_are_those_of_the_tokens(models):
    """The token that eager chose led, so every lead is of the best token over the second best."""
    model, tokens = models("exact")
    found = onnx_rows.leads(model, tokens)
    assert found.shape == tokens.shape
    assert bool((found > 0).all())
    prompts, mask = ragged_prompts("left")
    logits = model(prompts, mask)[:, -1]
    assert torch.equal(logits.argmax(-1), tokens[:, 0])
    best = logits.topk(2).values
    torch.testing.assert_close(found[:, 0], (best[:, 0] - best[:, 1]) / logits.abs().amax(-1))


def test_what_is_not_legal_and_what_fails_are_told_apart(models, monkeypatch):
    cases = (FormCase("L1 23", "exact", "L1", 23), FormCase("L3", "exact", "L4", 23))
    monkeypatch.setattr(onnx_rows, "CASES", cases)
    monkeypatch.setattr(onnx_rows, "RECIPES", {"exact": {}})
    monkeypatch.setattr(onnx_rows.Subject, "of", lambda *_: None)
    monkeypatch.setattr(onnx_rows, "optimise", lambda *_: models("exact")[0])

    def fail(*_):
        raise AssertionError("first line\nsecond line")

    monkeypatch.setattr(onnx_rows, "check_form", fail)
    row = measure(ALL["llama"])
    assert row.failed == {"L1 23": "first line"}
    assert row.illegal == {"L3": "runs on cuda alone"}
    assert row.cells[:4] == ("yes", "no", "yes", "-")
