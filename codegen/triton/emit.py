"""Spec to text: one self-contained, formatted Python file for each kernel spec.

All choices are made here, in Python and Jinja, so that the text has none left: no branch on a
format, no parameter that this kernel does not use. Equal specs give equal bytes.

Every template gets, besides the variables of its `Emission`: `spec`; `title` and `plan_lines`,
which `_header.jinja` prints; and `interpret`. Filters `plus`, `times` and `over` write an operation
with a number, or nothing where it would change nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jinja2

from kvxform.codegen.triton.describe import bytes_per_token, plan_lines, title
from kvxform.codegen.triton.formatting import format_python
from kvxform.codegen.triton.registry import find_emitter
from kvxform.codegen.triton.spec import KernelSpec
from kvxform.errors import CodegenError

# Jinja could parse templates for this, but that takes longer than to render them.
_REFERENCE = re.compile(r"""{%-?\s*(?:include|import|from|extends)\s+["']([^"']+)["']""")
MOST_NUMBERS = 16  # of a table in the meta data


@dataclass(frozen=True, eq=False)
class KernelSource:
    """One emitted file.

    Attributes:
        name: Name of the module: the kind and a hash of all that the text depends on.
        text: Python source.
        meta: What the text ends with, as `__kvx_meta__`.
        spec: What it was emitted from.
    """

    name: str
    text: str
    meta: dict[str, Any]
    spec: KernelSpec


@functools.lru_cache(maxsize=256)
def emit(spec: KernelSpec, *, interpret: bool = False) -> KernelSource:
    """Return the source of the kernel of `spec`.

    Args:
        spec: What to emit.
        interpret: Emit the twin that Triton's interpreter can run: plain arithmetic in place of
            inline assembly, plain Triton in place of Gluon.

    Raises:
        CodegenError: KVX401 if no kernel can be emitted for the spec.
    """
    emission = find_emitter(spec)(spec, interpret=interpret)
    environment = _environment()
    meta = _make_meta(spec, emission.template, interpret)
    digest = _hash(json.dumps(meta, sort_keys=True))
    name = f"{spec.kind}_{digest[:12]}" + ("_interpret" if interpret else "")
    body = environment.get_template(emission.template).render(
        **emission.variables,
        spec=spec,
        title=title(spec),
        plan_lines=plan_lines(spec),
        interpret=interpret,
    )
    text = format_python(f"{body.rstrip()}\n\n\n__kvx_meta__ = {meta!r}\n", name)
    _check(text, name)
    return KernelSource(name, text, meta, spec)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvxform.codegen.triton", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the text is Python, not HTML
    )
    environment.filters |= {"plus": _plus, "times": _times, "over": _over}
    return environment


def _plus(number: int) -> str:
    """Return ` + number`, or nothing for 0; likewise `_times` and `_over` for 1."""
    return f" + {number}" if number else ""


def _times(number: int) -> str:
    return f" * {number}" if number != 1 else ""


def _over(number: int) -> str:
    return f" // {number}" if number != 1 else ""


def _make_meta(spec: KernelSpec, template: str, interpret: bool) -> dict[str, Any]:
    data = json.loads(json.dumps(spec.to_json()))  # tuples become lists, as in a file
    stored = bytes_per_token(spec)
    return {
        "kernel": spec.kind,
        "interpret": interpret,
        "spec": _shorten(data),
        "spec_hash": _hash(json.dumps(data, sort_keys=True))[:16],
        "template_hash": _hash(_template_text(template))[:16],
        "versions": {"kvxform": metadata.version("kvxform"), "triton": triton_version()},
        "bytes_per_token": stored,
        # No kernel can be quicker than the memory: microseconds for a million tokens.
        "byte_limit_us_per_million_tokens": {
            f"{bandwidth} GB/s": round(stored * 1e3 / bandwidth, 3) for bandwidth in (1000, 3000)
        },
    }


def _shorten(data: Any) -> Any:
    """Replace long tables, which the text holds anyway, by how many numbers they have."""
    if isinstance(data, dict):
        return {name: _shorten(value) for name, value in data.items()}
    if isinstance(data, list) and len(data) > MOST_NUMBERS:
        return f"{len(data)} numbers, {_hash(json.dumps(data))[:16]}"
    return data


def triton_version() -> str:
    """Return the version of Triton that is installed, or `none`."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _template_text(name: str) -> str:
    """Return the source of a template and of all that it imports or includes."""
    environment = _environment()
    assert environment.loader is not None, "set in `_environment`"
    sources: dict[str, str] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in sources:
            sources[current] = environment.loader.get_source(environment, current)[0]
            waiting += _REFERENCE.findall(sources[current])
    return json.dumps(sources, sort_keys=True)


def _check(text: str, name: str) -> None:
    """Raise unless the text stands alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "kvxform":
                raise CodegenError(
                    "KVX402", "an emitted kernel must not need kvxform", where=name, got=module
                )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
