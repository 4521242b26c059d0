"""`kvxform recipes`: which recipes come with kvxform, what is in one, and the schema."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated

import typer

from kvxform.cli.options import Json
from kvxform.cli.output import print_data, print_json, print_table

app = typer.Typer(help="List the bundled recipes; `show NAME` prints one, `preset` what was found.")


@app.callback(invoke_without_command=True)
def run(context: typer.Context, json: Json = False) -> None:
    """List the bundled recipes; `show NAME` prints one, `schema` the JSON schema."""
    if context.invoked_subcommand is not None:
        return
    listed = _bundled()
    if json:
        print_json(listed)
        return
    print_table(("name", "about"), [(entry["name"], entry["about"]) for entry in listed])


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Bundled name or recipe file.")],
    json: Json = False,
) -> None:
    """Print one recipe, checked, as YAML."""
    from kvxform.recipe import load_recipe

    recipe = load_recipe(name)
    if json:
        print_json(recipe.to_data())
    else:
        print_data(recipe.to_yaml().rstrip("\n"))


@app.command("preset")
def preset(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact folder.")],
    json: Json = False,
) -> None:
    """Print the recipe of an artifact with what its search per layer found, as YAML."""
    import kvxform
    from kvxform.presets import explicit_recipe

    model = kvxform.load(artifact)
    recipe = explicit_recipe(model.recipe, model.plan)
    if json:
        print_json(recipe.to_data())
    else:
        print_data(recipe.to_yaml().rstrip("\n"))


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes."""
    file = importlib.resources.files("kvxform.recipes") / "recipe.schema.json"
    print_data(file.read_text(encoding="utf-8").rstrip("\n"))


def _bundled() -> list[dict[str, str]]:
    """Return names and first words of the bundled recipes; quick, since nothing is checked."""
    import yaml

    files = importlib.resources.files("kvxform.recipes").iterdir()
    texts = [f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")]
    data = sorted((yaml.safe_load(text) for text in texts), key=lambda entry: str(entry["name"]))
    return [{"name": entry["name"], "about": entry.get("about", "")} for entry in data]
