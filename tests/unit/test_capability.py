"""What the ONNX lowering refuses, before it writes anything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import llama_program

from kvxform.codecs.integer import IntCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.capability import takes_padding
from kvxform.codegen.onnx.codecs import CODEC_EMITTERS
from kvxform.errors import CodegenError
from kvxform.ir.stream_plan import Regions

INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}


def toy(options=None):
    return cached_program(options, None, dtype=torch.float32)


def with_site(program, **changes):
    program.plan = program.plan.replace_site(1, **changes)
    return program


def with_key(program, **changes):
    key = dataclasses.replace(program.plan.site(1).key, **changes)
    return with_site(program, key=key)


CHANNEL = {"codec": "int", "bits": 4, "axis": "channel", "group": 8}
REFUSED = {
    "no cache": (lambda: llama_program(dtype=torch.float32), "insert-cache"),
    "float64": (lambda: cached_program(None, None), "float64"),
    "payload": (lambda: with_site(toy(), payload="residual"), "layer 1"),
    "block that cuts groups": (
        lambda: with_key(
            toy({"key": CHANNEL}), regions=Regions(recent=12, flush="block"), tokens_per_group=8
        ),
        "recent: 16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_that_cannot_be_expressed_is_refused(name, tmp_path):
    make, word = REFUSED[name]
    with pytest.raises(CodegenError, match=r"^KVX401 \[onnx\]") as caught:
        export_onnx(make(), tmp_path / "out")
    assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


TOKEN_NORM = {"codec": "token-norm", "over": "head", "inner": {"codec": "int", "bits": 3}}


@pytest.mark.parametrize("without", [TokenNormCodec, IntCodec])
def test_a_codec_without_emitter_is_refused_with_the_nearest_one(without, tmp_path, monkeypatch):
    program = toy({"key": TOKEN_NORM})
    monkeypatch.delitem(CODEC_EMITTERS, without)
    with pytest.raises(CodegenError, match=rf"got {without.name}") as caught:
        export_onnx(program, tmp_path / "out")
    assert "layer 0" in str(caught.value)
    assert "bits: 4" in str(caught.value)  # 3 bits, scale and zero point of 16, norm of 16
    assert not list(tmp_path.iterdir())


def test_an_unknown_operation_is_refused_before_work(tmp_path):
    program = toy()
    silu = next(program.calls(torch.ops.aten.silu.default))
    silu.meta["module"], silu.meta["origin"] = "layers.0.mlp", "silu (model.py:3)"
    silu.target = torch.ops.aten.special_airy_ai.default
    with pytest.raises(CodegenError, match="special_airy_ai") as caught:
        export_onnx(program, tmp_path / "out")
    assert "layers.0.mlp, silu (model.py:3)" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, True),
        (INT4, True),
        ({**INT4, "regions": {"recent": 4}}, True),
        ({**INT4, "regions": {"sink": 1}}, False),
        ({**INT4, "regions": {"recent": 4, "flush": "block"}}, False),
        ({"key": CHANNEL}, False),
    ],
)
def test_padding_is_taken_where_no_plane_would_hold_it(options, expected):
    assert takes_padding(toy(options).plan) is expected
