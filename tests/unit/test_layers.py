"""Layers named by text."""

from __future__ import annotations

import pytest

from kvxform.errors import PassError, RecipeError
from kvxform.ir.layers import check_layers, named_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0-1,5", (0, 1, 5)),
        ("-1", (5,)),
        ("-2--1", (4, 5)),
        ("3--1", (3, 4, 5)),
        ("5, 0-2,1", (0, 1, 2, 5)),
    ],
)
def test_runs_and_numbers_from_the_end(text, layers):
    assert named_layers(text, range(6), "x") == layers


def test_only_layers_with_a_site_are_named():
    assert named_layers("0-4,-1", [0, 2, 4, 7], "x") == (0, 2, 4, 7)


@pytest.mark.parametrize("text", ["", "all", "1-", "0;1", "1--"])
def test_other_text_is_refused(text):
    with pytest.raises(RecipeError, match=r"KVX107 \[x\] layers must"):
        check_layers(text, "x")


def test_a_run_that_goes_backwards_is_refused():
    with pytest.raises(RecipeError, match="KVX107"):
        named_layers("3-1", range(6), "x")


@pytest.mark.parametrize("text", ["6", "-7", "0-6"])
def test_a_layer_out_of_range_is_refused(text):
    with pytest.raises(PassError, match=r"KVX205.*Hint: it has 0 to 5"):
        named_layers(text, range(6), "x")
