"""Reading codes without decoding them equals decoding first."""

import pytest
import torch

from kvxform.codecs.integer import IntCodec
from kvxform.codegen.eager.folded_body import AffineBody, PackedBody, fold_body

HEAD_DIM, TOKENS = 16, 24
FORMS = [{"symmetric": True}, {"zero": "int"}, {"zero": "float"}]
CODECS = [
    *(IntCodec(bits=b, **form) for b in (2, 3, 4, 8) for form in FORMS),
    IntCodec(bits=2, group=4),
    IntCodec(bits=2, group=8, zero="float"),
    IntCodec(bits=4, group=8, symmetric=True),
    IntCodec(bits=4, group=4),
    IntCodec(bits=8, group=4),
    IntCodec(bits=4, axis="channel", group=8),
    IntCodec(bits=2, axis="channel", group=8, zero="float"),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_scores_and_values_equal_those_of_decoded_tokens(codec, num_queries):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    planes = codec.encode(randn(2, 3, TOKENS, HEAD_DIM) + 0.3)
    planes = {name: p.transpose(1, 2).contiguous().transpose(1, 2) for name, p in planes.items()}
    decoded = codec.decode(planes, torch.float64)
    body = fold_body(codec, planes, torch.float64)
    assert (body.num_kv_heads, body.num_tokens) == (3, TOKENS)
    q, weights = randn(2, 3, num_queries, HEAD_DIM), randn(2, 3, num_queries, TOKENS)
    assert (body.scores(q) - q @ decoded.mT).abs().max() < 1e-12
    assert (body.mix(weights) - weights @ decoded).abs().max() < 1e-12


def test_which_codecs_are_read_packed():
    def kind(codec):
        planes = codec.encode(torch.randn(1, 1, TOKENS, HEAD_DIM))
        return type(fold_body(codec, planes, torch.float32))

    assert kind(IntCodec(bits=4)) is PackedBody
    assert kind(IntCodec(bits=4, group=8)) is PackedBody
    assert kind(IntCodec(bits=8)) is PackedBody
    assert kind(IntCodec(bits=4, group=4)) is AffineBody  # a bit position has two groups
    assert kind(IntCodec(bits=3)) is AffineBody
    assert kind(IntCodec(bits=4, axis="channel", group=8)) is AffineBody
