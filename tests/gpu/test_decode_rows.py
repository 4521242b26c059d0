"""The decode kernel over pages as rows, on the device, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decode_cases import check_decode
from triton_cases import (
    codec_stream,
    decode_reference,
    int_stream,
    make_site,
    plain_stream,
    random_kv,
    random_q,
    store,
)

from kvxform.codecs.base import Codec
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec

pytestmark = pytest.mark.gpu

NUM_SMS = 20  # several splits of short sequences
LENGTHS = [0, 1, 63, 64, 65, 700, 129]
TABLE = tuple(math.sin(i * math.pi / 15 - math.pi / 2) for i in range(16))
FORMS = [
    {"zero": "int"},
    {"zero": "float", "group": 32},
    {"symmetric": True},
    {"axis": "channel"},
    {"axis": "channel", "zero": "float", "group": 64},
    {"axis": "channel", "symmetric": True, "group": 128},
    {"token_norm": "head"},
]


def make_spec(
    key: StreamSpec, value: StreamSpec | None = None, *, site: dict[str, Any], **options: Any
) -> DecodeSpec:
    site = {"heads": (8, 2), "page_size": 128, **site}
    return DecodeSpec(make_site(key, value, **site), **{"has_lse": True, **options})


def check(spec: DecodeSpec, **run: Any) -> None:
    check_decode(spec, LENGTHS, device="cuda", num_sms=NUM_SMS, **run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_form_of_codes(bits: int, form: dict[str, Any], dtype: str) -> None:
    stream = int_stream(128, bits, **form)
    check(make_spec(stream, site={"dtype": dtype}, query_block=64))


@pytest.mark.parametrize("config", range(8))
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 200])
def test_every_config_of_every_page_size(page_size: int, config: int) -> None:
    stream = int_stream(128, 4)
    check(make_spec(stream, site={"page_size": page_size}, query_block=128), config=config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_plain_values(dtype: str, page_size: int) -> None:
    site = {"dtype": dtype, "page_size": page_size}
    check(make_spec(plain_stream(128, dtype), site=site, query_block=32))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("groups", [1, 3, 7, 16, 32])
def test_every_head_dim(head_dim: int, groups: int) -> None:
    site = {"heads": (2 * groups, 2)}
    check(make_spec(int_stream(head_dim, 4), site=site, query_block=16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ({"sink": 4}, {"sink": 4}),
        ({"sink": 4, "keep": 9, "chunk": 8}, {"sink": 4, "keep": 30}),
        ({"axis": "channel", "zero": "float", "chunk": 128}, {"group": 32, "keep": 128}),
        ({"keep": 5, "chunk": 8}, {"axis": "channel"}),
        ({"axis": "channel"}, {}),
        ({}, {"axis": "channel"}),
    ],
    ids=str,
)
def test_every_kind_of_region(key: dict[str, Any], value: dict[str, Any], dtype: str) -> None:
    exact = {"exact_dtype": dtype}
    streams = [int_stream(128, 4, **fields, **exact) for fields in (key, value)]
    check(make_spec(*streams, site={"dtype": dtype}, window=300))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 100},
        {"chunk": 96},
        {"softcap": 5.0},
        {"has_sink_logits": True},
        {"has_alibi": True},
        {"has_slot_bias": True},
        {"has_signs": True, "query_block": 16},
        {"window": 170, "softcap": 5.0, "has_sink_logits": True, "has_alibi": True}
        | {"has_slot_bias": True, "has_signs": True, "query_block": 128},
    ],
    ids="-".join,
)
def test_every_option(options: dict[str, Any]) -> None:
    check(make_spec(int_stream(128, 4, sink=4), site={}, **options))


def test_tables() -> None:
    streams = (int_stream(128, 4, table=TABLE), int_stream(128, 4, table=TABLE, axis="channel"))
    check(make_spec(*streams, site={}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (LloydMaxCodec(16), LloydMaxCodec(4)),
        (LloydMaxCodec(8, gain="corrected"), FibVqCodec(256, 2)),
        (FibVqCodec(64, 2), FibVqCodec(256, 4)),
        (TokenNormCodec(IntCodec(2, axis="channel", group=32)), IntCodec(2, group=32)),
    ],
    ids=str,
)
def test_norms_and_tables(key: Codec, value: Codec, dtype: str) -> None:
    streams = codec_stream(128, key), codec_stream(128, value)
    for config in range(2):
        check(make_spec(*streams, site={"dtype": dtype}, query_block=128), config=config)


def test_a_graph_follows_lengths_that_change() -> None:
    spec = make_spec(int_stream(128, 4), site={}, has_lse=False)
    site: SiteSpec = spec.site
    keys, values = random_kv(site, 3, 1000)
    q = random_q(site, 3, site.num_q_heads)
    stored = store(site, keys, values, [1000, 900, 64]).to("cuda")
    module = load(emit(spec))
    work = module.make_workspace(3, 1000, NUM_SMS, "cuda")
    out = torch.empty_like(q, device="cuda")
    device_q = q.cuda()

    def launch() -> None:
        cache, table = stored.cache(module), stored.block_table
        module.decode(device_q, cache, table, stored.lengths, work, out, scale=0.1)

    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for lengths in ([1000, 900, 64], [7, 899, 63], [512, 0, 2]):
        stored.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        expected, _ = decode_reference(site, q, keys, values, lengths, scale=0.1)
        assert (out.double().cpu() - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_window_reads_no_page_before_it(page_size: int) -> None:
    spec = make_spec(int_stream(128, 4), site={"page_size": page_size}, has_lse=False, window=100)
    keys, values = random_kv(spec.site, 1, 1000)
    q = random_q(spec.site, 1, spec.site.num_q_heads).cuda()
    stored = store(spec.site, keys, values, [1000]).to("cuda")
    stored.block_table[0, : (1000 - 100) // 128 * 128 // page_size] = 2**30  # nobody's memory
    module = load(emit(spec))
    out = torch.full_like(q, math.nan)
    work = module.make_workspace(1, 1000, NUM_SMS, "cuda")
    module.decode(q, stored.cache(module), stored.block_table, stored.lengths, work, out, scale=0.1)
    assert out.isfinite().all()
