"""Rotations in front of per-token integers: what QuaRot and SAW-INT4 promise of their caches."""

from __future__ import annotations

import pytest
import torch
from distortion import normal_vectors

from kvxform.codecs.base import make_codec
from kvxform.codecs.basis import Basis
from kvxform.codecs.integer import IntCodec
from kvxform.recipe import load_recipe

INT4 = IntCodec(bits=4)


def stored_error(basis: Basis, x: torch.Tensor) -> float:
    decoded = basis.unrotate(INT4.decode(INT4.encode(basis.rotate(x)), torch.float64))
    return float((decoded - x).square().sum() / x.square().sum())


def keys_with_an_outlier_channel() -> torch.Tensor:
    x = normal_vectors(2048).double()
    x[:, 9] = x[:, 9] * 4 + 40
    return x


def test_wider_blocks_spread_an_outlier_channel_further():
    x = keys_with_an_outlier_channel()
    errors = [stored_error(Basis(), x)]
    errors += [stored_error(Basis("hadamard", block), x) for block in (16, 64, 128)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 5 * errors[-1]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("block", [16, 128])
def test_rotation_keeps_norms_and_scores(block, seed):
    basis = Basis("hadamard", block, seed)
    q, k = normal_vectors(64).double(), keys_with_an_outlier_channel()
    assert torch.allclose(basis.rotate(k).norm(dim=-1), k.norm(dim=-1), rtol=1e-12)
    assert torch.allclose(basis.rotate(q) @ basis.rotate(k).T, q @ k.T, rtol=0, atol=1e-10)


def key_options(recipe: str) -> dict[str, object]:
    (step,) = (step for step in load_recipe(recipe).passes if step.name == "quantize-kv")
    return dict(step.options["key"])


def test_saw_int4_is_quarot_without_clipping():
    steps = {name: key_options(name) for name in ("quarot-kv4", "saw-int4")}
    assert steps["quarot-kv4"].pop("clip") == 0.95
    assert steps["quarot-kv4"] == steps["saw-int4"]
    x = Basis("hadamard", 128).rotate(keys_with_an_outlier_channel())
    quarot, saw = (make_codec(steps[name]) for name in ("quarot-kv4", "saw-int4"))
    assert all(torch.equal(a, saw.encode(x)[name]) for name, a in quarot.encode(x).items())


def test_clipping_pays_on_rotated_keys():
    x = Basis("hadamard", 128).rotate(keys_with_an_outlier_channel()).float()
    errors = []
    for recipe in ("saw-int4", "quarot-kv4"):
        codec = make_codec(key_options(recipe))
        errors.append(float((codec.decode(codec.encode(x), torch.float32) - x).square().mean()))
    assert errors[1] < errors[0]
