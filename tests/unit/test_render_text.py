"""A diff for a terminal: the answer first, a map of all layers, changes of layers folded."""

from __future__ import annotations

import dataclasses
import re

import pytest
from diff_samples import ALL, LAYERS, recipe_change, rope_fault, same, within_limits
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.diffing.records import (
    DiffResult,
    Finding,
    LayerDiff,
    NodeChange,
    NumericDiff,
    SideSummary,
    StructureDiff,
)
from kvxform.diffing.render_text import render_text


def row(text: str, label: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {label} ")]
    return line[17 : 17 + LAYERS]


@pytest.mark.parametrize("name", ["same", "rope_fault", "over_limits"])
def test_text(golden, name):
    golden(f"diff/{name}.txt", render_text(ALL[name]) + "\n")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("same", "SAME"),
        ("bare", "SAME"),
        ("rope_fault", "DIFFERENT"),
        ("recipe_change", "DIFFERENT"),
        ("within_limits", "WITHIN LIMITS"),
        ("over_limits", "OVER LIMITS"),
    ],
)
def test_the_first_word_is_the_answer(name, word):
    assert render_text(ALL[name]).startswith(f"{word}: ")


def test_a_model_of_30_layers_is_read_at_a_glance():
    text = render_text(recipe_change())
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 110
    assert row(text, "graph") == "+" * 12 + "~" + "+" * 17
    assert row(text, "plan") == "~" * LAYERS
    assert text.count("kvx.hadamard(%, 64)  x2") == 1


def test_the_map_shows_where_errors_begin_and_how_large_they_are():
    text = render_text(rope_fault())
    assert row(text, "weights") == "·" * 7 + "~" + "·" * 22
    assert row(text, "hidden state").startswith("·" * 7 + "█")
    assert "up to 0.5, layer 7" in text


@pytest.mark.parametrize(
    ("error", "step"),
    [(0.0, "·"), (3e-12, "▁"), (3e-8, "▁"), (3e-4, "▅"), (0.3, "█"), (50.0, "█"), (None, " ")],
)
def test_a_step_of_the_map_is_a_power_of_ten(error, step):
    layers = (LayerDiff(0, error), LayerDiff(1, 1.0))
    side = SideSummary("a", "program", layers=2)
    result = DiffResult(side, side, numeric=NumericDiff("text", None, 1e-5, layers))
    (line,) = [x for x in render_text(result).splitlines() if x.startswith("  hidden state")]
    assert line[17] == step


def test_deep_models_take_several_lines():
    layers = tuple(LayerDiff(i, 0.1) for i in range(100))
    side = SideSummary("a", "program", layers=100)
    result = DiffResult(side, side, numeric=NumericDiff("text", None, 1e-5, layers))
    lines = [x[17:] for x in render_text(result).splitlines() if x.startswith("  hidden state")]
    assert lines == ["█" * 64, "█" * 36 + "  up to 0.1, layer 0"]


def test_nothing_that_differs_leaves_no_map():
    assert "layers   " not in render_text(same())


def test_colours_are_only_where_asked_for():
    plain, coloured = render_text(rope_fault()), render_text(rope_fault(), colour=True)
    assert "\x1b" not in plain
    assert "\x1b[31mDIFFERENT\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_nothing_can_control_the_terminal():
    text = render_text(ALL["hostile"])
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\ufffd[31m" in text


def test_a_long_block_is_cut():
    nodes = tuple(NodeChange("added", 0, f"op{i}", "", after=f"op{i}()") for i in range(60))
    side = SideSummary("a", "program", layers=1)
    text = render_text(DiffResult(side, side, structure=StructureDiff(nodes)))
    assert "... and 20 lines more" in text
    assert "op59" not in text


def test_limits_that_are_kept_are_named():
    assert "kept  max_kl 0.5" in render_text(within_limits())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=20)), max_size=6))
def test_any_findings_make_text(found):
    findings = tuple(Finding("rule", "warning", text, (layer,)) for layer, text in found)
    result = dataclasses.replace(same(), findings=findings)
    text = render_text(result)
    assert text.startswith("DIFFERENT" if found else "SAME")
    assert all(f"layer {layer}" in text or "layers" in text for layer, _ in found)
