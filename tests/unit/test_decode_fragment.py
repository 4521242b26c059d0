from __future__ import annotations

import collections
import dataclasses
from types import ModuleType
from typing import Any

import pytest
import sass
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import codec_stream, int_stream, make_site, plain_stream

from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codegen.triton import decode_fragment
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec, StreamSpec
from kvxform.errors import CodegenError

POINTERS = {
    "pool_ptr": "*i32",
    "table_ptr": "*i32",
    "items_ptr": "*i32",
    "arrived_ptr": "*i32",
    "q_ptr": "*fp16",
    "out_ptr": "*fp16",
}
FORMATS = {
    "int2": int_stream(128, 2),
    "int4": int_stream(128),
    "int8": int_stream(128, 8, symmetric=True),
    "bfloat16": plain_stream(128, "bfloat16"),
    "levels4": codec_stream(128, LloydMaxCodec(4)),
    "levels16": codec_stream(128, LloydMaxCodec(16)),
}
FEATURES = {"window": 4096, "softcap": 50.0, "has_lse": True}
ALL_FEATURES = {
    **FEATURES,
    "has_signs": True,
    "has_sink_logits": True,
    "has_alibi": True,
    "has_slot_bias": True,
}


def make_spec(
    key: StreamSpec,
    value: StreamSpec | None = None,
    heads: tuple[int, int] = (32, 8),
    **options: Any,
) -> DecodeSpec:
    site = make_site(key, value, heads=heads, page_size=64, layout="fragment")
    block = key.head_dim if key.is_coded else 0
    return DecodeSpec(site, **{"query_block": block, **options})


def make_build(spec: DecodeSpec, index: int = 0) -> sass.Build:
    """Return what to compile for one of the configs of a kernel."""
    source = emit(spec)
    configs = decode_fragment.make_context(spec).variables["configs"]
    warps, tile, _, registers, merged = configs[index]
    types = {}
    for name in decode_fragment.make_context(spec).variables["kernel_parameters"]:
        if name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        else:
            types[name] = "fp32" if name == "score_scale" else "i32"
    return sass.Build(
        source.text,
        "decode_kernel",
        tuple(types.items()),
        (("WARPS", warps), ("TILE", tile), ("ROUND", merged)),
        num_warps=warps,
        maxnreg=registers or None,
        is_gluon=True,
    )


def check_loop(code: sass.MachineCode) -> dict[str, int]:
    """Check what holds for every kernel and return its main loop."""
    loop = max(code.loops, key=lambda loop: sass.count(loop, "HMMA"))  # the other one merges parts
    assert code.spills == 0
    for operation in ("LDS", "STS", "LDSM", "BAR", "I2F"):
        assert sass.count(loop, operation) == 0, operation  # warps do not walk in step
    assert sass.count(loop, "HMMA", "16816") > 0
    assert sass.count(loop, "LDG", "128") > 0
    return loop


# Instructions, HMMA and loads of 16 bytes in a loop: with these an H100 is bound by its memory.
BOUNDS = {
    "int2": (770, 64, 8),
    "int4": (800, 64, 16),
    "int8": (410, 34, 16),
    "bfloat16": (280, 16, 16),
    "levels4": (1650, 64, 8),  # these by instructions, of which two in three look up levels
    "levels16": (1160, 32, 8),
}


