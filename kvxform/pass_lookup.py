"""Passes by name: our own, and those of installed packages, which are loaded when they are named.

A package offers a pass through an entry point whose name is the recipe name of the pass::

    [project.entry-points."kvxform.passes"]
    clip-keys = "my_package.clip_keys:ClipKeys"

Nothing of such a package is imported before a recipe or a listing asks for it, and a package that
is broken breaks nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import kvxform.passes  # noqa: F401  (fills the registry of passes)
from kvxform.errors import KvxformError, RecipeError, nearest_hint
from kvxform.pass_base import PASSES, GraphPass

GROUP = "kvxform.passes"
OURS = "kvxform"


@dataclass(frozen=True)
class PassOrigin:
    """Where a pass comes from.

    Attributes:
        name: Recipe name.
        origin: `kvxform`, or package and version.
        error: Why it cannot be loaded, or empty.
    """

    name: str
    origin: str
    error: str = ""


def find_pass(name: str) -> type[GraphPass]:
    """Return the pass called `name`; one of an installed package is loaded now.

    Raises:
        RecipeError: KVX104 if there is none, KVX221 if it is there and cannot be loaded, KVX222 if
            two packages claim the name.
    """
    if name in PASSES:
        return PASSES[name]
    points = [point for point in installed_points() if point.name == name]
    if not points:
        raise RecipeError(
            "KVX104",
            "pass must be a known name",
            got=repr(name),
            hint=nearest_hint(name, known_names()),
        )
    if len(points) > 1:
        raise _ambiguous(name, [origin_of(point) for point in points])
    return _load(points[0])


def known_names() -> list[str]:
    """Return the names of all passes, loaded or not."""
    return sorted({*PASSES, *(point.name for point in installed_points())})


def list_passes() -> list[PassOrigin]:
    """Load every pass there is, and say where each comes from; broken ones with the reason."""
    points = {point.name: point for point in installed_points()}
    found = []
    for name in known_names():
        origin, point = _own_origin(name), points.get(name)
        if point is not None and origin == OURS:
            clash = _ambiguous(name, [OURS, origin_of(point)])
            found.append(PassOrigin(name, origin_of(point), str(clash)))
        elif point is not None:
            origin = origin_of(point)
        try:
            find_pass(name)
        except KvxformError as error:
            found.append(PassOrigin(name, origin, str(error)))
        else:
            found.append(PassOrigin(name, origin))
    return found


@functools.cache
def installed_points() -> tuple[EntryPoint, ...]:
    """Return the entry points of all installed packages, in order; nothing is imported."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)))


def origin_of(point: EntryPoint) -> str:
    """Return the package of an entry point with its version."""
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _own_origin(name: str) -> str:
    """Return where a pass that is loaded comes from: `kvxform`, or its module; or empty."""
    module = PASSES[name].__module__ if name in PASSES else ""
    return OURS if module.startswith("kvxform.") else module


def _load(point: EntryPoint) -> type[GraphPass]:
    """Import a pass and register it under its name."""
    where, own = origin_of(point), dict(PASSES)
    try:
        cls = point.load()
    except Exception as error:  # whatever a module of somebody else raises
        PASSES.clear()
        PASSES.update(own)  # what it registered before it broke
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _broken(point.name, f"the module must be importable ({what})", where) from error
    problem = _problem(cls, point.name)
    taken = sorted(name for name in own if PASSES.get(name) is not own[name])
    if problem or taken:
        PASSES.clear()
        PASSES.update(own)
    if taken:
        raise _ambiguous(taken[0], [_own_origin(taken[0]), where])
    if problem:
        raise _broken(point.name, problem, where)
    PASSES[point.name] = cls
    found: type[GraphPass] = cls
    return found


def _problem(cls: object, name: str) -> str:
    """Return why an object is not the pass called `name`, or nothing."""
    if not (inspect.isclass(cls) and issubclass(cls, GraphPass)):
        return f"an entry point must be a class derived from GraphPass, not {cls!r}"
    if inspect.isabstract(cls) or not dataclasses.is_dataclass(cls):
        return "a pass must be a dataclass with match and rewrite"
    if cls.pass_name() != name:
        return f"the name of the entry point must be that of the pass, '{cls.pass_name()}'"
    return ""


def _broken(name: str, rule: str, where: str) -> RecipeError:
    return RecipeError("KVX221", rule, where=name, at=where, hint="mend or remove the package")


def _ambiguous(name: str, owners: list[str]) -> RecipeError:
    rule, hint = "a pass must have a name of its own", "remove one of the packages"
    return RecipeError("KVX222", rule, where=name, got=" and ".join(owners), hint=hint)
