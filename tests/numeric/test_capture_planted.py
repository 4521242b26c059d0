"""Planted faults: whatever was measured wrong, the proof before the swap must refuse it.

The model is right and capture measures it right; then one measured value is corrupted on its way
to the raised op, in one layer of two. That layer must stay as it was, and the logits with it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import kvxform.capture.sites as sites
from kvxform.capture.attention import Proposal
from kvxform.capture.capturing import raise_graph
from kvxform.capture.exporting import export_module, make_functional, prepare
from kvxform.capture.masks import MaskKind
from kvxform.capture.normalise import normalise
from kvxform.capture.operands import Operand, Operands
from kvxform.capture.probing import Prober
from kvxform.ir.program import ModelInfo, default_positions
from tests.scored import WAYS, everything, scored

Fault = Callable[[Prober, Any], Any]
HALF = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])


def on_operands(**faults: Callable[[Prober, Operand], Operand]) -> Fault:
    """Return a fault of some of q, k and v."""

    def corrupt(prober: Prober, found: Operands) -> Operands:
        return replace(
            found, **{n: fault(prober, getattr(found, n)) for n, fault in faults.items()}
        )

    return corrupt


def on_index(change: Callable[[Tensor], Tensor]) -> Callable[[Prober, Operand], Operand]:
    """Return a fault of which features are heads, `[heads, head_dim]`."""
    return lambda _, found: replace(
        found, heads=replace(found.heads, index=change(found.heads.index))
    )


def detuned(pair: int) -> Callable[[Prober, Operand], Operand]:
    """Return a fault of one frequency, by one percent."""

    def corrupt(prober: Prober, found: Operand) -> Operand:
        assert found.rotary is not None
        wrong = prober.weights[found.rotary.inv_freq].clone()
        wrong[pair] *= 1.01
        name = f"wrong_{pair}"
        prober.weights[name] = wrong
        return replace(found, rotary=replace(found.rotary, inv_freq=name))

    return corrupt


def on_rotary(**changes: Any) -> Callable[[Prober, Operand], Operand]:
    return lambda _, found: replace(found, rotary=replace(found.rotary, **changes))


def on_mask(**changes: Any) -> Fault:
    return lambda _, found: replace(found, **changes)


def times_slopes(factor: float) -> Fault:
    def corrupt(_: Prober, found: MaskKind) -> MaskKind:
        assert found.slopes is not None
        return replace(found, slopes=found.slopes * factor)

    return corrupt


def other_heads(_: Prober, found: MaskKind) -> MaskKind:
    assert found.slopes is not None
    return replace(found, slopes=found.slopes.roll(1))


def wrong_scale(_: Prober, found: Proposal) -> Proposal:
    return replace(found, scale=found.scale * 1.01)


def wrong_cap(_: Prober, found: Proposal) -> Proposal:
    assert found.softcap is not None
    return replace(found, softcap=found.softcap * 1.01)


def wrong_sinks(prober: Prober, found: Proposal) -> Proposal:
    assert found.sink_logits is not None
    prober.weights["wrong"] = prober.weights[found.sink_logits] + 0.01
    return replace(found, sink_logits="wrong")


FAULTS: Mapping[str, tuple[str, Fault]] = {
    "scale off by one percent": ("propose", wrong_scale),
    "softcap off by one percent": ("propose", wrong_cap),
    "no softcap": ("propose", lambda _, found: replace(found, softcap=None)),
    "sinks off": ("propose", wrong_sinks),
    "no sinks": ("propose", lambda _, found: replace(found, sink_logits=None)),
    "window one longer": ("classify", on_mask(window=4)),
    "window one shorter": ("classify", on_mask(window=2)),
    "no window": ("classify", on_mask(window=None)),
    "chunks instead of a window": ("classify", on_mask(window=None, chunk=3)),
    "slopes off by one percent": ("classify", times_slopes(1.01)),
    "slopes of the other sign": ("classify", times_slopes(-1.0)),
    "slopes of other heads": ("classify", other_heads),
    "no slopes": ("classify", on_mask(slopes=None)),
    "channels of k permuted": ("trace_operands", on_operands(k=on_index(lambda i: i[:, HALF]))),
    "channels of v permuted": ("trace_operands", on_operands(v=on_index(lambda i: i.flip(1)))),
    "KV heads swapped in k": ("trace_operands", on_operands(k=on_index(lambda i: i.flip(0)))),
    "KV heads swapped in k and v": (
        "trace_operands",
        on_operands(k=on_index(lambda i: i.flip(0)), v=on_index(lambda i: i.flip(0))),
    ),
    "query heads rolled": ("trace_operands", on_operands(q=on_index(lambda i: i.roll(1, 0)))),
    "a frequency off in q": ("trace_operands", on_operands(q=detuned(1))),
    "a frequency off in k": ("trace_operands", on_operands(k=detuned(1))),
    "a frequency off in both": ("trace_operands", on_operands(q=detuned(1), k=detuned(1))),
    "two frequencies off": ("trace_operands", on_operands(q=detuned(1), k=detuned(2))),
    "neighbours as pairs": (
        "trace_operands",
        on_operands(q=on_rotary(interleaved=True), k=on_rotary(interleaved=True)),
    ),
}


@functools.cache
def source() -> nn.Module:
    """Return the model: first the layer that is corrupted, then a plain one."""
    return scored(everything, WAYS["plain"])


@functools.cache
def normalised() -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph of the source before anything is raised."""
    exported = export_module(prepare(source()))
    return normalise(make_functional(exported))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_by_the_proof(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, corrupt = FAULTS[name]
    measure, calls = getattr(sites, step), []

    def corrupted(prober: Prober, *args: Any) -> Any:
        found = measure(prober, *args)
        calls.append(found)
        return corrupt(prober, found) if len(calls) == 1 else found

    monkeypatch.setattr(sites, step, corrupted)
    graph, weights = normalised()
    info = ModelInfo("planted", "plain", 0)
    program = raise_graph(copy.deepcopy(graph), dict(weights), info)
    assert len(calls) == 2
    assert [site.module for site in program.sites] == ["blocks.1.attention"]
    (rejected,) = program.rejected
    assert rejected.reason.startswith("kvx::attention differs from it by")
    ids = torch.arange(11)[None] * 7 % 97
    with torch.no_grad():
        got, want = program.to_module()(ids, default_positions(ids)), source()(ids)
    assert float((got - want).abs().max()) <= 1e-12
