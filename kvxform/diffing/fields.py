"""Sites and plans as flat fields, without names of weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from kvxform.diffing.outline_nodes import LayerFields, OutlinePort
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.types import TensorType

_LONGEST = 8  # numbers of a constant that are fields of their own
_NAMED = frozenset({"tokenizer_path", "name"})  # of a model; says nothing of what it computes


def whole_fields(program: Program) -> tuple[tuple[str, Any], ...]:
    """Return fields of the model and of the layout of its cache, sorted by path."""
    info = {k: v for k, v in dataclasses.asdict(program.info).items() if k not in _NAMED}
    layout = dataclasses.asdict(program.plan.layout) if program.plan else {}
    return tuple(sorted(flatten({"model": info, "layout": layout})))


def site_fields(site: AttentionSite, weights: Mapping[str, Tensor]) -> LayerFields:
    """Return the geometry of a site; weights are there by their type."""
    data = dataclasses.asdict(site)
    for name in ("layer", "module", "notes", "q", "k", "v", "o"):
        del data[name]
    for name in ("sink_logits", "alibi_slopes"):
        data[name] = _weight_type(data[name], weights)
    if site.shared_with is not None:
        data["shared_with"] = site.shared_with - site.layer
    if site.rope is not None:
        data["rope"]["inv_freq"] = _weight_type(site.rope.inv_freq, weights)
    for part in ("latent", "residual"):
        if data[part] is not None:
            data[part] = {k: v for k, v in data[part].items() if isinstance(v, bool | int)}
    for stream in ("k_basis", "v_basis"):
        data[stream] = _basis(data[stream], weights)
    return LayerFields(site.layer, tuple(sorted(flatten(data))))


def plan_fields(site: SitePlan, weights: Mapping[str, Tensor]) -> LayerFields:
    """Return what a layer stores; fields of streams begin with `key.` or `value.`."""
    data = dataclasses.asdict(site)
    del data["layer"]
    data["owner"] = site.owner - site.layer
    for stream in ("key", "value"):
        data[stream].pop("planes", None)  # they follow from the codec, and are ports
        if "basis" in data[stream]:
            data[stream]["basis"] = _basis(data[stream]["basis"], weights)
    return LayerFields(site.layer, tuple(sorted(flatten(data))))


def cache_ports(plan: CachePlan) -> Iterator[OutlinePort]:
    """Yield the stored planes of every layer that owns a cache."""
    for site in plan.owners:
        for name, stream in site.streams.items():
            for plane in stream.planes:
                heads = plane.heads(site.num_kv_heads)
                shape = f"{plane.dtype}[{heads}, T, {plane.width}]"
                if plane.tokens_per_row != 1:
                    shape = f"{plane.dtype}[{heads}, T/{plane.tokens_per_row}, {plane.width}]"
                yield OutlinePort("cache", f"{name}.{plane.name}", shape, site.layer)


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value by path; long constants as their shape, and a digest beside it."""
    for name, value in data.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        elif isinstance(value, list | tuple):
            yield from _sequence(path, value)
        elif value is not None:
            yield path, value


def _sequence(path: str, value: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    sizes, inner = [], value
    while isinstance(inner, list | tuple) and inner:
        sizes.append(len(inner))
        inner = inner[0]
    text = json.dumps(value)
    if math.prod(sizes) <= _LONGEST:
        yield path, text
        return
    yield path, f"{' x '.join(map(str, sizes))} numbers"
    yield f"{path}.digest", hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _basis(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    types = {name: _weight_type(data[name], weights) for name in ("weight", "inverse")}
    unused = {"block": 0, "heads": 1}  # as other kinds have them
    return {k: v for k, v in {**data, **types}.items() if k not in unused or v != unused[k]}


def _weight_type(name: str | None, weights: Mapping[str, Tensor]) -> str | None:
    if name is None:
        return None
    weight = weights[name]
    return str(TensorType(weight.dtype, tuple(weight.shape)))
