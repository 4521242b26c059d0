"""Models in which a structure pass changes nothing: equal K and V, layers that add nothing."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvxform.ir.program import AttentionSite, Program, Projection

BACK = ("o_proj", "down_proj", "c_proj", "dense", "fc2", ".o.", ".down.")


def still(program: Program) -> Program:
    """Return a program whose layers write nothing to the residual stream."""
    weights = {
        name: torch.zeros_like(weight) if any(part in name for part in BACK) else weight
        for name, weight in program.weights.items()
    }
    return dataclasses.replace(program, weights=weights)


def equal_keys_and_values(program: Program) -> Program:
    """Return a program whose W_v is its W_k, biases too."""
    weights = dict(program.weights)
    for site in program.sites:
        k, v = site.k, site.v
        assert k is not None, "the model has plain projections"
        assert v is not None, "the model has plain projections"
        axis = int(k.layout == "in_out")
        for name, other, along in ((k.weight, v.weight, axis), (k.bias, v.bias, 0)):
            if name is not None and other is not None:
                rows = weights[name].index_select(along, _rows(site, k))
                weights[other] = weights[other].index_copy(along, _rows(site, v), rows)
    return dataclasses.replace(program, weights=weights)


def _rows(site: AttentionSite, projection: Projection) -> Tensor:
    return projection.indices(site.num_kv_heads, site.head_dim).flatten()
