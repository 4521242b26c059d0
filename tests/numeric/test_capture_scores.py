"""What attention does with its scores: found, named, and equal to the source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvxform.capture import capture
from kvxform.ir.program import Program, default_positions
from kvxform.ir.verify import verify_program
from tests.scored import SCALE, SINKS, SLOPES, WAYS, Weigh, alibi, capped, hide, scored, where

BOUND = 1e-12  # float64; the program adds up the same numbers in another order


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def largest_error(model: nn.Module, program: Program) -> float:
    """Return the largest difference of logits at several shapes, longer than any probe too."""
    module, worst = program.to_module(), 0.0
    for shape in ((2, 9), (1, 1), (1, 50)):
        ids = tokens(*shape)
        with torch.no_grad():
            got, want = module(ids, default_positions(ids)), model(ids)
        worst = max(worst, float((got - want).abs().max()))
    return worst


FOUND: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "long chunk": {"chunk": 40},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi inside the scale": {"alibi_slopes": SLOPES * SCALE},
    "sinks": {"sink_logits": SINKS},
    "shifted sinks": {"sink_logits": SINKS},
    "everything": {
        "softcap": 2.0,
        "window": 3,
        "alibi_slopes": SLOPES,
        "sink_logits": SINKS,
    },
}
OPTIONS = ("window", "chunk", "softcap", "sink_logits", "alibi_slopes")


@functools.cache
def every_way() -> tuple[nn.Module, Program]:
    """Return a model with one layer for each way, captured once for all tests."""
    model = scored(*WAYS.values())
    return model, capture(model).program


@pytest.mark.parametrize("name", WAYS)
def test_what_happens_to_scores_is_found(name: str) -> None:
    _, program = every_way()
    site = program.sites[list(WAYS).index(name)]
    assert site.scale == pytest.approx(SCALE, rel=1e-15)
    assert site.rope is not None
    for option in OPTIONS:
        found, want = getattr(site, option), FOUND[name].get(option)
        if isinstance(want, Tensor):
            assert torch.allclose(program.weights[found], want, rtol=1e-13, atol=0)
        else:
            assert found == want


def test_layers_that_weigh_scores_in_many_ways_equal_their_source() -> None:
    model, program = every_way()
    assert program.rejected == ()
    assert len(program.sites) == len(WAYS)
    verify_program(program)
    assert largest_error(model, program) <= BOUND


@pytest.mark.parametrize("cap", [50.0, 1000.0])
def test_a_softcap_far_above_the_scores_is_found(cap: float) -> None:
    """In float32, tanh does nothing to scores as small as those of random weights."""
    model = scored(lambda a, s: hide(torch.tanh(s * SCALE / cap) * cap).softmax(-1)).float()
    (site,) = capture(model).program.sites
    assert (site.softcap, site.scale) == (cap, pytest.approx(SCALE, rel=1e-6))


def test_sinks_of_the_model_are_the_weight_itself() -> None:
    _, program = every_way()
    layer = list(WAYS).index("sinks")
    assert program.sites[layer].sink_logits == f"blocks.{layer}.attention.sinks"


def cap_after_mask(a: nn.Module, s: Tensor) -> Tensor:
    return (torch.tanh(hide(s * SCALE) / 2.0) * 2.0).softmax(-1)


def cap_over_alibi(a: nn.Module, s: Tensor) -> Tensor:
    return hide(capped(s + alibi(a, s))).softmax(-1)


def squared_distance(a: nn.Module, s: Tensor) -> Tensor:
    t, p = where(s)
    return hide(s * SCALE - 0.1 * (t - p) ** 2).softmax(-1)


def moving_sink(a: nn.Module, s: Tensor) -> Tensor:
    sink = a.sinks[None, :, None, None] * where(s)[0].to(s.dtype) * torch.ones_like(s[..., :1])
    return torch.cat([hide(s * SCALE), sink], -1).softmax(-1)[..., :-1]


def sink_of_scores(a: nn.Module, s: Tensor) -> Tensor:
    return torch.cat([hide(s * SCALE), s[..., :1]], -1).softmax(-1)[..., :-1]


def scale_per_head(a: nn.Module, s: Tensor) -> Tensor:
    return hide(s * a.sinks[None, :, None, None]).softmax(-1)


def window_by_length(a: nn.Module, s: Tensor) -> Tensor:
    t, p = where(s)
    return s.masked_fill(~((t >= p) & (t - p <= s.shape[-1] // 2)), float("-inf")).softmax(-1)


def window_in_chunks(a: nn.Module, s: Tensor) -> Tensor:
    return hide(s * SCALE, window=3, chunk=4).softmax(-1)


NEAR_MISSES: Mapping[str, tuple[Weigh, str]] = {
    "cap after the mask": (cap_after_mask, "more than a scale, a softcap and a mask"),
    "cap over alibi": (cap_over_alibi, "more than a scale, a softcap and a mask"),
    "squared distance": (squared_distance, "not a slope times the distance"),
    "a sink that moves": (moving_sink, "not one constant per head"),
    "a sink of scores": (sink_of_scores, "not one constant per head"),
    "a scale per head": (scale_per_head, "more than a scale, a softcap and a mask"),
    "a window by the length": (window_by_length, "at length"),
    "a window in chunks": (window_in_chunks, "neither causal nor a sliding window nor chunks"),
}


@functools.cache
def every_near_miss() -> tuple[nn.Module, Program]:
    """Return a model of one plain layer and one for each near miss."""
    model = scored(WAYS["plain"], *(weigh for weigh, _ in NEAR_MISSES.values()))
    return model, capture(model).program


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_in_the_graph(name: str) -> None:
    _, program = every_near_miss()
    layer = 1 + list(NEAR_MISSES).index(name)
    (rejected,) = (r for r in program.rejected if r.module == f"blocks.{layer}.attention")
    assert NEAR_MISSES[name][1] in rejected.reason


def test_a_model_with_near_misses_still_equals_its_source() -> None:
    model, program = every_near_miss()
    assert [s.module for s in program.sites] == ["blocks.0.attention"]
    assert largest_error(model, program) <= BOUND
