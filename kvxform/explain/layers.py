"""Cut an explanation down to one layer."""

from __future__ import annotations

import dataclasses
import re

from kvxform.errors import KvxformError, nearest_hint
from kvxform.explain.pass_records import PlaceRecord
from kvxform.explain.records import Explanation

_BLOCK = re.compile(r"^(?:.*\.)?\d+(?=\.|$)")  # up to the last number of a path


def select_layer(explanation: Explanation, layer: str) -> Explanation:
    """Return what an explanation says about one layer.

    Args:
        explanation: Of a whole model.
        layer: Index of a raised site, or the path of a module, or the end of one.

    Raises:
        KvxformError: KVX801 if nothing was found there.
    """

    def fits(index: int | None, module: str) -> bool:
        return index == int(layer) if layer.isdigit() else f".{module}".endswith(f".{layer}")

    sites = tuple(s for s in explanation.sites if fits(s.layer, s.module))
    rejected = tuple(r for r in explanation.rejected if fits(None, r.module))
    if not sites and not rejected:
        raise _unknown(explanation, layer)
    layers = {s.layer for s in sites}
    blocks = {_block(m) for m in (*(s.module for s in sites), *(r.module for r in rejected))}

    def is_near(place: PlaceRecord) -> bool:
        if place.layer is not None:
            return place.layer in layers
        return not place.module or _block(place.module) in blocks

    passes = tuple(
        dataclasses.replace(p, places=tuple(filter(is_near, p.places))) for p in explanation.passes
    )
    return dataclasses.replace(explanation, sites=sites, rejected=rejected, passes=passes)


def _block(module: str) -> str:
    """Return the part of a path that a whole layer has in common."""
    found = _BLOCK.match(module)
    return found[0] if found else module


def _unknown(explanation: Explanation, layer: str) -> KvxformError:
    count = len(explanation.sites)
    hint = f"indices are 0 to {count - 1}" if count else "no attention was raised"
    if not layer.lstrip("-").isdigit():
        known = [s.module for s in explanation.sites] + [r.module for r in explanation.rejected]
        hint = nearest_hint(layer, known)
    rule = "a layer must be the index of a raised attention, or the path of a module"
    return KvxformError("KVX801", rule, got=repr(layer), hint=hint)
