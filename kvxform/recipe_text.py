"""Text of recipes: YAML and JSON in, with the source line of every key; canonical YAML out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvxform.errors import RecipeError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class SourceMap:
    """Where each part of a recipe stands.

    Attributes:
        file: File name without folders, or empty for recipes made in Python.
        lines: First line of a value by its path, for instance `("passes", 3, "rotate-qk")`.
    """

    file: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def at(self, path: KeyPath) -> str:
        """Return `file:line` of the nearest known part above `path`, or what is known of it."""
        line = self.line(path)
        return f"{self.file}:{line}" if self.file and line else self.file

    def line(self, path: KeyPath) -> int | None:
        """Return the line of the nearest known part above `path`, or None."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


class _Loader(yaml.SafeLoader):
    """A safe loader that reads `1e-3` as a number, as YAML 1.2 and JSON do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe_file(path: Path) -> tuple[Any, SourceMap]:
    """Read a recipe file, JSON if its name ends in `.json` and YAML otherwise.

    Returns:
        The plain data, not checked, and the lines it came from (YAML only).

    Raises:
        RecipeError: KVX101 if there is no such file, KVX107 if the text cannot be parsed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("KVX101", "a recipe file must be readable", got=str(path)) from error
    if path.suffix == ".json":
        try:
            return json.loads(text), SourceMap(path.name)
        except json.JSONDecodeError as error:
            at = f"{path.name}:{error.lineno}"
            raise RecipeError(
                "KVX107", f"a recipe must be valid JSON ({error.msg})", at=at
            ) from error
    return parse_yaml(text, path.name)


def parse_yaml(text: str, file: str) -> tuple[Any, SourceMap]:
    """Parse YAML and keep the line of every key and list item.

    Raises:
        RecipeError: KVX107 if the text is not YAML or a key stands twice in one mapping.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if root is None:
            return None, SourceMap(file)
        _collect_lines(root, (), lines, set(), file)
        return loader.construct_document(root), SourceMap(file, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        at = f"{file}:{mark.line + 1}" if mark else file
        raise RecipeError("KVX107", f"a recipe must be valid YAML ({problem})", at=at) from error
    finally:
        loader.dispose()


def _collect_lines(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], seen: set[int], file: str
) -> None:
    """Record the line of every value below `node`; an aliased node is visited once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _collect_lines(item, (*path, i), lines, seen, file)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below, line = (*path, str(key.value)), key.start_mark.line + 1
            if below in lines:
                rule = f"key '{key.value}' must stand only once"
                raise RecipeError("KVX107", rule, at=f"{file}:{line}")
            lines[below] = line
            _collect_lines(value, below, lines, seen, file)


def format_yaml(data: Mapping[str, Any]) -> str:
    """Return canonical YAML: block lists, innermost collections in one line."""
    return yaml.safe_dump(
        dict(data), sort_keys=False, default_flow_style=None, width=96, allow_unicode=True
    )
