"""Emission of decode over rows: what is in the text and what is not, and what is refused."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outline import static_branches, unused_parameters
from ptx import run_instruction
from sass import Build, compile_kernels, count
from triton_cases import int_stream, make_site, plain_stream

from kvxform.codecs.packing import pack
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec
from kvxform.codegen.triton.streams import CodeBlock, Load, TileStream
from kvxform.errors import CodegenError

PLAIN = DecodeSpec(make_site(int_stream(64), page_size=64))
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "u8"}


def signature(spec: DecodeSpec, name: str = "decode", *, interpret: bool = False) -> ast.arguments:
    tree = ast.parse(emit(spec, interpret=interpret).text)
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return function.args


def options(spec: DecodeSpec) -> list[str]:
    return [argument.arg for argument in signature(spec).kwonlyargs]


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"has_signs": True, "query_block": 64}, "signs", "signs_ptr"),
        ({"has_sink_logits": True}, "sink_logits", "Sink logits"),
        ({"has_alibi": True}, "alibi_slopes", "ALiBi"),
        ({"has_slot_bias": True}, "slot_bias", "slot_bias_stride_b"),
        ({"has_lse": True}, "lse", "lse_ptr"),
    ],
)
def test_an_option_adds_its_argument_and_nothing_else_does(
    fields: dict[str, Any], name: str, words: str
) -> None:
    spec = DecodeSpec(PLAIN.site, **fields)
    assert options(PLAIN) == ["scale", "config"]
    assert options(spec) == ["scale", name, "config"]
    assert words in emit(spec).text
    assert words not in emit(PLAIN).text


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DecodeSpec(PLAIN.site, query_block=32), "def rotate"),
        (DecodeSpec(PLAIN.site, window=100), "length - 1) - 99"),
        (DecodeSpec(PLAIN.site, chunk=128), "(length - 1) // 128 * 128"),
        (DecodeSpec(PLAIN.site, softcap=30.0), "# Softcap"),
        (DecodeSpec(make_site(int_stream(64, sink=4), page_size=64)), "the first split reads"),
        (DecodeSpec(make_site(int_stream(64, keep=8), page_size=64)), "the last split reads"),
        (DecodeSpec(make_site(int_stream(64, token_norm="head"), page_size=64)), "key_norm"),
        (DecodeSpec(make_site(int_stream(64), page_size=16)), "next_pages"),
        (DecodeSpec(make_site(int_stream(80, 4), page_size=64)), "tl.arange(0, 64) < 40"),
    ],
)
def test_a_feature_adds_its_block(spec: DecodeSpec, words: str) -> None:
    assert words in emit(spec).text
    assert words not in emit(PLAIN).text


def test_buffers_are_only_taken_where_tokens_stay_exact() -> None:
    spec = DecodeSpec(make_site(int_stream(64, sink=4), page_size=64))
    assert options(spec) == ["scale", "rows", "config"]
    text = emit(spec).text
    assert "key_sink: torch.Tensor" in text
    assert "recent" not in text


def test_one_product_for_streams_with_one_rule_and_two_where_one_stream_is_ahead() -> None:
    def count_of(key: StreamSpec, value: StreamSpec, name: str) -> int:
        text = emit(DecodeSpec(make_site(key, value, page_size=64))).text
        return len(re.findall(rf"{name} = tl.load", text))

    same = int_stream(64, keep=8)
    assert count_of(same, same, "key_exact_0") == 1
    assert count_of(same, same, "key_bytes_0") == 1  # none in the tail
    behind = int_stream(64, keep=40)
    assert count_of(same, behind, "key_bytes_0") == 2  # keys are codes before values are
    assert count_of(same, behind, "value_bytes_0") == 1


def test_assembly_is_for_the_gpu_only() -> None:
    assert "inline_asm" in emit(PLAIN).text
    assert "inline_asm" not in emit(PLAIN, interpret=True).text
    assert "inline_asm" not in emit(DecodeSpec(make_site(plain_stream(64), page_size=64))).text


SITES: list[tuple[SiteSpec, str, str]] = [
    (make_site(int_stream(64), dtype="float64"), "the dtype", "use float32"),
    (make_site(int_stream(64), heads=(130, 2)), "query heads", "eager"),
    (make_site(int_stream(64, sink=1), int_stream(64, sink=2)), "sink", "same `sink`"),
    (make_site(int_stream(512)), "head_dim must be at most 256", "eager"),
    (make_site(int_stream(64, axis="channel", group=24), page_size=48), "multiple of 16", "32"),
    (make_site(int_stream(64, axis="channel"), page_size=48), "whole groups", "page_size: 64"),
]


@pytest.mark.parametrize(("site", "rule", "hint"), SITES)
def test_refusals_name_rule_and_way_out(site: SiteSpec, rule: str, hint: str) -> None:
    with pytest.raises(CodegenError, match=rule) as caught:
        emit(DecodeSpec(site))
    assert caught.value.code == "KVX401"
    assert caught.value.where == "triton"
    assert hint in caught.value.hint


@pytest.mark.parametrize("block", [8, 24, 128, 512])
def test_hadamard_blocks_that_do_not_fit(block: int) -> None:
    with pytest.raises(CodegenError, match="Hadamard block"):
        emit(DecodeSpec(PLAIN.site, query_block=block))
    emit(DecodeSpec(PLAIN.site, query_block=16))


def test_near_misses_are_emitted() -> None:
    for site in (
        make_site(int_stream(64), heads=(128, 2)),
        make_site(int_stream(256)),
        make_site(int_stream(64, axis="channel", group=48), page_size=48),
    ):
        text = emit(DecodeSpec(site)).text
        assert static_branches(text) == []
        assert unused_parameters(text) == []


def test_tiles_fit_pages_and_groups() -> None:
    for fields, most in (({"group": 32}, 32), ({"group": 48}, 16), ({"group": 64}, 64)):
        site = make_site(int_stream(64, axis="channel", **fields), page_size=192)
        configs = re.findall(r"Config\(block_n=(\d+)", emit(DecodeSpec(site)).text)
        assert configs
        assert {most % int(n) for n in configs} == {0}


def columns(load: Load, width: int) -> torch.Tensor:
    elements = load.start + torch.arange(width)
    return load.first + (elements % load.period if load.period else elements)


def lay_out(stream: StreamSpec, row: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the bytes that each load of each block takes, by first channel of the block."""
    blocks = TileStream.of("key", make_site(stream)).blocks
    return {
        block.parts[0].first_channel: torch.stack(
            [row[columns(load, block.width)] for load in block.loads]
        )
        for block in blocks
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_and_assembly_give_the_codes_of_the_codec(data: st.DataObject) -> None:
    """The assembly is run by a small model of its four instructions."""
    bits = data.draw(st.sampled_from([2, 3, 4, 8]), label="bits")
    head_dim = data.draw(st.sampled_from([32, 64, 96, 128]), label="head_dim")
    group = data.draw(st.sampled_from([head_dim, head_dim // 2, head_dim // 4]), label="group")
    stream = int_stream(head_dim, bits, group=group)
    codes = torch.randint(0, 2**bits, (head_dim,), dtype=torch.uint8)
    row = pack(codes, bits)
    tile, found = TileStream.of("key", make_site(stream)), torch.full((head_dim,), -1)
    text = emit(DecodeSpec(make_site(stream, page_size=64))).text
    for block in tile.blocks:
        pieces = lay_out(stream, row)[block.parts[0].first_channel]
        for part, values in zip(block.parts, run_assembly(text, block, pieces), strict=True):
            assert part.group == part.first_channel // group
            assert values.shape == (part.width,)
            found[part.first_channel : part.first_channel + part.width] = values >> part.shift
    assert torch.equal(found, codes.long())


def run_assembly(text: str, block: CodeBlock, pieces: torch.Tensor) -> list[torch.Tensor]:
    """Return what the unpacking function of `text` makes of bytes `[loads, width]`, as int64."""
    lines = re.search(r'"""\s+\{\n(.*?)\}', text, re.DOTALL)
    assert lines is not None
    width, count_of_parts = block.width, len(block.parts)
    if len(pieces) == 2:  # codes of 3 bits: which bytes have high bits at odd places
        first, half = block.loads[0].first, block.loads[1].period
        odd = (first + torch.arange(width)) // half * 255
        pieces = torch.cat([pieces, odd[None].byte()])
    padded = torch.zeros(len(pieces), -(-width // 4) * 4, dtype=torch.uint8)
    padded[:, :width] = pieces
    outputs: list[list[int]] = [[] for _ in block.parts]
    for words in padded.view(torch.int32).T.tolist():
        registers = {f"${2 * count_of_parts + i}": w & 0xFFFFFFFF for i, w in enumerate(words)}
        for line in lines[1].splitlines():
            if line.strip():
                run_instruction(line.strip().rstrip(";"), registers)
        for part in range(count_of_parts):
            pair = [registers[f"${2 * part + i}"] for i in range(2)]
            outputs[part] += [half for word in pair for half in (word & 0xFFFF, word >> 16)]
    return [torch.tensor(values)[:width] for values in outputs]


def make_build(spec: DecodeSpec, index: int = 0) -> Build:
    """Return the decode kernel with a config of its own, as the launcher would compile it."""
    text, pointers = emit(spec).text, {}
    for name, stream in spec.site.streams.items():
        for plane in stream.planes:
            pointers[f"{name}_{plane.name}_ptr"] = f"*{SHORT[plane.dtype]}"
        for buffer in ("sink", "recent"):
            pointers[f"{name}_{buffer}_ptr"] = f"*{SHORT.get(stream.exact_dtype)}"
        entry = TileStream.of(name, spec.site).entry_values if stream.table else 1
        pointers[f"{name}_table_ptr"] = {1: "*fp16", 2: "*i32", 4: "*i64"}[entry]
    numbers = {"scale": "fp32"}
    types = {}
    for argument in signature(spec, "decode_kernel").args:
        name = argument.arg
        if name.endswith("_ptr"):
            types[name] = pointers.get(name, "*fp32")
        elif name != "BLOCK_N":
            types[name] = numbers.get(name, "i32:16")
    known = {"q_ptr": f"*{SHORT[spec.site.dtype]}", "block_table_stride": "i32"}
    known |= dict.fromkeys(("block_table_ptr", "lengths_ptr", "rows_ptr"), "*i32")
    types |= {name: kind for name, kind in known.items() if name in types}
    config = re.findall(r"Config\(block_n=(\d+), .*?num_warps=(\d+), num_stages=(\d+)", text)[index]
    block_n, warps, stages = map(int, config)
    return Build(
        text, "decode_kernel", tuple(types.items()), (("BLOCK_N", block_n),), warps, stages
    )


def make_spec(stream: StreamSpec, dtype: str = "float16") -> DecodeSpec:
    return DecodeSpec(make_site(stream, heads=(32, 8), page_size=64, dtype=dtype), query_block=128)


@pytest.mark.parametrize(
    "streams",
    [
        [int_stream(128, 4), int_stream(128, 8, symmetric=True)],
        pytest.param(
            [int_stream(128, 2), int_stream(128, 3), plain_stream(128, "bfloat16")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["int4-int8", "int2-int3-bf16"],
)
def test_machine_code_of_the_loop(streams: list[StreamSpec]) -> None:
    builds = [make_build(make_spec(stream, stream.dtype or "float16")) for stream in streams]
    for stream, code in zip(streams, compile_kernels(*builds), strict=True):
        loop = code.loops[0]
        assert code.spills == 0, stream
        assert count(loop, "I2F") == 0, stream
        assert count(loop, "HMMA", "16816") >= 32, stream
        assert count(loop, "LDGSTS") > 0, stream  # codes of later tiles are on their way
