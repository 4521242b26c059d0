"""One HTML page from a template: no network, no scripts, readable in light and dark."""

from __future__ import annotations

import functools
import re
from typing import Any

import jinja2
from markupsafe import Markup

from kvxform.formats import format_bytes, format_number, format_percent, format_ratio

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def render_page(template: str, **values: Any) -> str:
    """Return the page that `template`, a file beside this one, makes of `values`."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvxform", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    environment.filters.update(
        bytes=format_bytes, number=format_number, percent=format_percent, ratio=format_ratio
    )
    return environment


def _printable(value: Any) -> Any:
    """Return text without control characters, which HTML has no place for; anything else as is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)