@pytest.mark.parametrize(
    "names",
    [
        ["int4"],
        pytest.param(["int8", "int2", "bfloat16", "levels4", "levels16"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_machine_code_of_the_loop(names: list[str]) -> None:
    codes = sass.compile_kernels(*(make_build(make_spec(FORMATS[name])) for name in names))
    for name, code in zip(names, codes, strict=True):
        loop = check_loop(code)
        most, products, loads = BOUNDS[name]
        assert sum(loop.values()) <= most, name
        assert sass.count(loop, "HMMA", "16816") == products
        assert sass.count(loop, "LDG", "128") == loads


@pytest.mark.slow
def test_machine_code_with_features_and_of_other_geometries() -> None:
    specs = [make_spec(stream, **FEATURES) for stream in FORMATS.values()]
    specs += [make_spec(stream, **ALL_FEATURES) for stream in FORMATS.values()]
    specs += [
        make_spec(int_stream(64), heads=(9, 3)),
        make_spec(int_stream(64, 8), heads=(9, 3)),
        make_spec(int_stream(256), heads=(8, 1)),
        make_spec(int_stream(256, 8), heads=(8, 4)),
        make_spec(int_stream(128), heads=(32, 2), **FEATURES),
        make_spec(plain_stream(128), heads=(32, 2)),
        make_spec(int_stream(128, 8), int_stream(128)),
        make_spec(int_stream(128), int_stream(128, 2)),
    ]
    codes = sass.compile_kernels(*(make_build(spec) for spec in specs))
    for spec, code in zip(specs, codes, strict=True):
        most = 1850 if spec.site.key == FORMATS["levels4"] else 1200
        assert sum(check_loop(code).values()) < most, spec


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_machine_code_of_every_config(name: str) -> None:
    spec = make_spec(FORMATS[name])
    configs = decode_fragment.make_context(spec).variables["configs"]
    for code in sass.compile_kernels(*(make_build(spec, i) for i in range(len(configs)))):
        check_loop(code)


def test_text_has_what_the_spec_asks_for_and_nothing_else() -> None:
    marks = {
        "window": "place0 >= start",
        "softcap": "tanh",
        "has_lse": "lse_ptr",
        "has_signs": "signs_ptr",
        "has_sink_logits": "sink_ptr",
        "has_alibi": "slopes_ptr",
        "has_slot_bias": "bias_ptr",
        "query_block": "rotate-qk",
    }
    plain = emit(make_spec(FORMATS["int4"], query_block=0)).text
    for option, mark in marks.items():
        value = {"query_block": 16, **ALL_FEATURES}[option]
        text = emit(make_spec(FORMATS["int4"], **{"query_block": 0, option: value})).text
        assert mark in text
        assert mark not in plain
    assert "unpack_int2" not in plain
    assert "unpack_int2" in emit(make_spec(FORMATS["int4"], FORMATS["int2"])).text


def test_configs_are_few_and_fit_pages() -> None:
    for stream in FORMATS.values():
        for page_size in (32, 64, 256):
            site = dataclasses.replace(make_spec(stream).site, page_size=page_size)
            configs = decode_fragment.make_context(DecodeSpec(site)).variables["configs"]
            assert 1 <= len(configs) <= 8
            assert len(set(configs)) == len(configs)
            assert all(page_size % tile == 0 for _, tile, *_ in configs)


def test_a_site_of_other_pages_is_refused() -> None:
    site = make_site(int_stream(96), layout="fragment")
    with pytest.raises(CodegenError, match=r"KVX401.*head_dim is none of.*layout rows"):
        decode_fragment.make_context(DecodeSpec(site))


def _walk(module: ModuleType, config: Any, work: Any, first: list[int]) -> dict[int, list[int]]:
    """Return the tiles of each sequence that the warps of a plan visit, as the kernel does."""
    visited: dict[int, list[int]] = collections.defaultdict(list)
    items = work.items.tolist()
    for number, (b, length, first_item, parts, *_) in enumerate(items):
        if parts == 0:
            continue
        assert 0 <= number - first_item < parts
        end = -(-length // config.tile)
        for warp in range(config.warps):
            tile = first[b] + (number - first_item) * config.warps + warp
            visited[b] += range(tile, end, parts * config.warps)
    return visited


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_plan_covers_every_visible_tile_once(data: st.DataObject) -> None:
    window = data.draw(st.sampled_from([None, 1, 100, 5000]))
    module = load(emit(make_spec(FORMATS["int4"], window=window)))
    config = data.draw(st.sampled_from(module.CONFIGS))
    lengths = data.draw(st.lists(st.integers(0, 4000), min_size=1, max_size=9))
    num_sms = data.draw(st.sampled_from([1, 20, 132]))
    table = torch.arange(len(lengths) * 63, dtype=torch.int32).reshape(len(lengths), 63)
    work = module.make_workspace(len(lengths), 4000, num_sms, "cpu")
    module.prepare(work, lengths, table, config=config)
    first = [max(n - (window or n), 0) // config.tile for n in lengths]
    visited = _walk(module, config, work, first)
    for b, length in enumerate(lengths):
        assert sorted(visited[b]) == list(range(first[b], -(-length // config.tile)))
    used = work.items[work.items[:, 3] > 0]
    assert used[:, 0].unique().tolist() == list(range(len(lengths)))  # also the idle ones
    assert len(used) <= module.count_items(len(lengths), num_sms, config)
    for number, (b, length, first_item, *_) in enumerate(used.tolist()):
        last = max(-(-length // config.tile) - 1, 0)
        for warp in range(config.warps):
            tile = first[b] + (number - first_item) * config.warps + warp
            page = min(tile, last) * config.tile // 64
            assert work.items[number, 8 + warp] == b * 63 + page


def test_work_is_shared_by_length() -> None:
    module = load(emit(make_spec(FORMATS["int4"])))
    shares = module.share_items(torch.tensor([1024, 32, 512, 0]).numpy(), 4, 49)
    assert shares.tolist() == [31, 1, 16, 1]  # 33 tiles an item, where 32 would be 1 item too many
    assert module.share_items(torch.tensor([8, 1]).numpy(), 4, 49).tolist() == [2, 1]


def test_a_plan_for_another_config_is_refused() -> None:
    module = load(emit(make_spec(FORMATS["int4"])))
    work = module.make_workspace(1, 64, 132, "cpu")
    q = torch.zeros(1, 32, 128, dtype=torch.float16)
    lengths, table = torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    cache = module.Cache(torch.zeros(2, 8, 2176, dtype=torch.int32))
    module.prepare(work, [1], table, config=module.CONFIGS[1])
    with pytest.raises(ValueError, match="planned for"):
        module.decode(q, cache, table, lengths, work, q.clone(), scale=1.0)
