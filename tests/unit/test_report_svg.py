"""Charts: round axes, and bars as tall as their values."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.report_svg import HEIGHT, Series, bar_chart, nice_ticks


def bars(chart: str, css: str) -> list[dict[str, float]]:
    root = ElementTree.fromstring(chart)
    names = ("x", "y", "width", "height")
    return [
        {n: float(bar.attrib[n]) for n in names}
        for bar in root.iter("rect")
        if bar.attrib["class"] == css
    ]


@settings(deadline=None, max_examples=80)
@given(st.floats(1e-12, 1e12))
def test_ticks_are_few_evenly_spaced_and_reach_the_top(highest):
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 6
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert ticks[-1] <= highest * 2.6
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))


def test_no_values_still_make_an_axis():
    assert nice_ticks(0.0) == [0.0, 1.0]


def test_bars_stand_side_by_side_and_are_as_tall_as_their_values():
    series = [Series("K", "key", [1.0, 2.0]), Series("V", "value", [4.0, 0.0])]
    chart = bar_chart("title", [0, 1], series, str)
    key, value = bars(chart, "key"), bars(chart, "value")
    assert value[0]["height"] == pytest.approx(4 * key[0]["height"], abs=0.2)
    assert key[1]["height"] == pytest.approx(2 * key[0]["height"], abs=0.2)
    assert value[1]["height"] == 0
    assert key[0]["x"] + key[0]["width"] <= value[0]["x"]
    assert all(bar["y"] + bar["height"] < HEIGHT for bar in [*key, *value])


def test_stacked_bars_stand_on_each_other_inside_the_outline():
    series = [Series("K", "key", [1.0]), Series("V", "value", [2.0])]
    chart = bar_chart("title", [7], series, str, stacked=True, outline=[6.0])
    (key,), (value,), (outline,) = (bars(chart, css) for css in ("key", "value", "outline"))
    assert value["y"] + value["height"] == pytest.approx(key["y"], abs=0.2)
    assert outline["height"] == pytest.approx(2 * (key["height"] + value["height"]), abs=0.3)


def test_text_is_escaped():
    chart = bar_chart('a "b" <c>', [0], [Series("<K>", "key", [1.0])], str)
    root = ElementTree.fromstring(chart)
    assert root.attrib["aria-label"] == 'a "b" <c>'
    assert "<K>" in "".join(t.text or "" for t in root.iter("title"))
