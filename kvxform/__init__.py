"""kvxform: a compiler for the KV cache of decoder language models.

- `optimize(model, recipe)` rewrites a model and returns an `OptimizedModel`
- `bisect(model, recipe)` finds the pass that breaks a recipe, and a small program that shows it
- `heal(path, source)` trains what lossy structure passes touched, against the source
- `diff(a, b)` says what differs between two models or builds, in which layers, and why
- `load(path)` opens what `OptimizedModel.save` wrote
- `verify_artifact(path)` checks the cache of a finished model in every schedule
- `Recipe` is an ordered list of passes with options
- every error is a `KvxformError` with a stable code

Importing kvxform is quick: torch is imported when the first of the others is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvxform.errors import (
    ArtifactError,
    CacheFullError,
    CaptureError,
    CodegenError,
    KvxformError,
    PassError,
    RecipeError,
    VerifyError,
)

if TYPE_CHECKING:
    from kvxform.api import heal, load, optimize
    from kvxform.bisecting.bisecting import bisect
    from kvxform.differ.comparing import diff
    from kvxform.recipe import Recipe
    from kvxform.verifying import verify_artifact

    __version__: str

__all__ = [
    "ArtifactError",
    "CacheFullError",
    "CaptureError",
    "CodegenError",
    "KvxformError",
    "PassError",
    "Recipe",
    "RecipeError",
    "VerifyError",
    "__version__",
    "bisect",
    "diff",
    "heal",
    "load",
    "optimize",
    "verify_artifact",
]
_HOMES = {
    "Recipe": "kvxform.recipe",
    "bisect": "kvxform.bisecting.bisecting",
    "diff": "kvxform.differ.comparing",
    "heal": "kvxform.api",
    "load": "kvxform.api",
    "optimize": "kvxform.api",
    "verify_artifact": "kvxform.verifying",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kvxform")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvxform' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
