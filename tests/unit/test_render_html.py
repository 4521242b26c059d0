"""The page of a diff: stands alone, has a tile for every layer, and says what is in the diff."""

from __future__ import annotations

import dataclasses
import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from diff_samples import ALL, LAYERS, bare, recipe_change, rope_fault
from pages import Page

from kvxform.diffing.error_plot import HEIGHT, error_plot
from kvxform.diffing.records import LayerDiff, NodeChange
from kvxform.diffing.render_html import heat_of, render_html


def tiles(html: str) -> list[str]:
    """Return the colour of every tile."""
    page = Page(html)
    return [a["class"] for tag, a in page.tags if tag == "summary" and "aria-label" in a]


@pytest.mark.parametrize("name", ALL)
def test_a_page_is_well_formed_and_needs_nothing_else(name):
    html = render_html(ALL[name])
    assert Page(html).is_self_contained
    assert "url(" not in html
    assert "@import" not in html
    assert html == render_html(ALL[name])


def test_nothing_breaks_out_of_the_page():
    html = render_html(ALL["hostile"])
    assert "<b>&amp;" not in html
    assert not {"\x00", "\x1b"} & set(html)
    assert "&lt;b&gt;" in html


def test_the_map_has_a_tile_for_each_layer_and_errors_colour_it():
    colours = tiles(render_html(rope_fault()))
    assert len(colours) == LAYERS
    assert colours[:7] == ["h0"] * 7
    assert colours[7] == "h5"
    assert colours[29] == "h3"


def test_the_layer_at_fault_is_marked_and_says_why():
    page = Page(render_html(rope_fault()))
    marked = [a for tag, a in page.tags if tag == "details" and "faulty" in a.get("class", "")]
    assert len(marked) == 1
    assert "theta 10000 -> 500000" in page.text
    assert "layer 7 is where they part first" in page.text


def test_a_page_says_what_the_diff_says():
    text = Page(render_html(recipe_change())).text
    for words in (
        "attention window none -> 128",
        "1.80x less",
        "all 30 layers",
        "kvx.hadamard(%, 64) x2",
        "by rotate-qk",
        "key and value codec.bits",
        "77 % of next tokens the same",
    ):
        assert words in text, words


def test_a_tile_of_a_layer_with_many_changes_is_cut_and_the_graph_is_not():
    nodes = tuple(NodeChange("added", 0, f"op{i}", "", after=f"op{i}()") for i in range(20))
    structure = dataclasses.replace(recipe_change().structure, nodes=nodes)
    text = Page(render_html(recipe_change(structure=structure))).text
    assert "8 more operations differ here" in text
    assert (text.count("op3()"), text.count("op19()")) == (2, 1)


def test_a_page_without_layers_has_no_map():
    text = Page(render_html(bare())).text
    assert "All layers" not in text
    assert "neither graphs nor outputs were compared" in text


@pytest.mark.parametrize(
    ("error", "heat"),
    [(None, 0), (0.0, 0), (1e-6, 1), (1e-5, 1), (2e-5, 2), (0.01, 3), (0.2, 4), (1.0, 5)],
)
def test_colours_begin_where_rounding_ends(error, heat):
    assert heat_of(error, 1e-5) == heat


def test_what_is_no_number_has_the_worst_colour():
    assert heat_of(float("nan"), 1e-5) == heat_of(float("inf"), 1e-5) == 5


def dots(chart: str, css: str) -> list[float]:
    root = ElementTree.fromstring(chart)
    return [float(d.attrib["cy"]) for d in root.iter("circle") if d.attrib["class"] == css]


def test_the_plot_has_a_dot_for_each_error_on_a_scale_of_powers_of_ten():
    layers = [LayerDiff(i, hidden=10.0 ** (-i), key=None, value=0.0) for i in range(4)]
    chart = error_plot(layers, 1e-5)
    hidden = dots(chart, "hidden")
    steps = [b - a for a, b in itertools.pairwise(hidden)]
    assert max(steps) - min(steps) < 0.2
    assert min(steps) > 10
    assert dots(chart, "key") == []
    assert len(set(dots(chart, "value"))) == 1
    assert max(dots(chart, "value")) < HEIGHT


def test_errors_far_from_one_stay_on_the_plot():
    layers = [LayerDiff(0, 1e-30), LayerDiff(1, 1e4), LayerDiff(2, float("inf"))]
    assert all(0 < y < HEIGHT for y in dots(error_plot(layers, 1e-5), "hidden"))


def test_no_errors_make_no_plot():
    assert error_plot([], 1e-5) is None
    assert error_plot([LayerDiff(0), dataclasses.replace(LayerDiff(1), hidden=0.0)], 1e-5) is None
