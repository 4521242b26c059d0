"""Recipes: what is accepted, and the code, line and hint of every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kvxform.errors import KvxformError, RecipeError
from kvxform.pass_base import PASSES
from kvxform.recipe import (
    PassStep,
    Recipe,
    Target,
    build_pass,
    bundled_recipes,
    for_package,
    load_recipe,
    retarget,
)

HEAD = "version: 1\nname: mine\npasses:\n"


def write(folder: Path, text: str, name: str = "kv4.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_bundled_recipes_are_sorted_and_include_the_basic_ones():
    assert list(bundled_recipes()) == sorted(bundled_recipes())
    assert {"exact", "int8", "kivi2", "kivi4", "kv4"} <= set(bundled_recipes())


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipe_builds_and_comes_back_from_its_own_yaml(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert [type(build_pass(step)) for step in recipe.passes] == [
        PASSES[step.name] for step in recipe.passes
    ]
    again = load_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_kv4_is_the_recipe_of_the_design():
    names = [step.name for step in load_recipe("kv4").passes]
    before = ["cache-latent", "fuse-norms", "rotate-v", "insert-cache", "page-cache", "rotate-qk"]
    assert names == [*before, "quantize-kv", "simplify"]
    assert load_recipe("kv4").bounds.model_dump(exclude_none=True) == {
        "max_kl": 0.1,
        "bits_per_value": 6.0,
    }


def test_steps_know_their_line(tmp_path):
    recipe = load_recipe(
        write(tmp_path, HEAD + "  - insert-cache\n  - page-cache:\n      page_size: 16\n")
    )
    assert [step.at for step in recipe.passes] == ["kv4.yaml:4", "kv4.yaml:5"]
    assert recipe.passes[1].options == {"page_size": 16}


def test_a_step_may_say_allow_zero_and_the_pass_does_not_see_it():
    recipe = load_recipe(
        {
            "version": 1,
            "name": "m",
            "passes": [{"page-cache": {"allow_zero": True, "page_size": 16}}],
        }
    )
    assert recipe.passes == (PassStep("page-cache", {"page_size": 16}, allow_zero=True),)
    assert recipe.to_data()["passes"] == [{"page-cache": {"page_size": 16, "allow_zero": True}}]


def test_a_recipe_passes_through_and_json_reads_like_yaml(tmp_path):
    path = write(tmp_path, '{"version": 1, "name": "mine", "passes": ["insert-cache"]}', "a.json")
    recipe = load_recipe(path)
    assert load_recipe(recipe) is recipe
    assert recipe == load_recipe(str(write(tmp_path, HEAD + "  - insert-cache\n")))


def test_numbers_with_an_exponent_are_numbers_as_in_json(tmp_path):
    text = HEAD + "  - insert-cache\nbounds: {max_kl: 1e-3}\n"
    assert load_recipe(write(tmp_path, text)).bounds.max_kl == 1e-3


REFUSED = [
    # text, code, place, word of the message
    ("", "KVX107", "kv4.yaml", "mapping"),
    ("[1, 2]\n", "KVX107", "kv4.yaml", "mapping"),
    ("version: 2\nname: m\npasses: [insert-cache]\n", "KVX106", "kv4.yaml:1", "2"),
    ("version: true\nname: m\npasses: [insert-cache]\n", "KVX106", "kv4.yaml:1", "True"),
    ("version: 1\npasses: [insert-cache]\n", "KVX107", "kv4.yaml:1", "name must be given"),
    ("version: 1\nname: m\npasses: []\n", "KVX107", "kv4.yaml:3", "at least one"),
    (HEAD + "  - insert-cahce\n", "KVX104", "kv4.yaml:4", "did you mean 'insert-cache'"),
    (HEAD + "  - 3\n", "KVX107", "kv4.yaml:4", "name"),
    (HEAD + "  - {insert-cache: null, page-cache: null}\n", "KVX107", "kv4.yaml:4", "one name"),
    (HEAD + "  - insert-cache\nbonds: {}\n", "KVX102", "kv4.yaml:5", "did you mean 'bounds'"),
    (HEAD + "  - insert-cache\nbounds: {max_lk: 1}\n", "KVX102", "kv4.yaml:5", "'max_kl'"),
    (HEAD + "  - insert-cache\nbounds: {max_kl: low}\n", "KVX107", "kv4.yaml:5", "'low'"),
    (HEAD + "  - insert-cache\nbounds: {max_kl: -1}\n", "KVX107", "kv4.yaml:5", "-1"),
    (HEAD + "  - insert-cache\ntarget: {lowring: onnx}\n", "KVX102", "kv4.yaml:5", "'lowering'"),
    (HEAD + "  - page-cache:\n      pagesize: 16\n", "KVX102", "kv4.yaml:5", "'page_size'"),
    (HEAD + "  - page-cache:\n      page_size: '16'\n", "KVX107", "kv4.yaml:5", "'16'"),
    (HEAD + "  - page-cache:\n      page_size: true\n", "KVX107", "kv4.yaml:5", "True"),
    (HEAD + "  - page-cache:\n      page_size: 17\n", "KVX107", "kv4.yaml:4", "power of two"),
    (HEAD + "  - page-cache: {allow_zero: 1}\n", "KVX107", "kv4.yaml:4", "allow_zero"),
    (HEAD + "  - quantize-kv:\n      key: {codec: itn}\n", "KVX103", "kv4.yaml:5", "'int'"),
    (HEAD + "  - quantize-kv:\n      key:\n        codec: int\n        bts: 4\n", "KVX102",
     "kv4.yaml:7", "'bits'"),
    (HEAD + "  - quantize-kv:\n      key:\n        codec: int\n        bits: '4'\n", "KVX107",
     "kv4.yaml:7", "'4'"),
    (HEAD + "  - quantize-kv:\n      key: {codec: int}\n      regions:\n        snk: 1\n", "KVX102",
     "kv4.yaml:7", "'sink'"),
    (HEAD + "  - insert-cache\nname: again\n", "KVX107", "kv4.yaml:5", "once"),
    (HEAD + "  - insert-cache\n  b: [\n", "KVX107", "kv4.yaml:5", "YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "place", "word"), REFUSED)
def test_refusal_has_code_line_and_hint(tmp_path, text, code, place, word):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.code == code
    assert caught.value.at == place
    assert word in str(caught.value)


def test_target_triton_and_its_option(tmp_path):
    text = HEAD + "  - insert-cache\ntarget: {lowering: triton, compile: true}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.target.lowering, recipe.target.compile) == ("triton", True)
    assert load_recipe(recipe.to_data()) == recipe


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{lowering: tritn}", r"KVX107 .*'triton'.*kv4.yaml:5"),
        ("{lowering: eager, compile: true}", r"KVX107 .*lowering: triton.*kv4.yaml:5"),
    ],
)
def test_targets_that_are_refused(tmp_path, target, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, HEAD + f"  - insert-cache\ntarget: {target}\n"))


def test_retarget_drops_options_of_the_old_target():
    recipe = load_recipe(
        {
            "version": 1,
            "name": "x",
            "passes": ["insert-cache"],
            "target": {"lowering": "triton", "compile": True},
        }
    )
    assert retarget(recipe, "triton") is recipe
    assert retarget(recipe, "eager").target == Target()
    with pytest.raises(RecipeError, match="KVX107"):
        retarget(recipe, "cuda")


@pytest.mark.parametrize("name", ["kv5", "exakt", "missing.yaml", "missing.json"])
def test_unknown_recipe(name):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.code == "KVX101"
    assert "exact" in str(caught.value) or name in str(caught.value)


def test_broken_json_has_its_line(tmp_path):
    with pytest.raises(RecipeError, match=r"KVX107 .*kv4.json:2"):
        load_recipe(write(tmp_path, '{"version": 1,\n oops}', "kv4.json"))


def test_a_recursive_yaml_alias_is_refused_and_not_followed_for_ever(tmp_path):
    with pytest.raises(KvxformError):
        load_recipe(write(tmp_path, HEAD + "  - &a [*a]\n"))


def test_recipes_are_immutable():
    recipe = load_recipe("exact")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_a_recipe_made_in_python_is_checked_like_a_file():
    recipe = Recipe(
        version=1, name="mine", passes=["insert-cache", {"page-cache": {"page_size": 32}}]
    )
    assert [step.name for step in recipe.passes] == ["insert-cache", "page-cache"]
    with pytest.raises(RecipeError, match="KVX104"):
        Recipe(version=1, name="mine", passes=["nothing"])


def test_for_package_keeps_what_is_not_asked_anew():
    recipe = for_package(load_recipe("onnx-paged-int8"), {"provider": "cpu", "level": "L3"})
    assert recipe.target == Target(lowering="onnx", provider="cpu", level="L3", logits="last")
    other = for_package(load_recipe("kv4"), {})
    assert other.target == Target(lowering="onnx")
    assert other.passes == load_recipe("kv4").passes
