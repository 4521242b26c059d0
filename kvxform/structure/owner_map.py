"""Owner maps: which layer's keys and values each layer reads, and which layers may share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kvxform.errors import PassError, RecipeError
from kvxform.ir.program import AttentionSite, Program, RopeSpec

OwnerMap = Mapping[int, int]  # layer -> layer whose keys and values it reads


def every_nth(layers: Sequence[int], n: int) -> dict[int, int]:
    """Return the map in which the first of every `n` layers owns the cache of all of them.

    Source: Cross-Layer Attention, arXiv 2405.12981, section 2.2 (CLA2 is n = 2).
    """
    return {layer: layers[index // n * n] for index, layer in enumerate(layers)}


def read_owner_map(path: str, layers: Sequence[int], where: str) -> dict[int, int]:
    """Read a map from a JSON or YAML file: `{reader: owner}`, or a list, an owner a layer.

    Args:
        path: The file; JSON is read as YAML.
        layers: Layers of the model, in order; what a list counts.
        where: Pass that asks, for the error text.

    Raises:
        RecipeError: KVX107 if the file cannot be read or is no such map.
    """
    rule = "file must be a JSON or YAML map of layers, reader: owner, or a list of owners"
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError("KVX107", rule, where=where, got=reason) from error
    if isinstance(data, list):
        if len(data) != len(layers):
            got = f"{len(data)} owners for {len(layers)} layers"
            raise RecipeError("KVX107", rule, where=where, got=got, at=Path(path).name)
        data = dict(zip(layers, data, strict=True))
    if not isinstance(data, dict):
        raise RecipeError("KVX107", rule, where=where, got=type(data).__name__, at=Path(path).name)
    return as_owner_map(data, where)


def as_owner_map(data: Mapping[Any, Any], where: str) -> dict[int, int]:
    """Return plain data, such as `{"3": 2}`, as a map.

    Raises:
        RecipeError: KVX107 if a key or value is no layer number.
    """
    found = {}
    for reader, owner in data.items():
        if not str(reader).isdigit() or isinstance(owner, bool) or not str(owner).isdigit():
            rule = "a map must name layers by number, reader: owner"
            raise RecipeError("KVX107", rule, where=where, got=json.dumps({str(reader): owner}))
        found[int(reader)] = int(owner)
    return found


def resolve(present: OwnerMap, wanted: OwnerMap, where: str) -> dict[int, int]:
    """Return the root owner of every layer once `wanted` holds: chains are followed to their end.

    Args:
        present: Owner of every layer of the model.
        wanted: Owners to be, of some layers.
        where: Pass that asks, for the error text.

    Raises:
        PassError: KVX205 if a layer does not exist, or an owner comes after its reader.
    """
    for reader, owner in wanted.items():
        for layer in (reader, owner):
            if layer not in present:
                rule = "a map must name layers of the model"
                hint = f"it has {min(present)} to {max(present)}"
                raise PassError("KVX205", rule, where=where, got=layer, hint=hint)
        if owner > reader:
            rule = "an owner must come before the layers that read its cache"
            raise PassError("KVX205", rule, where=where, got=f"layer {reader} reading {owner}")
    roots: dict[int, int] = {}
    for layer in sorted(present):  # owners come first
        owner = {**present, **wanted}[layer]
        roots[layer] = layer if owner == layer else roots[owner]
    return roots


def disagreement(program: Program, owner: int, reader: int) -> str:
    """Return why `reader` cannot read the cache of `owner`, or an empty text if it can.

    What makes keys and values is the owner's: its projections, biases, norms and the RoPE of its
    keys. What the reader's queries and outputs rely on must be the same.
    """
    a, b = program.site(owner), program.site(reader)
    for name, what in _PROPERTIES.items():
        mine, other = getattr(b, name), getattr(a, name)
        if mine != other:
            return f"layer {reader} has {what} {mine}, layer {owner} {other}"
    problem = _rope_disagreement(program.weights, a.rope, b.rope)
    if problem:
        return f"layer {reader} has {problem} than layer {owner}"
    for stream, mine, other in (
        ("keys", b.k_basis, a.k_basis),
        ("values", b.v_basis, a.v_basis),
    ):
        if mine != other:
            return f"layer {reader} expects {stream} in another basis than layer {owner} stores"
    return ""


_PROPERTIES = {
    "payload": "payload",
    "num_kv_heads": "KV heads:",
    "head_dim": "a head_dim of",
    "v_head_dim": "a head_dim of values of",
    "window": "a window of",
    "chunk": "chunks of",
}


def _rope_disagreement(
    weights: Mapping[str, Tensor], a: RopeSpec | None, b: RopeSpec | None
) -> str:
    if a is None or b is None:
        return "" if a is b else "another position encoding"
    if (a.rotary_dim, a.attention_scaling, a.interleaved) != (
        b.rotary_dim,
        b.attention_scaling,
        b.interleaved,
    ):
        return "another form of RoPE"
    same = _same_values(weights, a.inv_freq, b.inv_freq)
    return "" if same else "other frequencies of RoPE"


def _same_values(weights: Mapping[str, Tensor], a: str, b: str) -> bool:
    """Whether two weights hold the same; without values, equal shapes are all that is known."""
    left, right = weights[a], weights[b]
    if a == b or left is right:
        return True
    if left.shape != right.shape:
        return False
    return left.is_meta or torch.equal(left, right)


def owners_of(sites: Sequence[AttentionSite]) -> dict[int, int]:
    """Return the owner of every layer."""
    return {site.layer: site.owner for site in sites}
