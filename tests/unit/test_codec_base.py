"""The codec interface: codecs inside codecs, plain data, bits of planes that heads share."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxform.codecs.base import CODECS, Codec, PlaneSpec, layers_of, make_codec, require_option
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.polar import PolarCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.errors import RecipeError


def has_defaults(codec: type[Codec]) -> bool:
    missing = dataclasses.MISSING
    options = dataclasses.fields(codec)
    return all((o.default, o.default_factory) != (missing, missing) for o in options)


@pytest.mark.parametrize("name", sorted(name for name, cls in CODECS.items() if has_defaults(cls)))
def test_plain_data_comes_back_through_json(name):
    codec = make_codec({"codec": name})
    plain = codec.to_dict()
    assert plain["codec"] == name
    assert make_codec(json.loads(json.dumps(plain))) == codec
    assert json.loads(json.dumps(plain)) == plain  # lists, not tuples: equal to what is read back
    hash(codec)


def test_a_codec_in_a_codec_is_built_from_nested_data():
    inner = {"codec": "int", "bits": 3, "axis": "channel", "group": 16}
    codec = make_codec({"codec": "token-norm", "over": "head", "inner": inner})
    assert codec == TokenNormCodec(IntCodec(3, "channel", 16), "head")
    assert codec.to_dict()["inner"]["group"] == 16
    assert [layer.name for layer in layers_of(codec)] == ["token-norm", "int"]


def test_lists_become_tuples_so_that_codecs_can_be_compared_and_hashed():
    assert make_codec({"codec": "polar", "bits": [4, 2, 2, 2]}) == PolarCodec((4, 2, 2, 2))


@pytest.mark.parametrize(
    ("spec", "code", "word"),
    [
        ({"codec": "token-norm", "inner": {"codec": "itn"}}, "KVX103", "'int'"),
        ({"codec": "token-norm", "inner": {"codec": "int", "bit": 4}}, "KVX102", "'bits'"),
        ({"codec": "lloyd-max", "level": 4}, "KVX102", "'levels'"),
    ],
)
def test_mistakes_inside_a_codec_are_named(spec, code, word):
    with pytest.raises(RecipeError, match=f"{code}.*{word}"):
        make_codec(spec)


@given(st.integers(1, 16), st.integers(1, 64), st.sampled_from([1, 32]), st.booleans())
def test_a_shared_plane_has_one_row_for_all_heads(heads, width, tokens, shared):
    spec = PlaneSpec("norm", "float16", width, tokens, shared)
    assert spec.heads(heads) == (1 if shared else heads)
    assert spec.bytes_per_token(heads) * tokens == 2 * width * (1 if shared else heads)


def test_a_codec_needs_nothing_unless_it_says_so():
    codec = IntCodec()
    assert (codec.is_headwise, codec.needs_calibration, codec.needs_fisher) == (True, False, False)
    assert isinstance(codec, Codec)


def test_a_required_option_names_codec_rule_and_value():
    require_option(True, "int", "anything", 1)
    with pytest.raises(RecipeError, match=r"KVX107 \[codec int\] bits must be even; got 3"):
        require_option(False, "int", "bits must be even", 3)
