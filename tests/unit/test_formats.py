"""What codecs are to kernels: their planes, and which of them kernels cannot take."""

from __future__ import annotations

import pytest

from kvxform.codecs.base import Codec, PlaneSpec
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton.formats import codec_fields, reason_against
from kvxform.codegen.triton.spec import StreamSpec

TAKEN = [
    IntCodec(3, group=32),
    IntCodec(2, axis="channel", symmetric=True),
    LloydMaxCodec(4),
    LloydMaxCodec(8, gain="corrected"),
    FibVqCodec(16, 2),
    FibVqCodec(64, 2, gain="projected"),
    TokenNormCodec(IntCodec(2, axis="channel", group=16)),
    TokenNormCodec(IntCodec(4), over="head"),
]
REFUSED = {
    "scales over heads": (IntCodec(across_heads=True), "within one head", "across_heads"),
    "clip by search": (IntCodec(clip="search"), "clip must be a number", "search"),
    "five levels": (LloydMaxCodec(5), "levels must be one of", 5),
    "many levels": (LloydMaxCodec(32), "levels must be one of", 32),
    "second codes": (LloydMaxCodec(4, qjl=True), "no second code", "qjl"),
    "blocks of three": (FibVqCodec(64, 3), "k must be one of", 3),
    "odd number of words": (FibVqCodec(100, 2), "words must be one of", 100),
    "norm of extremes": (TokenNormCodec(norm="max"), "must be l2", "max"),
    "norm before a table": (TokenNormCodec(IntCodec(clip="fit")), "clip must be a number", "fit"),
}


def by_name(planes: tuple[PlaneSpec, ...]) -> dict[str, PlaneSpec]:
    return {plane.name: plane for plane in planes}


@pytest.mark.parametrize("codec", TAKEN, ids=str)
def test_planes_are_those_of_the_codec(codec: Codec) -> None:
    assert reason_against(codec, 32) is None
    stream = StreamSpec(32, **codec_fields(codec, 32))
    assert by_name(stream.planes) == by_name(codec.planes(32))
    assert stream.tokens_per_group == codec.tokens_per_group


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_can_take(name: str) -> None:
    codec, rule, got = REFUSED[name]
    unfit = reason_against(codec, 64)
    assert unfit is not None
    assert rule in unfit.rule
    assert unfit.got == got
    assert unfit.hint.startswith(("use ", "leave out "))


@pytest.mark.parametrize(("head_dim", "is_taken"), [(16, False), (32, True), (96, False)])
def test_words_need_heads_of_a_power_of_two(head_dim: int, is_taken: bool) -> None:
    assert (reason_against(FibVqCodec(16, 2), head_dim) is None) == is_taken
