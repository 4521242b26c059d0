"""JSON schema of recipes, made from the models, the passes and the codecs.

`python -m kvxform.recipe_schema` writes it to `kvxform/recipes/recipe.schema.json`; a test fails
when that file is not up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import kvxform.passes  # noqa: F401  (fills the registry of passes)
from kvxform.codecs.base import CODECS
from kvxform.pass_base import PASSES
from kvxform.recipe import Recipe

SCHEMA_FILE = Path(__file__).parent / "recipes" / "recipe.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    definitions: dict[str, Any] = {}
    recipe = _take(Recipe.model_json_schema(), definitions)
    codecs = [_codec_schema(name, definitions) for name in sorted(CODECS)]
    definitions["codec"] = {"anyOf": codecs}
    steps: list[dict[str, Any]] = [{"enum": sorted(PASSES)}]
    steps += [_step_schema(name, definitions) for name in sorted(PASSES)]
    recipe["properties"]["passes"] = {"type": "array", "minItems": 1, "items": {"anyOf": steps}}
    return {"$schema": DIALECT, "title": "kvxform recipe", **recipe, "$defs": definitions}


def schema_text() -> str:
    """Return the schema as it is committed."""
    return json.dumps(recipe_schema(), indent=2, sort_keys=True) + "\n"


def _step_schema(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    options = _take(TypeAdapter(PASSES[name]).json_schema(), definitions)
    _name_codecs(options)
    options.setdefault("properties", {})["allow_zero"] = {"type": "boolean", "default": False}
    options["additionalProperties"] = False
    return {
        "type": "object",
        "properties": {name: {"anyOf": [options, {"type": "null"}]}},
        "required": [name],
        "additionalProperties": False,
    }


def _codec_schema(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _take(TypeAdapter(CODECS[name]).json_schema(), definitions)
    definitions.pop("Codec", None)  # the interface; what an option of that type takes is `codec`
    for key, option in schema["properties"].items():
        if option.get("$ref") == "#/$defs/Codec":
            schema["properties"][key] = {"$ref": "#/$defs/codec"}
    schema["properties"]["codec"] = {"const": name}
    schema["required"] = ["codec", *schema.get("required", [])]
    schema["additionalProperties"] = False
    return schema


def _name_codecs(schema: dict[str, Any]) -> None:
    """Plain mappings in options of passes are codecs."""
    for key, option in schema.get("properties", {}).items():
        if _takes_mapping(option):
            schema["properties"][key] = {"anyOf": [{"$ref": "#/$defs/codec"}, {"type": "null"}]}


def _takes_mapping(option: dict[str, Any]) -> bool:
    choices = option.get("anyOf", [option])
    return any(choice.get("additionalProperties") is True for choice in choices)


def _take(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Move the definitions of a schema into `definitions`; unknown keys are refused in them."""
    for name, definition in schema.pop("$defs", {}).items():
        if "properties" in definition:
            definition["additionalProperties"] = False
            _name_codecs(definition)
        definitions[name] = definition
    schema.pop("description", None)
    schema.pop("title", None)
    return schema


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
