"""Passes explained: their contract, what they find, what they miss, and questions refused."""

from __future__ import annotations

import dataclasses

import pytest
from programs import assert_untouched, gpt2_program, llama_program, snapshot

import kvxform.passes  # noqa: F401  (fills the registry)
from kvxform.errors import RecipeError
from kvxform.explain import explain_program, make_question
from kvxform.explain.pass_records import PassFinding
from kvxform.explain.passes import contract_of
from kvxform.ir.program import Program
from kvxform.pass_base import PASSES
from kvxform.recipe import Recipe, load_recipe


def explain(program: Program, step: object, recipe: Recipe | None = None) -> PassFinding:
    (finding,) = explain_program(program, make_question(step, recipe)).passes
    return finding


def recipe_of(*passes: object) -> Recipe:
    return load_recipe({"version": 1, "name": "mine", "passes": list(passes)})


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_has_a_contract(name):
    finding = contract_of(PASSES[name], None)
    assert (finding.name, finding.state) == (name, "not tried")
    assert finding.about
    assert finding.source
    assert [o.name for o in finding.options] == [f.name for f in dataclasses.fields(PASSES[name])]
    assert [r.fact for r in finding.requires] == [r.fact for r in PASSES[name].requires]


def test_a_pass_that_applies_changes_nothing_here():
    program = llama_program()
    before = snapshot(program)
    finding = explain(program, "rotate-v: {block: 8}")
    assert_untouched(program, before)
    assert finding.state == "applies"
    assert [(p.outcome, p.layer, p.module) for p in finding.places] == [
        ("match", 0, "layers.0.attn"),
        ("match", 1, "layers.1.attn"),
    ]
    assert [(o.name, o.default, o.value) for o in finding.options] == [
        ("block", None, 8),
        ("seed", None, None),
    ]
    assert [(r.fact, r.wanted, r.got, r.is_met) for r in finding.requires] == [
        ("v.codec", "none", "none", True)
    ]
    assert finding.ensures == {"v.basis": "hadamard(8)"}


def test_a_place_that_does_not_match_says_why_and_what_to_change():
    finding = explain(gpt2_program(tied=True), "fuse-norms")
    missed = [p for p in finding.places if p.outcome == "no match"]
    assert finding.state == "applies"
    assert [(p.module, p.reason) for p in missed] == [
        ("head", "weight wte.weight is read in 2 places")
    ]
    assert missed[0].node.endswith("(programs.py:1)")
    assert missed[0].hint.startswith("use untie: true")


def test_an_unmet_requirement_names_the_pass_that_is_missing():
    explanation = explain_program(llama_program(), make_question("page-cache", None))
    (finding,) = explanation.passes
    assert not explanation.is_fine
    assert (finding.state, finding.places) == ("not tried", ())
    assert finding.why == "it needs cache.inserted to be True"
    (requirement,) = finding.requires
    assert (requirement.got, requirement.is_met) == (False, False)
    assert requirement.hint == "add insert-cache before page-cache"


def test_a_pass_without_its_options_shows_its_contract():
    finding = explain(llama_program(), "quantize-kv")
    assert finding.state == "not tried"
    assert "key and value" in finding.why
    assert finding.options[0].value == "required"


def test_within_a_recipe_the_passes_before_it_have_run(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nname: mine\npasses:\n  - insert-cache\n  - page-cache\n")
    finding = explain(llama_program(), "page-cache", load_recipe(path))
    assert finding.state == "applies"
    assert finding.at == "mine.yaml:5"
    assert finding.requires[0].is_met


def test_a_recipe_alone_explains_all_its_passes():
    recipe = recipe_of("fuse-norms", "insert-cache", "simplify")
    findings = explain_program(llama_program(), make_question(None, recipe)).passes
    assert [(f.name, f.state) for f in findings] == [
        ("fuse-norms", "applies"),
        ("insert-cache", "applies"),
        ("simplify", "done"),
    ]


def test_a_recipe_may_allow_that_a_pass_applies_nowhere():
    program = llama_program(head_dim=3)
    allowed = recipe_of({"rotate-v": {"allow_zero": True}})
    explanation = explain_program(program, make_question(None, allowed))
    assert [f.state for f in explanation.passes] == ["skipped"]
    assert explanation.is_fine
    refused = explain_program(program, make_question(None, recipe_of("rotate-v")))
    assert [f.state for f in refused.passes] == ["no match"]
    assert not refused.is_fine


def test_a_pass_that_has_been_applied_is_done():
    question = make_question(None, recipe_of("fuse-norms", "fuse-norms"))
    explanation = explain_program(llama_program(), question)
    assert [f.state for f in explanation.passes] == ["applies", "done"]
    assert explanation.is_fine


def test_a_refused_pass_stops_those_after_it():
    recipe = recipe_of({"rotate-qk": {"block": 32}}, "insert-cache")
    explanation = explain_program(llama_program(), make_question(None, recipe))
    first, second = explanation.passes
    assert not explanation.is_fine
    assert first.state == "refused"
    assert first.why.startswith("KVX204 [rotate-qk] a Hadamard block must be")
    assert second.state == "not tried"
    assert second.why.startswith("rotate-qk before it is refused: KVX204")


def test_a_pass_that_applies_nowhere():
    program = llama_program(layers=1)
    node = program.attention_node(0)
    node.kwargs = {**node.kwargs, "causal": False}
    explanation = explain_program(program, make_question("insert-cache", None))
    (finding,) = explanation.passes
    assert finding.state == "no match"
    assert [p.reason for p in finding.places] == [
        "attention that sees later tokens cannot be cached"
    ]
    assert not explanation.is_fine


@pytest.mark.parametrize(
    ("step", "recipe", "code", "hint"),
    [
        ("rotate-kv", None, "KVX104", "rotate-"),
        ("rotate-v: {blockk: 8}", None, "KVX102", "did you mean 'block'"),
        ({"rotate-v": {"block": 7}}, None, "KVX107", "power of two"),
        ("rotate-v: {block: [}", None, "KVX107", "a name"),
        (["rotate-v"], None, "KVX107", "step"),
        ("quantize-kv", "exact", "KVX104", "choose from"),
        ({"page-cache": {"page_size": 16}}, "exact", "KVX104", "exact"),
    ],
)
def test_bad_questions_are_refused_before_any_work(step, recipe, code, hint):
    with pytest.raises(RecipeError, match=hint) as caught:
        make_question(step, None if recipe is None else load_recipe(recipe))
    assert caught.value.code == code


def test_a_recipe_in_the_wrong_order_is_refused():
    with pytest.raises(RecipeError, match="KVX214"):
        make_question(None, recipe_of("page-cache", "insert-cache"))
