"""Models made by a function in a Python file: `model.py:make_model`.

This runs the file, as `python model.py` would: name only files that you trust. Neither artifacts
nor recipes can name one; locks can.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.export import ExportedProgram

from kvxform.errors import CaptureError

_FORM = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_SEED = 0


def split_factory(source: str) -> tuple[str, str] | None:
    """Return file and function of a source like `model.py:make_model`; None for all others."""
    found = _FORM.fullmatch(source)
    return None if found is None else (found["file"], found["function"])


def call_factory(file: str, function: str) -> nn.Module | ExportedProgram:
    """Run a Python file as a module and return what one of its functions returns.

    As for a script, modules beside the file can be imported. Random numbers are seeded, so that a
    model with random weights is always the same one.

    Args:
        file: Path of the file.
        function: Name of a function without required arguments.

    Raises:
        CaptureError: KVX301 if there is no such file or function, it fails, or it returns no model.
    """
    path, label = Path(file).expanduser(), f"{file}:{function}"
    if not path.is_file():
        _refuse(label, "no such file")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = _call(path.resolve(), function)
    except Exception as failure:  # it is other people's code
        line = next(iter(str(failure).strip().splitlines()), "")
        got = f"{type(failure).__name__}: {line}"[:200]
        raise _error(label, got) from failure
    if not isinstance(model, nn.Module | ExportedProgram):
        _refuse(label, f"a {type(model).__name__}")
    return model


def _call(path: Path, function: str) -> Any:
    name = f"_kvxform_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "its suffix is .py"
    assert spec.loader is not None, "likewise"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[name]


def _refuse(label: str, got: str) -> NoReturn:
    raise _error(label, got)


def _error(label: str, got: str) -> CaptureError:
    return CaptureError(
        "KVX301",
        "a source FILE.py:FUNCTION must be a function without arguments that returns a model",
        where="capture",
        got=got,
        at=label,
    )
