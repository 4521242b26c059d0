"""The decode kernel over pages in fragment order, on the device, against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decode_cases import check_decode
from torch import Tensor
from triton_cases import (
    Stored,
    codec_stream,
    decode_reference,
    int_stream,
    make_site,
    plain_stream,
    random_kv,
    random_q,
    store,
)

from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec

pytestmark = pytest.mark.gpu

NUM_SMS = 132
LENGTHS = [1000, 0, 1, 63, 64, 65, 15, 16, 17, 129, 31, 512, 700]
STREAMS = {
    "int2": int_stream(128, 2),
    "int4": int_stream(128),
    "int4-float": int_stream(128, zero="float"),
    "int4-symmetric": int_stream(128, symmetric=True),
    "int8": int_stream(128, 8),
    "int8-symmetric": int_stream(128, 8, symmetric=True),
    "float16": plain_stream(128),
    "bfloat16": plain_stream(128, "bfloat16"),
    "levels4": codec_stream(128, LloydMaxCodec(4)),
    "levels16": codec_stream(128, LloydMaxCodec(16)),
}


def make_spec(
    key: StreamSpec,
    value: StreamSpec | None = None,
    *,
    heads: tuple[int, int] = (8, 2),
    page_size: int = 64,
    dtype: str = "float16",
    **options: Any,
) -> DecodeSpec:
    site = make_site(key, value, heads=heads, page_size=page_size, layout="fragment", dtype=dtype)
    return DecodeSpec(site, **{"has_lse": True, **options})


def check(spec: DecodeSpec, **run: Any) -> None:
    """Compare with float64; where values are bfloat16, so are the weights of the product."""
    site = spec.site
    is_coarse = "bfloat16" in (site.dtype, site.key.dtype, site.value.dtype)
    tolerance = 2e-2 if is_coarse else 3e-3
    check_decode(spec, LENGTHS, device="cuda", num_sms=NUM_SMS, tolerance=tolerance, **run)


@pytest.mark.parametrize("config", range(8))
@pytest.mark.parametrize("name", STREAMS)
def test_every_config_of_every_format(name: str, config: int) -> None:
    check(make_spec(STREAMS[name], query_block=128), config=config)


@pytest.mark.parametrize(
    ("stream", "options"),
    [
        (int_stream(128), {"heads": (2, 2)}),
        (int_stream(64), {"heads": (9, 3)}),
        (codec_stream(64, LloydMaxCodec(16, gain="corrected")), {"heads": (9, 3)}),
        (int_stream(64, 8), {"heads": (10, 2)}),
        (int_stream(128, symmetric=True), {"heads": (16, 2)}),
        (int_stream(128, 8, symmetric=True), {"heads": (32, 2)}),
        (int_stream(128), {"heads": (12, 1)}),
        (plain_stream(64), {"heads": (4, 2)}),
        (plain_stream(128, "bfloat16"), {"heads": (32, 2), "dtype": "bfloat16"}),
        (int_stream(256, 2), {"heads": (4, 2)}),
        (int_stream(256), {"heads": (4, 2)}),
        (int_stream(256, 8), {"heads": (16, 2), "dtype": "bfloat16"}),
        (int_stream(128), {"page_size": 16}),
        (int_stream(128, 2), {"page_size": 32}),
        (int_stream(128, 8), {"page_size": 256}),
        (plain_stream(128, "bfloat16"), {"page_size": 16, "dtype": "bfloat16"}),
    ],
)
def test_geometries(stream: StreamSpec, options: dict[str, Any]) -> None:
    check(make_spec(stream, **options))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("int8-symmetric", "int4"),
        ("int4", "int2"),
        ("int2", "int8"),
        ("float16", "int2"),
        ("int8", "bfloat16"),
    ],
)
def test_keys_and_values_of_different_formats(key: str, value: str) -> None:
    check(make_spec(STREAMS[key], STREAMS[value], query_block=64))


@pytest.mark.parametrize("name", ["int4", "int2", "int8-symmetric", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 100},
        {"window": 1},
        {"chunk": 96, "query_block": 16},
        {"softcap": 2.0, "query_block": 8, "has_signs": True},
        {"has_sink_logits": True, "query_block": 32, "has_lse": False},
        {"has_alibi": True},
        {"has_slot_bias": True, "has_signs": True, "query_block": 128},
        {"window": 300, "softcap": 5.0, "has_sink_logits": True, "has_alibi": True}
        | {"has_slot_bias": True, "has_signs": True, "query_block": 128},
    ],
    ids="-".join,
)
def test_features(name: str, options: dict[str, Any]) -> None:
    check(make_spec(STREAMS[name], **options))


class Launch:
    """A kernel and its inputs, to be launched more than once."""

    def __init__(self, spec: DecodeSpec, lengths: list[int]) -> None:
        self.site: SiteSpec = spec.site
        self.keys, self.values = random_kv(spec.site, len(lengths), max(lengths))
        self.stored: Stored = store(spec.site, self.keys, self.values, lengths).to("cuda")
        self.table = self.stored.block_table.cpu()
        self.module = load(emit(spec))
        wide = random_q(spec.site, len(lengths), spec.site.num_q_heads + 3).cuda()
        self.q = wide[:, 1:-2]  # strides that no product of sizes gives
        self.q[[length == 0 for length in lengths]] = math.nan
        self.work = self.module.make_workspace(len(lengths), max(lengths), NUM_SMS, "cuda")
        self.prepare(lengths)

    def prepare(self, lengths: list[int]) -> None:
        self.module.prepare(self.work, lengths, self.table)
        self.stored.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    @property
    def scale(self) -> float:
        return self.site.key.head_dim**-0.5

    def run(self, out: Tensor, scale: float | None = None) -> None:
        self.module.decode(
            self.q,
            self.stored.cache(self.module),
            self.stored.block_table,
            self.stored.lengths,
            self.work,
            out,
            scale=self.scale if scale is None else scale,
        )

    def check(self, out: Tensor, lengths: list[int], scale: float | None = None) -> None:
        scale, q = self.scale if scale is None else scale, self.q.cpu()
        expected, _ = decode_reference(self.site, q, self.keys, self.values, lengths, scale=scale)
        assert (out.double().cpu() - expected).abs().max() < 3e-3 * expected.abs().max()


def make_launch(lengths: list[int], **options: Any) -> Launch:
    return Launch(make_spec(STREAMS["int4"], has_lse=False, **options), lengths)


def test_free_strides_and_idle_rows() -> None:
    lengths = [700, 0, 5]
    launch = make_launch(lengths)
    wide = torch.full((3, 10, 256), math.nan, dtype=torch.float16, device="cuda")
    launch.run(wide[:, :8, :128])
    launch.check(wide[:, :8, :128], lengths)
    assert not wide[1, :8, :128].any()
    assert wide[:, 8:].isnan().all()
    assert wide[..., 128:].isnan().all()


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 100.0])
def test_warps_without_a_tile_add_nothing(size: float) -> None:
    lengths = [10, 100, 1000, 1]
    launch = make_launch(lengths)
    launch.q *= size
    for scale in (0.05, 0.0883, 0.1, 0.125, 0.3, 1.0):
        out = torch.full_like(launch.q, math.nan)
        launch.run(out, scale)
        launch.check(out, lengths, scale)


def test_a_window_reads_no_page_before_it() -> None:
    lengths = [1000]
    launch = make_launch(lengths, window=100)
    launch.stored.block_table[0, : (1000 - 100) // 64] = 2**30  # in nobody's memory
    out = torch.empty_like(launch.q)
    launch.run(out)
    assert out.isfinite().all()


def test_200_launches_give_the_same_bits() -> None:
    launch = make_launch([1000, 3, 777, 64], query_block=128)
    outs = [torch.empty_like(launch.q) for _ in range(200)]
    for out in outs:
        launch.run(out)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert not launch.work.arrived.any()


def test_a_graph_follows_lengths_that_change() -> None:
    launch = make_launch([1000, 900, 64])
    out = torch.empty_like(launch.q)
    launch.run(out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.run(out)
    for lengths in ([1000, 900, 64], [7, 899, 63], [512, 0, 2]):
        launch.prepare(lengths)
        out.fill_(math.nan)
        graph.replay()
        launch.check(out, lengths)
