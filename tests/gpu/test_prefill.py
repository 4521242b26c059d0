"""Prefill, gather and column scores on the device, against float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from prefill_cases import make_case, reference, run_prefill
from triton_cases import (
    codec_stream,
    int_stream,
    live_copy,
    make_site,
    plain_stream,
    random_kv,
    store,
)

from kvxform.codecs.base import dtype_from_name
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.hadamard import block_hadamard, make_signs
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.prefill_hopper import is_hopper
from kvxform.codegen.triton.spec import ColumnScoresSpec, GatherSpec, PrefillSpec, SiteSpec

pytestmark = pytest.mark.gpu


def hopper(*sizes: Any, **options: Any) -> Any:
    """Return a case for the kernel that only Hopper runs."""
    spec = PrefillSpec(*sizes, **options, for_hopper=True)
    device = torch.device("cuda")
    able = torch.cuda.is_available() and is_hopper(device)
    return pytest.param(spec, marks=pytest.mark.skipif(not able, reason="not a Hopper device"))


def name(spec: PrefillSpec) -> str:
    """Return the id of a case."""
    return f"{'hopper-' if spec.for_hopper else ''}{spec.key_dim}-{spec.dtype}"


# Weights are rounded to the dtype of V; outputs are of the size of one.
TOLERANCE = {"float16": 3e-3, "bfloat16": 2.5e-2, "float32": 3e-6}
OSCAR = TokenNormCodec(IntCodec(2, axis="channel", group=32))
KIVI = {"key_sink": 4, "value_sink": 4, "key_chunk": 128, "value_keep": 128}


@pytest.mark.parametrize(
    "spec",
    [
        PrefillSpec(32, 8, 128, 128, "bfloat16", has_lse=True),
        PrefillSpec(32, 8, 128, 128, "float16", **KIVI, has_lse=True),
        PrefillSpec(9, 3, 64, 64, "bfloat16", key_keep=9, key_chunk=8),
        PrefillSpec(8, 8, 80, 96, "float16", window=70, softcap=20.0),
        PrefillSpec(16, 1, 256, 256, "bfloat16", has_sink_logits=True),
        PrefillSpec(4, 2, 192, 128, "float16", chunk=100, has_alibi=True, has_lse=True),
        PrefillSpec(4, 2, 64, 64, "float32", value_keep=40, has_lse=True),
        hopper(32, 8, 128, 128, "bfloat16", has_lse=True),
        hopper(8, 4, 64, 64, "float16", has_lse=True),
        hopper(4, 4, 128, 128, "float16"),
        hopper(16, 1, 64, 64, "bfloat16"),
    ],
    ids=name,
)
def test_prefill(spec: PrefillSpec) -> None:
    case = make_case(spec, [0, 300, 37, 5], [400, 1, 190, 0], "cuda")
    wanted, wanted_lse, _ = reference(case)
    module = load(emit(spec))
    for config in module.CONFIGS:
        out, lse = run_prefill(module, case, config=config)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])
        if spec.has_lse:
            torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", [hopper(16, 4, 128, 128, "bfloat16")], ids=name)
def test_prefill_over_many_tiles(spec: PrefillSpec) -> None:
    case = make_case(spec, [1500, 0, 1023, 127], [130, 700, 1, 129], "cuda")
    wanted, _, _ = reference(case)
    module = load(emit(spec))
    for config in module.CONFIGS:
        out, _ = run_prefill(module, case, config=config)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])


@pytest.mark.parametrize(
    "spec",
    [
        PrefillSpec(32, 8, 128, 128, "bfloat16", query_block=128, has_signs=True, has_lse=True),
        PrefillSpec(9, 3, 64, 64, "float16", query_block=16, key_keep=9, key_chunk=8),
        PrefillSpec(16, 2, 256, 256, "bfloat16", query_block=256),
        PrefillSpec(4, 2, 96, 96, "float32", query_block=32, has_lse=True),
        hopper(32, 8, 128, 128, "bfloat16", query_block=128, has_signs=True, has_lse=True),
        hopper(8, 4, 64, 64, "float16", query_block=16),
    ],
    ids=name,
)
def test_queries_are_rotated(spec: PrefillSpec) -> None:
    plain = dataclasses.replace(spec, query_block=0, has_signs=False)
    case = make_case(plain, [0, 300, 37, 5], [400, 1, 190, 0], "cuda")
    signs = make_signs(spec.key_dim, seed=1) if spec.has_signs else None
    q = block_hadamard(case.q.double().cpu(), spec.query_block, signs).cuda()
    wanted, wanted_lse, _ = reference(case._replace(q=q))
    options = {} if signs is None else {"signs": signs.cuda()}
    rotated = case._replace(spec=spec, options=options)
    module = load(emit(spec))
    for config in module.CONFIGS:
        out, lse = run_prefill(module, rotated, config=config)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])
        if spec.has_lse:
            atol = 0.05 if spec.dtype == "bfloat16" else 1e-4  # rotated queries are rounded
            torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=atol)


def test_prefill_and_column_scores_agree() -> None:
    spec = PrefillSpec(32, 8, 128, 128, "bfloat16", has_lse=True, window=300)
    case = make_case(spec, [0, 300], [400, 200], "cuda")
    _, lse = run_prefill(load(emit(spec)), case)
    module = load(emit(ColumnScoresSpec(32, 8, 128, "bfloat16", window=300)))
    keys = case.stored[0]
    starts, counts = case.int32(case.starts), case.int32(case.counts)
    for config in module.CONFIGS:
        scores = torch.full(keys.shape[:3], math.nan, device="cuda")
        module.column_scores(
            case.q, keys, lse, starts, counts, scores, scale=case.scale, config=config
        )
        torch.testing.assert_close(scores.double(), reference(case)[2], rtol=1e-3, atol=1e-3)
        sums = torch.tensor([[1600.0], [800.0]], device="cuda").expand(-1, 8)
        torch.testing.assert_close(scores.sum(-1), sums, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "site",
    [
        make_site(int_stream(128), heads=(32, 8), page_size=64, layout="fragment"),
        make_site(int_stream(128, 2), int_stream(128, 8), page_size=64, layout="fragment"),
        make_site(plain_stream(64), int_stream(64), page_size=32, layout="fragment"),
        make_site(int_stream(80, 3, sink=4, keep=64), int_stream(96, 4, group=32, sink=4)),
        make_site(int_stream(40, 3), int_stream(40, 2, group=8), dtype="bfloat16"),
        make_site(int_stream(128, 2, axis="channel", zero="float"), dtype="bfloat16"),
        make_site(int_stream(64, 8, symmetric=True, keep=9), plain_stream(48), dtype="float32"),
        make_site(codec_stream(128, LloydMaxCodec(16)), codec_stream(128, FibVqCodec(64, 2))),
        make_site(codec_stream(128, OSCAR), codec_stream(128, FibVqCodec(256, 4))),
    ],
    ids=lambda site: f"{site.layout}-{site.key.bits}-{site.value.bits}",
)
def test_gather(site: SiteSpec) -> None:
    lengths = (0, 1, 31, 32, 33, 300)
    kv = random_kv(site, len(lengths), 302)
    stored = store(site, *kv, lengths).to("cuda")
    dtype = dtype_from_name(site.dtype)
    rows = {"rows": stored.rows} if site.has_exact else {}
    module = load(emit(GatherSpec(site)))
    for config in module.CONFIGS:
        outs = [torch.full(x.shape, math.nan, dtype=dtype, device="cuda") for x in kv]
        cache = stored.cache(module)
        module.gather(cache, stored.block_table, stored.lengths, *outs, **rows, config=config)
        for out, x, stream in zip(outs, kv, (site.key, site.value), strict=True):
            for b, length in enumerate(lengths):
                wanted = live_copy(stream, x[b], length).float().to(dtype)
                assert torch.equal(out[b, :, :length].cpu(), wanted)
                assert out[b, :, length:].isnan().all()
