"""Steps of a recipe: parsing one pass with its options, and building the pass.

Options are typed by the fields of the pass, and options of a codec by the fields of the codec, so
nothing here knows a pass or a codec by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from kvxform.codecs.base import CODECS, Codec, make_codec
from kvxform.errors import KvxformError, RecipeError, nearest_hint
from kvxform.pass_base import GraphPass
from kvxform.pass_lookup import find_pass
from kvxform.recipe_text import KeyPath, SourceMap


@dataclass(frozen=True)
class PassStep:
    """One pass of a recipe.

    Attributes:
        name: Recipe name of the pass, for instance `rotate-qk`.
        options: Fields of the pass, as plain data.
        allow_zero: Accept that the pass applies nowhere.
        line: Line in `file`, or None.
        file: Recipe file without folders, or empty.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    allow_zero: bool = False
    line: int | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)

    @property
    def at(self) -> str:
        """Where the step stands: `kv4.yaml:10`, or empty."""
        return f"{self.file}:{self.line}" if self.file and self.line else self.file

    def to_data(self) -> str | dict[str, Any]:
        """Return the form used in recipes: a name, or a name with its options."""
        options = {**self.options, **({"allow_zero": True} if self.allow_zero else {})}
        return {self.name: options} if options else self.name


def build_pass(step: PassStep) -> GraphPass:
    """Return the pass of `step` with its options.

    Raises:
        RecipeError: KVX102, KVX103, KVX104 or KVX107 if the step is not valid.
    """
    lines: dict[KeyPath, int] = {} if step.line is None else {(): step.line}
    return _build(step.name, step.options, (), SourceMap(step.file, lines))


def parse_step(data: Any, path: KeyPath, source: SourceMap) -> PassStep:
    """Check one entry of `passes`, a name or `{name: options}`, and return it as a step.

    Raises:
        RecipeError: KVX102, KVX103, KVX104 or KVX107, with the line it stands on.
    """
    if isinstance(data, PassStep):
        build_pass(data)
        return data
    if isinstance(data, Mapping) and len(data) == 1:
        ((name, options),) = data.items()
        options = {} if options is None else options
    else:
        name, options = data, {}
    if not isinstance(name, str) or not isinstance(options, Mapping):
        rule = "a step of passes must be a name, or one name with its options"
        raise RecipeError("KVX107", rule, got=repr(data), at=source.at(path))
    options = dict(options)
    allow_zero = options.pop("allow_zero", False)
    if not isinstance(allow_zero, bool):
        at = source.at((*path, name, "allow_zero"))
        raise RecipeError("KVX107", "allow_zero must be true or false", where=name, at=at)
    _build(name, options, (*path, name), source)
    return PassStep(name, options, allow_zero, source.line((*path, name)), source.file)


def check_keys(
    data: Mapping[str, Any], known: Iterable[str], path: KeyPath, source: SourceMap, where: str
) -> None:
    """Raise RecipeError KVX102, naming the nearest key, if `data` has a key that is not known."""
    names = set(known)
    for key in data:
        if key not in names:
            raise RecipeError(
                "KVX102",
                f"unknown key '{key}'",
                where=where,
                at=source.at((*path, str(key))),
                hint=nearest_hint(str(key), names),
            )


def as_recipe_error(
    error: ValidationError, path: KeyPath, source: SourceMap, where: str
) -> RecipeError:
    """Return the first problem of a pydantic error as RecipeError KVX107."""
    first = error.errors(include_url=False)[0]
    place: KeyPath = tuple(first["loc"])
    name = ".".join(str(part) for part in place) or "value"
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return RecipeError("KVX107", f"{name} must be given", where=where, at=source.at(path))
    got, at = repr(first["input"]), source.at((*path, *place))
    return RecipeError("KVX107", f"{name}: {message}", where=where, got=got, at=at)


def _build(name: str, options: Mapping[str, Any], path: KeyPath, source: SourceMap) -> GraphPass:
    try:
        cls = find_pass(name)
    except KvxformError as error:
        raise _located(error, source.at(path)) from error
    _check_record(options, cls, path, source, name)
    _check_codecs(options, path, source, name)
    return cast(GraphPass, _validate(cls, options, path, source, name))


def _validate(cls: type, options: Any, path: KeyPath, source: SourceMap, where: str) -> Any:
    """Return an instance of dataclass `cls`; types are strict: no `"4"` for 4."""
    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    try:
        return adapter.validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        raise as_recipe_error(error, path, source, where) from error
    except TypeError as error:
        rule = f"options must be plain data ({error})"
        raise RecipeError("KVX107", rule, where=where, at=source.at(path)) from error
    except KvxformError as error:
        raise _located(error, source.at(path)) from error


def _check_record(
    data: Mapping[str, Any], cls: type, path: KeyPath, source: SourceMap, where: str
) -> None:
    """Check keys against the fields of a dataclass or TypedDict, at every depth."""
    types = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else types
    known = [*names, "allow_zero"] if issubclass(cls, GraphPass) else names
    check_keys(data, known, path, source, where)
    for key, value in data.items():
        record = _record_type(types[key]) if key in types else None
        if record is not None and isinstance(value, Mapping):
            _check_record(value, record, (*path, key), source, where)


def _record_type(annotation: Any) -> type | None:
    """Return the dataclass or TypedDict that `annotation` is, alone or in a union."""
    for choice in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(choice) or is_typeddict(choice):
            return cast(type, choice)
    return None


def _check_codecs(options: Any, path: KeyPath, source: SourceMap, where: str) -> None:
    """Check the options of every codec, `{codec: name, ...}`, at any depth."""
    if not isinstance(options, Mapping):
        return
    for key, value in options.items():
        _check_codecs(value, (*path, str(key)), source, where)
    if "codec" not in options:
        return
    name = options["codec"]
    if name not in CODECS:
        raise RecipeError(
            "KVX103",
            "codec must be a known name",
            where=where,
            got=repr(name),
            at=source.at((*path, "codec")),
            hint=nearest_hint(str(name), CODECS),
        )
    own = {key: value for key, value in options.items() if key != "codec"}
    _check_codec_options(own, CODECS[name], path, source, f"{where}, codec {name}")
    try:
        make_codec(options)
    except KvxformError as error:
        raise _located(error, source.at(path)) from error


def _check_codec_options(
    options: Mapping[str, Any], cls: type[Codec], path: KeyPath, source: SourceMap, where: str
) -> None:
    """Check names and types of the options of one codec; codecs in them are checked before."""
    check_keys(options, [f.name for f in dataclasses.fields(cls)], path, source, where)
    types = get_type_hints(cls)
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if types[key] is not Codec:
            plain[key] = value
        elif not isinstance(value, Mapping) or "codec" not in value:
            rule = f"{key} must be a codec, {{codec: name, ...}}"
            at = source.at((*path, key))
            raise RecipeError("KVX107", rule, where=where, got=repr(value), at=at)
    _check_record(plain, cls, path, source, where)
    given = TypedDict("given", {key: types[key] for key in plain})  # type: ignore[misc]
    _validate(given, plain, path, source, where)


def _located(error: KvxformError, at: str) -> KvxformError:
    """Return `error` with its place filled in if it had none."""
    if error.at or not at:
        return error
    return type(error)(
        error.code, error.rule, where=error.where, got=error.got, at=at, hint=error.hint
    )
