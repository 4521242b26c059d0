"""Which passes of two recipes differ, against lists of changes written out by hand."""

from __future__ import annotations

import pytest

from kvxform.diffing.recipes import compare_recipes
from kvxform.diffing.records import RecipeChange
from kvxform.recipe import load_recipe

INT4 = {"codec": "int", "bits": 4}
INT8 = {"codec": "int", "bits": 8}


def quantise(key):
    return {"quantize-kv": {"key": key, "value": INT8}}


def steps(name):
    return load_recipe(name).to_data()["passes"]


def test_equal_recipes_have_no_changes():
    assert compare_recipes(steps("kv4"), steps("kv4")) == ()


def test_an_option_is_named_by_its_path():
    assert compare_recipes(["insert-cache", quantise(INT4)], ["insert-cache", quantise(INT8)]) == (
        RecipeChange("changed", "quantize-kv", "key.bits", "4", "8"),
    )


def test_an_option_that_is_not_given_is_empty():
    assert compare_recipes(["rotate-v"], [{"rotate-v": {"block": 32}}]) == (
        RecipeChange("changed", "rotate-v", "block", "", "32"),
    )


def test_passes_come_and_go():
    before = ["fuse-norms", {"rotate-v": {"block": 64}}, "insert-cache"]
    after = ["insert-cache", {"page-cache": {"page_size": 16}}]
    assert compare_recipes(before, after) == (
        RecipeChange("added", "page-cache", after="page_size 16"),
        RecipeChange("removed", "fuse-norms"),
        RecipeChange("removed", "rotate-v", before="block 64"),
    )


def test_a_pass_that_moved_keeps_its_options():
    before = ["a", "b", {"c": {"x": 1}}]
    assert compare_recipes(before, [{"c": {"x": 2}}, "a", "b"]) == (
        RecipeChange("moved", "c", before="after b", after="first"),
        RecipeChange("changed", "c", "x", "1", "2"),
    )


def test_a_pass_that_runs_twice_is_added_once():
    assert compare_recipes(["a", "b"], ["a", "b", "a"]) == (RecipeChange("added", "a"),)


@pytest.mark.parametrize("sides", [(None, ["a"]), (["a"], None)])
def test_nothing_is_said_where_a_side_has_no_recipe(sides):
    assert compare_recipes(*sides) == ()
