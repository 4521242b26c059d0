"""Means of channels outside of attention operators: the lifted program is the program."""

from __future__ import annotations

import pytest
import torch
from cached import cached_program
from programs import token_ids

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.center_rules import are_centers_free, has_center
from kvxform.codegen.onnx.centers import lift_centers
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.codegen.onnx.levels import reason_against
from kvxform.runtime.model import OptimizedModel

HEADS, WIDTH = 2, 16


def centred(seed: int) -> dict:
    offset = torch.randn(HEADS * WIDTH, generator=torch.Generator().manual_seed(seed)).half()
    scale, numbers = [0.02], offset.float().tolist()
    return {"codec": "static-int", "scale": scale, "center": True, "offset": numbers}


def program(key=None, value=None, **model):
    return cached_program({"key": key, "value": value}, dtype=torch.float32, **model)


@pytest.mark.parametrize("streams", [("key",), ("value",), ("key", "value")])
def test_a_lifted_program_keeps_the_same_bytes_and_gives_the_same_logits(streams):
    before = program(**{name: centred(i) for i, name in enumerate(streams)})
    text = str(before.graph)
    after = lift_centers(before)
    assert str(before.graph) == text  # a clone was changed
    counts = [len(list(p.calls(torch.ops.aten.sub.Tensor))) for p in (before, after)]
    assert counts[1] - counts[0] == len(streams) * len(before.sites)
    codecs = [s.codec for site in after.plan.sites for s in site.streams.values()]
    assert not any(codec.get("center") for codec in codecs)
    ids = token_ids(before, 2, 20)
    sessions = [
        OptimizedModel(p).new_session(max_batch_size=2, max_seq_len=32) for p in (before, after)
    ]
    logits = [session.prefill(ids) for session in sessions]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    for layer in range(len(before.sites)):
        own, lifted = (session.logical_cache(layer) for session in sessions)
        for name, mine, theirs in (("key", own.k, lifted.k), ("value", own.v, lifted.v)):
            moved = torch.cat(list(mine)) - torch.cat(list(theirs))  # one constant everywhere
            assert float(moved.std(-2).max()) < 1e-5
            assert (float(moved.abs().max()) > 0.5) == (name in streams)


def test_programs_without_means_are_left_alone():
    plain = program({**centred(0), "center": False, "offset": None})
    assert not has_center(plain.plan.sites[0].key)
    assert lift_centers(plain) is plain
    assert all(are_centers_free(plain, site) for site in plain.plan.sites)


def test_means_of_keys_show_under_a_softcap():
    plain = {**centred(0), "center": False, "offset": None}
    reasons = [
        reason_against("L3", program(key, plain, attention=attention), OnnxOptions())
        for key in (centred(0), plain)
        for attention in ({"softcap": 20.0}, {})
    ]
    assert reasons.pop(0).startswith("means may not be taken from keys under a softcap")
    assert reasons == [None] * 3


def test_new_nodes_say_where_they_are_from():
    after = lift_centers(program(centred(0)))
    (first, *_) = after.calls(torch.ops.aten.sub.Tensor)
    assert first.meta["via"][-1] == "quantize-kv"
    append = next(iter(after.calls(kvx.CACHE_APPEND)))
    assert append.args[0] is first
