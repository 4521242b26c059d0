"""What the machine code that looks up levels computes, instruction by instruction."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import run_lines
from triton_cases import codec_stream

from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codegen.triton.fragment_levels import UNIT, is_symmetric, unpack_lines

WORDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("levels", [4, 16])
@given(words=st.tuples(WORDS, WORDS))
@settings(max_examples=30, deadline=None)
def test_every_code_becomes_its_level(levels: int, words: tuple[int, int]) -> None:
    stream = codec_stream(64, LloydMaxCodec(levels))
    bits = stream.bits
    outputs, lines = unpack_lines(stream)
    registers = {f"${outputs + i}": word for i, word in enumerate(words)}
    run_lines(lines, registers)
    for i, word in enumerate(words):
        for j in range(outputs // 2):
            pair = registers[f"${i * outputs // 2 + j}"].to_bytes(4, "little")
            for half, found in enumerate(struct.unpack("<2e", pair)):
                code = word >> (16 * half + bits * j) & (levels - 1)
                assert found == struct.unpack("<e", struct.pack("<e", stream.table[code] * UNIT))[0]


def test_symmetry() -> None:
    assert is_symmetric((-2.0, -1.0, 1.0, 2.0))
    assert not is_symmetric((-2.0, -1.0, 1.0, 2.5))
