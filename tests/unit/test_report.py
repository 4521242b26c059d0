"""Reports: canonical JSON both ways, and a page that stands alone and says what is in it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from pages import Page
from reports import EXACT, LOSSY, make_pass, make_report

from kvxform.errors import ArtifactError
from kvxform.formats import format_bytes, format_number, format_percent
from kvxform.report import (
    BoundRecord,
    CacheMeasured,
    LoweringRecord,
    Measured,
    Report,
)
from kvxform.report_html import layer_runs, steps

TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def test_json_comes_back_and_is_canonical():
    text = make_report().to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert again.layers == make_report().layers
    assert json.loads(text)["passes"][0]["vs_before"]["relative"] == 1.23457e-06


def test_json_without_plan_and_measurements_comes_back():
    bare = make_report(plan=None, layers=(), bounds=(), cache=None, verify="none", passes=())
    again = Report.from_json(bare.to_json())
    assert again == bare
    assert (again.kv_bytes_per_token, again.bits_per_value, again.final) == (None, None, None)


def test_properties_are_those_of_the_plan_and_of_the_last_measured_pass():
    report = make_report()
    assert (report.kv_bytes_per_token, report.bits_per_value) == (6480, 4.5)
    assert report.final == LOSSY


@pytest.mark.parametrize(
    ("text", "code"),
    [("{}", "KVX602"), ("[", "KVX602"), (make_report(version=9).to_json(), "KVX604")],
    ids=["empty", "broken", "version"],
)
def test_what_is_not_a_report_is_refused(text, code):
    with pytest.raises(ArtifactError, match=code):
        Report.from_json(text)


def test_bounds_know_their_side():
    assert BoundRecord("max_kl", 0.1, 0.2).is_kept is False
    assert BoundRecord("max_kl", 0.1, 0.1).is_kept is True
    assert BoundRecord("min_top1", 0.9, 0.8).is_kept is False
    assert BoundRecord("min_top1", 0.9, None).is_kept is None


def test_page_is_well_formed_and_needs_nothing_else():
    page = Page(make_report().to_html())
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "onclick"} & a.keys()]
    assert "url(" not in make_report().to_html()
    assert "@import" not in make_report().to_html()


def test_page_says_what_was_done_proved_and_measured():
    text = Page(make_report().to_html()).text
    for words in (
        "toy with recipe kv4",
        "The cache is 3.56x smaller; 87.5 % of next tokens stay the same",
        "23 040 B",
        "4.50",
        "insert-cache",
        "What insert-cache does.",
        "not at 1: weight is read in 2 places",
        "1 of 2 steps change nothing but rounding",
        "a divergence of 0.0625 nats per token",
        "insert-cache changes nothing",
        "what quantize-kv costs",
        "quality on text of people",
        f"graph: +24 kvx.hadamard, {MINUS}1 aten.add",
        f"weights: {MINUS}1 600 numbers",
        "work: +4 608 additions per token",
        "m.attn: odd mask",
        "Paper of quantize-kv",
        "not measured",
        "kept",
    ):
        assert re.sub(r"\s", " ", words).replace("3.56x", f"3.56{TIMES}") in text, words


def test_a_page_shows_few_notes_at_once():
    notes = tuple((f"layer {i} reads layer {i - 1}", 1) for i in range(1, 20))
    text = Page(make_report(passes=(make_pass("a", "exact", EXACT, notes=notes),)).to_html()).text
    assert "17 more" in text
    assert "layer 19 reads layer 18" in text


def test_steps_know_the_share_of_the_cache_and_what_a_step_alone_adds():
    first, second = steps(make_report())
    assert (first.share, second.share) == (1.0, 0.25)
    assert len(first.costs) == 3
    assert second.costs == ()


def test_a_report_from_before_costs_were_kept_still_makes_a_page():
    text = Page(make_report(passes=(make_pass("a", "exact", EXACT, cost=None),)).to_html()).text
    assert "What a does." in text


def test_page_compares_the_target_with_the_eager_lowering():
    measured = Measured(max_abs=0.5, relative=0.0123, kl=0.0456, top1=0.9)
    cache = CacheMeasured(("decode",), 0.0, 0.000123, 0.000456)
    lowering = LoweringRecord("triton", measured, "relative", 0.03, cache)
    report = make_report(lowering=lowering)
    assert Report.from_json(report.to_json()).lowering == lowering
    text = Page(report.to_html()).text
    assert "target triton computes what the eager lowering does" in text
    assert "0.0123 of the largest logit" in text
    assert "target triton" not in Page(make_report().to_html()).text
    lossy = dataclasses.replace(lowering, metric="kl")
    assert "0.0456 nats" in Page(make_report(lowering=lossy).to_html()).text


def test_page_has_a_bar_for_each_layer_and_stream():
    page = Page(make_report().to_html())
    kinds = [a["class"] for tag, a in page.tags if tag == "rect"]
    assert [kinds.count(k) for k in ("key", "value", "outline")] == [6, 6, 3]


def test_page_without_measurements_says_so():
    bare = make_report(
        verify="none", passes=(make_pass("insert-cache", "exact", None),), cache=None
    )
    page = Page(bare.to_html())
    assert "Nothing was measured" in page.text
    assert "the cache holds what it must" not in page.text


def test_names_cannot_break_out_of_the_page():
    nasty = dataclasses.replace(make_report().source, name="<script>alert(1)</script>")
    html = make_report(source=nasty).to_html()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_neighbours_that_are_stored_alike_share_a_row():
    layers = make_report().layers
    odd = dataclasses.replace(layers[1], key_codec="float16")
    assert [run.title for run in layer_runs(layers)] == ["0 to 2"]
    assert [run.title for run in layer_runs((layers[0], odd, layers[2]))] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0625, "0.0625"),
        (4.71e-7, f"4.7 {TIMES} 10⁻⁷"),
        (12345.0, f"1.2 {TIMES} 10⁴"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_are_short(value, text):
    assert re.sub(r"\s", " ", format_number(value)) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (6480.0, "6 480 B"), (2.5, "2.5 B"), (1.5 * 2**30, "1.5 GiB")]
)
def test_sizes_have_units(count, text):
    assert re.sub(r"\s", " ", format_bytes(count)) == text


def test_shares_are_percentages():
    assert re.sub(r"\s", " ", format_percent(0.0421)) == "4.21 %"
