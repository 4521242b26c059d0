"""One HTML page from a template: no network, no scripts, readable in light and dark."""

from __future__ import annotations

from typing import Any

import jinja2

from kvxform.formats import format_bytes, format_number, format_percent, format_ratio


def render_page(template: str, **values: Any) -> str:
    """Return the page that `template`, a file beside this one, makes of `values`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvxform", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        bytes=format_bytes, number=format_number, percent=format_percent, ratio=format_ratio
    )
    return environment.get_template(template).render(**values)
