"""The published JSON schema: up to date, as strict as the loader, true of bundled recipes."""

from __future__ import annotations

import dataclasses
import json

import jsonschema
import pytest
import yaml

from kvxform.errors import RecipeError
from kvxform.pass_base import PASSES
from kvxform.recipe import bundled_recipes, load_recipe
from kvxform.recipe_schema import SCHEMA_FILE, recipe_schema, schema_text


def test_committed_schema_is_up_to_date():
    written = SCHEMA_FILE.read_text(encoding="utf-8")
    assert written == schema_text(), "run `python -m kvxform.recipe_schema`"


def test_every_option_of_every_pass_is_in_the_schema():
    steps = recipe_schema()["properties"]["passes"]["items"]["anyOf"]
    assert steps[0] == {"enum": sorted(PASSES)}
    described = {}
    for step in steps[1:]:
        ((name, choices),) = step["properties"].items()
        described[name] = set(choices["anyOf"][0]["properties"])
    for name, cls in PASSES.items():
        assert described[name] == {f.name for f in dataclasses.fields(cls)} | {"allow_zero"}


def test_no_part_of_the_schema_takes_unknown_keys():
    def check(part: object) -> None:
        if isinstance(part, dict):
            if "properties" in part:
                assert part.get("additionalProperties") is False, part
            for value in part.values():
                check(value)
        elif isinstance(part, list):
            for value in part:
                check(value)

    check(recipe_schema())


@pytest.mark.parametrize("name", bundled_recipes())
def test_schema_accepts_bundled_recipes_and_refuses_a_misspelt_key(name):
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    data = yaml.safe_load((SCHEMA_FILE.parent / f"{name}.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "bonds": {}}, schema)


BAD_STEPS = [
    "insert-cahce",
    {"page-cache": {"pagesize": 16}},
    {"page-cache": {"page_size": "16"}},
    {"quantize-kv": {"key": {"codec": "int", "bts": 4}}},
    {"quantize-kv": {"regions": {"snk": 1}}},
    {"insert-cache": None, "page-cache": None},
]


@pytest.mark.parametrize("step", BAD_STEPS)
def test_schema_refuses_what_the_loader_refuses(step):
    data = {"version": 1, "name": "mine", "passes": [step]}
    with pytest.raises(RecipeError):
        load_recipe(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, recipe_schema())
