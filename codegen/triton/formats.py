"""What codecs are to kernels: fields of a `StreamSpec`, or why kernels cannot take one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from kvxform.codecs.base import Codec
from kvxform.codecs.fib_codebook import codebook
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.lloyd_tables import sphere_table
from kvxform.codecs.token_norm import TokenNormCodec

LEVELS = (4, 8, 16)  # of lloyd-max: whole bits, and bounds that are compared one by one
WORDS = {16: 4, 64: 6, 256: 8}  # of fib-vq: words, and bits of a code
BLOCKS = (2, 4)  # channels of a word: its float16 numbers are one load


class Unfit(NamedTuple):
    """Why kernels cannot take a codec.

    Attributes:
        rule: What would have to hold.
        got: What is the case.
        hint: What to use instead.
    """

    rule: str
    got: object
    hint: str


def codec_fields(codec: Codec, head_dim: int) -> dict[str, Any]:
    """Return fields of the `StreamSpec` of a coded stream; `reason_against` the codec is None."""
    if isinstance(codec, TokenNormCodec):
        return {**codec_fields(codec.inner, head_dim), "token_norm": codec.over}
    if isinstance(codec, LloydMaxCodec):
        table = sphere_table(codec.levels, head_dim)
        bits = codec.levels.bit_length() - 1
        fields = {"bits": bits, "group": head_dim, "gain": codec.gain}
        return {**fields, "table": tuple(table.tolist())}
    if isinstance(codec, FibVqCodec):
        table = codebook(codec.words, codec.k, head_dim).flatten()
        fields = {"bits": WORDS[codec.words], "group": head_dim, "gain": codec.gain}
        return {**fields, "block": codec.k, "table": tuple(table.tolist())}
    assert isinstance(codec, IntCodec), "checked by `reason_against`"
    found = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    del found["across_heads"]
    found["group"] = codec.group or (head_dim if codec.axis == "token" else codec.tokens_per_group)
    return found


def reason_against(codec: Codec, head_dim: int) -> Unfit | None:
    """Return why kernels cannot take a codec of one of the classes of `capability`, or None."""
    if isinstance(codec, TokenNormCodec):
        if codec.norm != "l2":
            return Unfit("norms of tokens must be l2", codec.norm, "use norm: l2")
        if not isinstance(codec.inner, IntCodec):
            return Unfit("token-norm must wrap codec int", codec.inner.name, "use inner: int")
        return reason_against(codec.inner, head_dim)
    if isinstance(codec, IntCodec):
        if codec.across_heads:
            rule = "a group must lie within one head"
            return Unfit(rule, "across_heads", "leave out across_heads")
        if not isinstance(codec.clip, float | int):
            return Unfit("clip must be a number", codec.clip, "use clip: 1.0")
    if isinstance(codec, LloydMaxCodec):
        if codec.qjl:
            return Unfit("there must be no second code", "qjl", "leave out qjl")
        if codec.levels not in LEVELS:
            return Unfit(f"levels must be one of {LEVELS}", codec.levels, "use levels: 16")
    if isinstance(codec, FibVqCodec):
        return _reason_against_words(codec, head_dim)
    return None


def _reason_against_words(codec: FibVqCodec, head_dim: int) -> Unfit | None:
    if codec.k not in BLOCKS:
        return Unfit(f"k must be one of {BLOCKS}", codec.k, "use k: 2")
    if codec.words not in WORDS:
        return Unfit(f"words must be one of {tuple(WORDS)}", codec.words, "use words: 256")
    if head_dim & (head_dim - 1) or head_dim < 16 * codec.k:
        rule = f"head_dim must be a power of two and at least {16 * codec.k}"
        return Unfit(rule, head_dim, "use codec lloyd-max")
    return None
