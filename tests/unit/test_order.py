"""Order of passes: refusals in words, and the order that `auto_order` finds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.errors import RecipeError
from kvxform.ir.facts import Facts
from kvxform.order import check_order, facts_after, plan_passes
from kvxform.recipe import PassStep, load_recipe

INT4 = {"codec": "int", "bits": 4}
QUANTIZE = PassStep("quantize-kv", {"key": INT4, "value": INT4}, line=10, file="kv4.yaml")


def step(name: str, line: int = 1) -> PassStep:
    return PassStep(name, line=line, file="kv4.yaml")


def names(steps: list[PassStep], *, auto: bool = False) -> list[str]:
    return [planned.name for planned in plan_passes(steps, Facts(), auto_order=auto)]


def refusal(steps: list[PassStep]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        names(steps)
    return caught.value


def test_a_pass_that_was_spoiled_by_an_earlier_one_is_told_to_move_above_it():
    error = refusal([step("insert-cache"), QUANTIZE, step("rotate-qk", 13)])
    assert str(error) == (
        "KVX214 [quantize-kv] key scales would be fitted before rotate-qk changes the basis of K."
        " Hint: move rotate-qk above quantize-kv (kv4.yaml:10)."
    )


def test_a_pass_whose_need_is_met_later_is_told_who_has_to_come_first():
    error = refusal([step("page-cache", 4), step("insert-cache", 5)])
    assert error.code == "KVX214"
    assert error.where == "page-cache"
    assert error.hint == "move insert-cache above page-cache (kv4.yaml:4)"


def test_a_pass_whose_need_nobody_meets_is_told_what_to_add():
    error = refusal([QUANTIZE])
    assert (error.code, error.where, error.at) == ("KVX213", "quantize-kv", "kv4.yaml:10")
    assert error.hint == "add insert-cache before quantize-kv"


def test_facts_of_the_program_count():
    steps = [step("page-cache")]
    facts = Facts({"cache.inserted": True, "cache.layout": "contiguous"})
    assert [p.name for p in plan_passes(steps, facts, auto_order=False)] == ["page-cache"]


def test_auto_order_moves_as_little_as_needed():
    wrong = [QUANTIZE, step("page-cache"), step("rotate-qk"), step("insert-cache")]
    assert names(wrong, auto=True) == ["rotate-qk", "insert-cache", "quantize-kv", "page-cache"]


def test_auto_order_refuses_what_no_order_can_mend():
    with pytest.raises(RecipeError, match="KVX213"):
        names([QUANTIZE, step("rotate-qk")], auto=True)


@pytest.mark.parametrize("recipe", ["exact", "int8", "kv4", "kivi4", "kivi2"])
def test_bundled_recipes_stay_as_written_under_auto_order(recipe):
    steps = list(load_recipe(recipe).passes)
    assert names(steps, auto=True) == names(steps) == [s.name for s in steps]


@settings(deadline=None, max_examples=60)
@given(st.permutations(load_recipe("kv4").passes))
def test_auto_order_makes_every_permutation_legal_and_keeps_legal_ones(steps):
    planned = plan_passes(steps, Facts(), auto_order=True)
    assert sorted(p.name for p in planned) == sorted(s.name for s in steps)
    facts = Facts()
    for p in planned:
        assert all(need.is_met(facts) for need in p.graph_pass.requires)
        facts = facts_after(p.graph_pass, facts)
    check_order(planned, Facts())
    try:
        legal = [p.name for p in plan_passes(steps, Facts(), auto_order=False)]
    except RecipeError:
        return
    assert facts["k.codec"] == "int"
    assert legal == [s.name for s in steps]
