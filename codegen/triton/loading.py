"""Emitted text to a Python module, with a file behind it that tracebacks and Triton can read."""

from __future__ import annotations

import contextlib
import linecache
import sys
from pathlib import Path
from types import ModuleType

from kvxform.atomic import write_atomically
from kvxform.codegen.triton.emit import KernelSource
from kvxform.folders import cache_folder

_PREFIX = "kvxform_kernels_"  # modules of emitted kernels in `sys.modules`


def load(source: KernelSource) -> ModuleType:
    """Return the module of an emitted kernel; the same one for each call in a process.

    The text in memory is what runs. The file is written for people, tracebacks and profilers, and
    is never read back.
    """
    known = sys.modules.get(_PREFIX + source.name)
    if known is not None:
        return known
    path = cache_folder() / "kernels" / f"{source.name}.py"
    _write(path, source.text)
    lines = source.text.splitlines(keepends=True)
    # Triton asks `inspect` for the source of a kernel, also where the file could not be written.
    linecache.cache[str(path)] = (len(source.text), None, lines, str(path))
    module = ModuleType(_PREFIX + source.name, doc=None)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source.text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _write(path: Path, text: str) -> None:
    """Write the file unless it has that content; a full or read-only disk is no error."""
    data = text.encode()
    with contextlib.suppress(OSError):
        if path.exists() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
