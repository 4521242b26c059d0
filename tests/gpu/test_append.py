"""Append kernels on a CUDA device: every byte of the cache against the codecs, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from append_cases import Appender, assert_same_bits
from triton_cases import codec_stream, encode, int_stream, make_site, plain_stream, random_kv

from kvxform.codecs.base import Codec
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.hadamard import block_hadamard, make_signs
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.packing import unpack
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.spec import AppendSpec, SiteSpec

pytestmark = pytest.mark.gpu

# New tokens of two rows in each step: several tiles, ragged ends, one token, none.
STEPS = ((3, 1), (1, 0), (0, 0), (69, 140), (1, 1), (100, 2))
INT8 = int_stream(128, 8, symmetric=True)
ROWS = {
    "int4": (int_stream(128), INT8),
    "int3, head_dim 80": (int_stream(80, 3), int_stream(96, 2)),
    "small groups": (int_stream(128, group=32), int_stream(128, 2, group=64, zero="float")),
    "plain": (plain_stream(128, "bfloat16"), int_stream(128, clip=0.9, include_zero=True)),
    "sliding": (int_stream(128, sink=4, keep=40), int_stream(128, 2, sink=4, keep=7, chunk=4)),
    "sink": (int_stream(128, sink=4), int_stream(128, sink=4)),
    "groups of tokens": (
        int_stream(128, 2, axis="channel", group=32, chunk=128, zero="float"),
        int_stream(128, 2, group=32, zero="float", keep=128),
    ),
    "wide": (int_stream(256, 8), int_stream(192, 2)),
}
FRAGMENTS = {
    "int4": (int_stream(128), int_stream(128)),
    "int2": (int_stream(128, 2), int_stream(128, 2)),
    "int8 and int4": (INT8, int_stream(128, zero="float")),
    "plain": (plain_stream(128, "bfloat16"), int_stream(128, 8)),
    "int4, head_dim 64": (int_stream(64), int_stream(64)),
}


def check(site: SiteSpec) -> Appender:
    ends = [sum(counts) for counts in zip(*STEPS, strict=True)]
    appender = Appender(AppendSpec(site), ends, "cuda")
    appender.append_all(*random_kv(site, 2, max(ends)), STEPS)
    return appender


def site_of(streams: tuple[Any, Any], **options: Any) -> SiteSpec:
    return make_site(*streams, page_size=64, dtype="bfloat16", **options)


@pytest.mark.parametrize("name", ROWS)
def test_pages_as_rows(name: str) -> None:
    check(site_of(ROWS[name]))


@pytest.mark.parametrize("name", FRAGMENTS)
def test_pages_in_fragment_order(name: str) -> None:
    check(site_of(FRAGMENTS[name], layout="fragment"))


@pytest.mark.parametrize("layout", ["rows", "fragment"])
@pytest.mark.parametrize("block", [16, 128])
def test_hadamard_is_within_a_code_of_the_rotated_keys(layout: str, block: int) -> None:
    site = site_of((int_stream(128), INT8), layout=layout)
    appender = Appender(AppendSpec(site, key_block=block, has_signs=True), [777], "cuda")
    k, v = random_kv(site, 1, 777)
    signs = make_signs(128, seed=1)
    assert signs is not None
    for count in (776, 1):
        appender.append(k, v, [count], signs=signs.cuda())
    tensors = {name: tensor.cpu() for name, tensor in appender.tensors.items()}
    if layout == "fragment":
        pages = fragment.to_planes(site, tensors["pool"])["key"]["codes"]
    else:
        pages = tensors["key_codes"]
    stored = pages[appender.block_table[0].long()].transpose(0, 1).flatten(1, 2)[:, :777]
    wanted = encode(site.key, block_hadamard(k.float(), block, signs))["codes"][0]
    apart = (unpack(stored, 4).int() - unpack(wanted, 4).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 1e-4


@pytest.mark.parametrize(("layout", "name"), [("rows", "sliding"), ("fragment", "int4")])
def test_one_token_in_a_graph_is_one_token_without_it(layout: str, name: str) -> None:
    streams = ROWS[name] if layout == "rows" else FRAGMENTS[name]
    site = site_of(streams, layout=layout)
    k, v = random_kv(site, 1, 60)
    eager = Appender(AppendSpec(site), [60], "cuda")
    torch.manual_seed(0)
    replayed = Appender(AppendSpec(site), [60], "cuda")
    replayed.block_table, replayed.rows = eager.block_table, eager.rows
    new = [torch.zeros_like(x[:, :, :1]).cuda() for x in (k, v)]
    start, count = torch.zeros(1, dtype=torch.int32).cuda(), torch.ones(1, dtype=torch.int32).cuda()
    options = {"rows": replayed.rows.cuda()} if site.has_exact else {}
    module, table = replayed.module, replayed.block_table.cuda()
    arguments = (*new, module.Cache(**replayed.tensors), table, start, count)
    module.append(*arguments[:5], count * 0, **options)  # compiles, stores nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module.append(*arguments, **options)
    for position in range(60):
        eager.append(k, v, [1])
        for target, x in zip(new, (k, v), strict=True):
            target.copy_(x[:, :, position : position + 1])
        start.fill_(position)
        graph.replay()
    eager.check(k, v)
    for plane, tensor in eager.tensors.items():
        assert_same_bits(replayed.tensors[plane], tensor, plane)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_one_token_of_several_heads_a_program(name: str) -> None:
    site = site_of(FRAGMENTS[name], layout="fragment", heads=(32, 8))
    appender = Appender(AppendSpec(site), [70, 9], "cuda")
    k, v = random_kv(site, 2, 70)
    appender.append(k, v, [62, 0])
    for heads, counts in ((1, (1, 1)), (2, (1, 1)), (4, (1, 0)), (8, (1, 1)), (16, (1, 1))):
        config = appender.module.CONFIGS[0]._replace(heads=heads)
        appender.append(k, v, counts, config=config)
        appender.check(k, v)


@pytest.mark.parametrize(
    "codec",
    [
        LloydMaxCodec(16),
        LloydMaxCodec(8, gain="corrected"),
        LloydMaxCodec(4, gain="projected"),
        FibVqCodec(256, 4),
        FibVqCodec(64, 2, gain="corrected"),
        TokenNormCodec(IntCodec(2, axis="channel", group=32)),
        TokenNormCodec(IntCodec(4)),
    ],
    ids=str,
)
def test_norms_and_tables(codec: Codec) -> None:
    """Sums of squares are rounded in another order, so a code in a thousand may differ."""
    site = site_of((codec_stream(128, codec), int_stream(128)), heads=(8, 4))
    appender = Appender(AppendSpec(site), [160], "cuda")
    k, v = random_kv(site, 1, 160)
    for count in (1, 90, 1, 68):
        appender.append(k, v, [count])
    wanted = codec.encode(k[0].to(torch.float16) if site.has_exact else k[0])
    for plane in site.key.planes:
        pages = appender.tensors[f"key_{plane.name}"].cpu()[appender.block_table[0].long()]
        found = pages.transpose(0, 1).flatten(1, 2)[:, : 160 // plane.tokens_per_row]
        apart = found.double() - wanted[plane.name].double()
        if plane.name == "codes":
            assert (apart != 0).double().mean() < 4e-3
        else:
            assert (apart.abs() <= 2e-3 * wanted[plane.name].double().abs()).all()
