"""What all renderers share: the verdict, cells of layers, figures."""

from __future__ import annotations

import dataclasses

import pytest
from diff_samples import ALL, LAYERS, bare, over_limits, recipe_change, rope_fault, same

from kvxform.diffing.digest import (
    figure_rows,
    layer_cells,
    layer_count,
    layer_words,
    ranked,
    side_words,
    verdict,
)
from kvxform.diffing.records import Finding, LayerDiff, MetricChange, SideSummary


@pytest.mark.parametrize("name", ALL)
def test_the_tone_is_bad_only_where_ci_fails(name):
    result = ALL[name]
    tone = verdict(result).tone
    assert (tone == "good") == result.is_same
    assert result.exit_code == 1 or tone != "bad"


def test_the_verdict_names_what_is_worst_first():
    assert verdict(recipe_change()).sentence == (
        "layer 12: attention window none -> 128; and 2 more; 77 % of next tokens stay"
    )
    assert verdict(over_limits()).sentence == "limit max_kl 0.1 is exceeded: got 0.213"


def test_a_verdict_does_not_claim_what_was_not_compared():
    assert "neither graphs nor outputs" in verdict(bare()).sentence
    no_run = dataclasses.replace(same(), numeric=None)
    assert verdict(no_run).sentence == "graphs are equal but for rounding and names"


def test_findings_that_name_no_cause_stand_behind_those_that_do():
    general = Finding("operations", "warning", "op added", (0,))
    cause = Finding("codec", "warning", "4 -> 2 bits", (0,))
    note, fault = Finding("moved", "note", "lines"), Finding("window", "error", "8 -> 7", (1,))
    assert ranked([note, general, cause, fault]) == [fault, cause, general, note]


def test_cells_say_what_differs_in_each_layer():
    cells = layer_cells(recipe_change())
    assert len(cells) == LAYERS
    assert [cells[12].graph, cells[13].graph] == ["~", "+"]
    assert [cells[12].operations, cells[13].operations] == [3, 2]
    assert [f.rule for f in cells[12].findings] == ["window", "codec", "operations"]
    assert cells[0].plan == 2
    assert not cells[0].is_same
    assert cells[29].error == 0.3
    quiet = layer_cells(rope_fault())
    assert quiet[3].is_same
    assert quiet[7].weights == 1


def test_layers_that_one_side_alone_has_count():
    result = dataclasses.replace(
        recipe_change(), a=SideSummary("a", "onnx"), b=SideSummary("b", "onnx", layers=2)
    )
    assert layer_count(result) == LAYERS
    more = LayerDiff(40, 0.5)
    numeric = dataclasses.replace(result.numeric, layers=(more,))
    assert layer_cells(dataclasses.replace(result, numeric=numeric))[40].numbers == more


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "outside of layers"),
        ((3,), "layer 3"),
        ((0, 1, 2, 5), "layers 0-2, 5"),
        ((0, 1, 2, 3, 4, 5), "all 6 layers"),
    ],
)
def test_layers_in_words(layers, words):
    assert layer_words(layers, 6) == words


@pytest.mark.parametrize(
    ("name", "before", "after", "cells"),
    [
        ("kv_bytes_per_token", 6480.0, 3600.0, ("6 480 B", "3 600 B", "1.80x less")),
        ("kv_bytes_per_token", 2.0**20, 3.0 * 2**20, ("1 MiB", "3 MiB", "3.00x more")),
        ("bits_per_value", 4.0, 4.5, ("4.00", "4.50", "+12.5 %")),
        ("parameters", 12345678.0, 12345678.0, ("12 345 678", "12 345 678", "same")),
        ("flops_per_token", None, 10.0, ("unknown", "10", "")),
        ("read_bytes", 0.0, 5.0, ("0 B", "5 B", "")),
    ],
)
def test_figures_have_units_and_say_how_much_they_changed(name, before, after, cells):
    result = dataclasses.replace(same(), metrics=(MetricChange(name, before, after),))
    (row,) = figure_rows(result)
    text = tuple(x.replace("\N{NARROW NO-BREAK SPACE}", " ") for x in (row.before, row.after))
    assert (*text, row.change) == cells


def test_what_neither_side_can_tell_is_left_out():
    metrics = (MetricChange("flops_per_token", None, None),)
    assert figure_rows(dataclasses.replace(same(), metrics=metrics)) == []


def test_a_side_says_what_it_is():
    assert side_words(SideSummary("x", "lock", "m", "kv4", 1, 2000)) == (
        "m, kv4 (lock): 1 layer, 2 000 operations"
    )
    assert side_words(SideSummary("x.onnx", "onnx")) == "onnx"
