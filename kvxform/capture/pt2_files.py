"""Open .pt2 files without running what is in them.

`torch.export.load` may unpickle objects, evaluate expressions of sizes as Python, and look up any
function of torch by name. So a file is read before it is given to torch: it may hold plain tensors
only, expressions of sizes only, and calls of operators only. All files that torch writes for models
of plain tensors are such.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from kvxform.errors import CaptureError

_PARTS = re.compile(
    r"[^/]*/(?:models/[^/]+\.json|data/(?:weights|constants)/[^/.]+(?:_config\.json)?"
    r"|data/sample_inputs/[^/]+\.pt|archive_format|archive_version|byteorder|\.data/\w+)"
)
_CONFIG = re.compile(r".*/data/(weights|constants)/[^/]+_config\.json")
_TARGET = re.compile(r"torch\.ops\.(?:aten|higher_order)(?:\.\w+)+|_operator\.\w+|math\.\w+")
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),.<>=&|~']{1,1000}", re.ASCII)
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_KNOWN = re.compile(
    r"""z?[suf]+\d+  # a symbol, or a function or a property of one
    | Abs | Add | And | CeilDiv | CeilToInt | CleanDiv | Eq | False | Float | FloatPow
    | FloatTrueDiv | FloorDiv | FloorToInt | Ge | Gt | Identity | IntTrueDiv | Integer | Le | Lt
    | Max | Min | Mod | ModularIndexing | Mul | Ne | Not | Or | Pow | PowByNatural | PythonMod
    | Rational | RoundToInt | Symbol | ToFloat | True | TruncToInt | Where
    | commutative | int_oo | integer | nonnegative | oo | positive | precision""",
    re.VERBOSE | re.ASCII,
)
_CALLED = ("target", "as_operator")
_IMPORTS = "default_factory_module"  # of a container that names a module to import


def open_pt2(path: Path) -> ExportedProgram:
    """Return the exported program in a file.

    Raises:
        CaptureError: KVX301 if the file is damaged, or holds more than tensors and a graph.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            problem = next(_problems(archive), None)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _refuse(path, f"it cannot be read ({type(error).__name__})") from error
    if problem is not None:
        raise _refuse(path, problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that buffers may not be writable
        try:
            return torch.export.load(io.BytesIO(content))
        except Exception as error:  # of many kinds, for files of other versions of torch too
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise _refuse(path, first[:200]) from error


def _problems(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield what in an archive is not data, in words."""
    for name in archive.namelist():
        if not _PARTS.fullmatch(name):
            yield f"it holds {name!r}, which is no part of a plain exported program"
        elif "/models/" in name:
            yield from _graph_problems(json.loads(archive.read(name)))
        elif _CONFIG.fullmatch(name):
            yield from _tensor_problems(json.loads(archive.read(name)))
        elif "/data/sample_inputs/" in name:
            yield from _input_problems(archive.read(name))


def _tensor_problems(config: dict[str, Any]) -> Iterator[str]:
    for name, entry in config["config"].items():
        is_tensor = str(entry["path_name"]).startswith(("weight_", "tensor_"))
        if entry["use_pickle"] is not False or not is_tensor:
            yield f"{name} is pickled, and reading it could run code"


def _input_problems(content: bytes) -> Iterator[str]:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever the restricted reader does not know
        yield "its sample inputs are no plain tensors"


def _graph_problems(data: Any, key: str = "") -> Iterator[str]:
    """Yield calls and expressions that could run code; the whole file is walked."""
    if isinstance(data, dict):
        for name, value in data.items():
            if key == "range_constraints" and not _is_expression(name):
                yield f"{name[:80]!r} is no symbol of a size"
            yield from _graph_problems(value, name)
    elif isinstance(data, list):
        for item in data:
            yield from _graph_problems(item, key)
    elif isinstance(data, str):
        if key in _CALLED and not _TARGET.fullmatch(data):
            yield f"{data[:80]!r} is no operator"
        elif key == "expr_str" and not _is_expression(data):
            yield f"{data[:80]!r} is no expression of sizes"
        elif _IMPORTS in data:
            yield "its inputs or outputs name a module to import"


def _is_expression(text: str) -> bool:
    """Whether a text has numbers, symbols of sizes and known functions alone."""
    if not _EXPRESSION.fullmatch(text) or re.search(r"\.\s*[A-Za-z_]", text):
        return False
    return all(map(_KNOWN.fullmatch, _WORD.findall(text)))


def _refuse(path: Path, why: str) -> CaptureError:
    rule = "a .pt2 file must hold a graph and plain tensors, and nothing that could run code"
    hint = "save the program again with torch.export.save, or open it yourself and pass it"
    return CaptureError("KVX301", rule, where="capture", got=f"{path.name}: {why}", hint=hint)
