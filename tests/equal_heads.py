"""Models whose KV heads are equal in groups, so that merging them changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from programs import token_ids
from torch import Tensor

from kvxform.calibrate import collect
from kvxform.ir.program import AttentionSite, Program, Projection


def calibrated(program: Program, windows: int = 2, window: int = 40) -> Program:
    """Return a program with statistics of random tokens."""
    ids = token_ids(program, windows, window, seed=3)
    return dataclasses.replace(program, calibration=collect(program, ids, name="random tokens"))


def equal_heads(program: Program, groups: int, images: Sequence[int] | None = None) -> Program:
    """Return a program in which KV heads are copies of the first one of their group.

    Args:
        program: Its projections of K may stand before a norm; then they are called like those
            of V, and gains of a norm over all heads are made equal too.
        groups: Groups of each layer.
        images: For each head the one that it is a copy of; by default the first of its group.
    """
    weights = dict(program.weights)
    for site in program.sites:
        heads = site.num_kv_heads
        copied = images or [head - head % (heads // groups) for head in range(heads)]
        for projection in (_keys(site), site.v):
            assert projection is not None, "values are plain"
            rows = projection.indices(heads, site.head_dim)
            for name, axis in (
                (projection.weight, int(projection.layout == "in_out")),
                (projection.bias, 0),
            ):
                if name is not None:
                    weights[name] = _copied(weights[name], axis, rows, copied)
        gain = f"{site.module}.k_norm.weight"
        if gain in weights and weights[gain].numel() == heads * site.head_dim:
            own = torch.arange(heads * site.head_dim).view(heads, -1)
            weights[gain] = _copied(weights[gain], 0, own, copied)
    return dataclasses.replace(program, weights=weights)


def _keys(site: AttentionSite) -> Projection:
    if site.k is not None:
        return site.k
    assert site.v is not None, "values are plain"
    bias = site.v.bias and site.v.bias.replace("v_proj", "k_proj")
    weight = site.v.weight.replace("v_proj", "k_proj")
    return dataclasses.replace(site.v, weight=weight, bias=bias)


def _copied(weight: Tensor, axis: int, rows: Tensor, copied: Sequence[int]) -> Tensor:
    values = weight.index_select(axis, rows[list(copied)].flatten())
    return weight.index_copy(axis, rows.flatten(), values)
