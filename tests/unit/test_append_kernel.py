"""What append kernels are emitted as, what they refuse, and their machine code."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest
from sass import Build, MachineCode, compile_kernels, count
from triton_cases import int_stream, make_site, plain_stream

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.spec import AppendSpec, RopeSpec, StreamSpec
from kvxform.errors import CodegenError

INT4 = int_stream(128)
KIVI_KEY = int_stream(128, 2, axis="channel", group=32, chunk=128, zero="float")
KIVI_VALUE = int_stream(128, 2, group=32, zero="float", keep=128)


def spec_of(
    key: StreamSpec, value: StreamSpec | None = None, *, layout: str = "rows", **options: Any
) -> AppendSpec:
    site = make_site(
        key,
        value,
        heads=(32, 8),
        page_size=64,
        layout=layout,
        dtype=options.pop("dtype", "bfloat16"),
    )
    return AppendSpec(site, **options)


def functions(spec: AppendSpec) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(emit(spec).text)
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def launches(spec: AppendSpec) -> list[str]:
    """Return the kernels that the launcher can launch, in order."""
    return re.findall(r"(\w+_kernel)\[", emit(spec).text)


def test_a_plain_kernel_has_no_trace_of_what_it_does_not_do() -> None:
    text = emit(spec_of(plain_stream(128, "bfloat16"))).text.split("__kvx_meta__")[0]
    for word in ("quantise", "butterfly", "turn(", "sink", "recent", "rows:", "signs", "cos"):
        assert word not in text, word
    assert launches(spec_of(plain_stream(128, "bfloat16"))) == ["append_kernel"]


def test_passes_are_named_where_their_work_is_done() -> None:
    text = emit(spec_of(INT4, key_block=128, has_signs=True)).text
    for name in ("page-cache", "quantize-kv", "rotate-qk"):
        assert f"# {name}: " in text, name


def test_only_keys_are_rotated() -> None:
    found = functions(spec_of(INT4, key_block=128))
    assert "rotate_key" in found
    assert "rotate_value" not in found


def test_k_and_v_of_one_format_share_their_quantiser() -> None:
    assert "quantise" in functions(spec_of(INT4))
    other = functions(spec_of(INT4, int_stream(128, 8)))
    assert {"quantise_key", "quantise_value"} <= other.keys()


@pytest.mark.parametrize("layout", ["rows", "fragment"])
def test_options_of_the_launcher_are_those_of_the_spec(layout: str) -> None:
    def options(spec: AppendSpec) -> set[str]:
        return {argument.arg for argument in functions(spec)["append"].args.kwonlyargs}

    assert options(spec_of(INT4, layout=layout)) == {"config"}
    rotated = spec_of(INT4, layout=layout, rope=RopeSpec(64), key_block=64, has_signs=True)
    assert options(rotated) == {"config", "cos", "sin", "signs"}
    if layout == "rows":
        assert options(spec_of(KIVI_KEY, KIVI_VALUE)) == {"config", "rows"}


def test_one_token_takes_one_launch_and_more_at_most_two() -> None:
    assert launches(spec_of(int_stream(128, sink=4))) == ["append_kernel"]
    kivi = spec_of(KIVI_KEY, KIVI_VALUE)
    assert launches(kivi) == ["append_one_kernel", "append_kernel", "keep_kernel"]
    launcher = ast.unparse(functions(kivi)["append"])
    first, rest = launcher.split("return", 2)[1:]
    assert first.count("_kernel[") == 1
    assert rest.count("_kernel[") == 2


def test_nothing_is_read_on_the_host_or_allocated() -> None:
    for spec in (spec_of(KIVI_KEY, KIVI_VALUE), spec_of(INT4, layout="fragment")):
        launcher = ast.unparse(functions(spec)["append"])
        for call in (".item(", ".tolist(", ".cpu(", "torch.empty", "torch.zeros", ".contiguous("):
            assert call not in launcher, call


def test_tiles_of_fragments_are_whole_blocks_within_a_page() -> None:
    site = make_site(int_stream(128, 2), heads=(32, 8), layout="fragment", page_size=32)
    text = emit(AppendSpec(site)).text
    assert set(re.findall(r"block_tokens=(\d+)", text)) == {"32"}


def refuses(spec: AppendSpec, rule: str) -> None:
    with pytest.raises(CodegenError, match=rule) as caught:
        emit(spec)
    assert caught.value.code == "KVX401"


def test_tables_of_bytes_are_refused() -> None:
    refuses(spec_of(int_stream(128, 8, table=tuple(range(256)))), "at most 16 entries")
    emit(spec_of(int_stream(128, 2, table=(-1.0, 0.0, 1.0, 2.0))))


def test_groups_of_tokens_that_fit_no_tile_are_refused() -> None:
    refuses(spec_of(int_stream(128, axis="channel", group=24)), "channel axis")
    refuses(spec_of(int_stream(128, axis="channel", group=32, chunk=48)), "whole groups")
    refuses(spec_of(int_stream(128, axis="channel", group=128)), "a page must hold")
    emit(spec_of(int_stream(128, axis="channel", group=64)))


def test_unequal_sinks_are_refused() -> None:
    refuses(spec_of(int_stream(128, sink=4), int_stream(128, sink=2)), "same sink")


def test_rotations_that_do_not_fit_the_head_are_refused() -> None:
    refuses(spec_of(INT4, key_block=48), "Hadamard block")
    refuses(spec_of(int_stream(96), key_block=64), "Hadamard block")
    refuses(spec_of(INT4, rope=RopeSpec(130)), "rotary_dim")
    refuses(spec_of(INT4, rope=RopeSpec(33)), "rotary_dim")
    emit(spec_of(int_stream(96), key_block=32, rope=RopeSpec(96)))


def test_heads_of_odd_sizes_are_refused_where_they_are_cut_too_finely() -> None:
    refuses(spec_of(int_stream(99, 8)), "runs of channels")
    emit(spec_of(int_stream(72, 8)))


def test_regions_have_no_place_in_fragment_order() -> None:
    refuses(spec_of(int_stream(128, keep=8), layout="fragment"), "fragment order")


def build(spec: AppendSpec, kernel: str, tile: int = 0, num_warps: int = 4) -> Build:
    """Compile a kernel for one token, or for tiles of `tile` tokens."""
    names = [argument.arg for argument in functions(spec)[kernel].args.args]
    dtypes = {"uint8": "*u8", "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
    types = {"block_table": "*i32", "starts": "*i32", "counts": "*i32", "rows": "*i32"}
    types |= {"words": "*i32", "halves": "*i16", "signs": "*fp32", "key_tiles": "i32"}
    types |= dict.fromkeys(("k", "v", "cos", "sin"), dtypes[spec.site.dtype])
    for name, stream in spec.site.streams.items():
        types |= {f"{name}_{p.name}": dtypes[p.dtype] for p in stream.planes}
        exact = dtypes.get(stream.exact_dtype, "")
        types |= {f"{name}_sink": exact, f"{name}_recent": exact}
    constants = {"TILE": tile} if tile else {"num_tokens": 1, "key_tiles": 1}
    if not tile and "TILE" in names:
        constants["TILE"] = 1
    constants = {**constants, "HEADS": num_warps} if "HEADS" in names else constants
    constants = {n: value for n, value in constants.items() if n in names}
    known = {n: types.get(n, "i32:16") for n in names if n not in constants}
    return Build(emit(spec).text, kernel, tuple(known.items()), tuple(constants.items()), num_warps)


def check_machine_code(*builds: Build) -> list[MachineCode]:
    """Assert that nothing is spilled and no division or conversion takes the slow way."""
    codes = compile_kernels(*builds)
    for code in codes:
        assert code.spills == 0
        assert count(code.whole, "CALL") == 0
        assert count(code.whole, "F2I") <= 2  # none per code; the remainder of a slot may take one
    return codes


def test_machine_code_of_one_token() -> None:
    rows = build(spec_of(INT4, key_block=128), "append_kernel", num_warps=1)
    fragments = build(
        spec_of(INT4, key_block=128, layout="fragment"), "append_one_kernel", num_warps=1
    )
    for code in check_machine_code(rows, fragments):
        assert count(code.whole, "BAR") == 0
        assert count(code.whole, "REDUX") == 4  # least and largest of K and of V


@pytest.mark.slow
def test_machine_code_of_tiles() -> None:
    int8 = int_stream(128, 8, symmetric=True)
    specs = [
        spec_of(INT4, key_block=128),
        spec_of(INT4, int8, layout="fragment", key_block=128),
        spec_of(int_stream(128, 2), layout="fragment", key_block=128),
        spec_of(int_stream(128, 3), int_stream(128, 4, group=32)),
        spec_of(KIVI_KEY, KIVI_VALUE),
    ]
    tiles = [build(spec, "append_kernel", 32) for spec in specs]
    whole = [build(spec, "append_kernel", 64) for spec in specs[:2]]
    flushes = [build(specs[-1], "append_one_kernel"), build(specs[-1], "keep_kernel", 16)]
    check_machine_code(*tiles, *whole, *flushes)


def test_text_is_the_same_for_the_same_spec() -> None:
    spec = spec_of(INT4, key_block=128)
    first = emit(spec).text
    emit.cache_clear()
    assert emit(dataclasses.replace(spec)).text == first
