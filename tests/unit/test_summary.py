"""Records of a report: words for streams and codecs, and figures of a plan."""

from __future__ import annotations

import pytest
from cached import cached_program
from programs import llama_program

from kvxform.codecs.integer import IntCodec
from kvxform.codecs.truncate import TruncateCodec
from kvxform.summary import (
    EXAMPLE_BATCH,
    EXAMPLE_TOKENS,
    describe_codec,
    describe_stream,
    first_sentence,
    layer_records,
    plan_summary,
    source_summary,
)

INT4 = {"codec": "int", "bits": 4}


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ({"codec": "none", "dtype": "float32"}, "float32"),
        ({"codec": "int", "bits": 4, "axis": "token", "group": None}, "int4 per token"),
        (
            {"codec": "int", "bits": 2, "axis": "channel", "group": 32},
            "int2 per channel, groups of 32",
        ),
        ({"codec": "lloyd-max", "levels": 5, "qjl": False}, "lloyd-max, levels 5"),
        ({"codec": "fib-vq", "words": 64, "k": 4, "gain": "norm"}, "fib-vq, words 64, k 4"),
        ({"codec": "token-norm", "inner": {**INT4, "axis": "token"}}, "int4 per token, token-norm"),
        (
            TruncateCodec(96, 64, 3, IntCodec(4)).to_dict(),
            "int4 per token, 96 of 192 channels",
        ),
    ],
)
def test_codecs_in_words(codec, words):
    assert describe_codec(codec) == words


def test_streams_in_words():
    options = {"key": INT4, "value": INT4, "regions": {"sink": 2, "recent": 8}}
    stream = cached_program(options).plan.sites[0].key
    assert describe_stream(stream) == "int4 per token, first 2 exact, last 8 exact"


def test_plan_figures_are_those_of_the_plan():
    program = cached_program({"key": INT4, "value": INT4})
    plan = program.plan
    summary = plan_summary(plan, source_summary(program))
    assert summary.kv_bytes_per_token_before == 256
    assert summary.kv_bytes_per_token == plan.bytes_per_token == 2 * 2 * 2 * (8 + 4)
    assert summary.total_bytes == plan.bytes_at([EXAMPLE_TOKENS] * EXAMPLE_BATCH, EXAMPLE_TOKENS)
    assert summary.read_bytes_before == 256 * EXAMPLE_TOKENS
    assert summary.read_bytes == plan.bytes_per_token * EXAMPLE_TOKENS
    layers = layer_records(plan, ())
    assert sum(r.key_bytes + r.value_bytes for r in layers) == plan.bytes_per_token
    assert [r.key_error for r in layers] == [None, None]


def test_source_and_docstrings():
    summary = source_summary(llama_program())
    assert (summary.name, summary.sites_raised, summary.num_kv_heads) == ("toy", 2, 2)
    assert first_sentence("One\n    line.\n\n    More.") == "One line."
    assert first_sentence(None) == ""
