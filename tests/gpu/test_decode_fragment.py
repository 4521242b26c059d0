"""The decode kernel over pages in fragment order, on the device, against fp64."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import fragment_cases as cases
import pytest
import torch
from torch import Tensor

from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec

pytestmark = pytest.mark.gpu

MAX_SEQ_LEN = 1024
LENGTHS = [1000, 0, 1, 63, 64, 65, 15, 16, 17, 129, 31, 512, 700]
# Weights are rounded to the 16 bits of the operand; outputs here are of the size of one.
TOLERANCE = {"float16": 4e-3, "bfloat16": 1.6e-2}


@dataclasses.dataclass
class Case:
    """Inputs of one launch, and what must come out."""

    spec: DecodeSpec
    module: ModuleType
    q: Tensor
    pool: Tensor
    table: Tensor
    lengths: list[int]
    extras: dict[str, Tensor]
    out: Tensor
    lse: Tensor

    @property
    def scale(self) -> float:
        return self.spec.site.key.head_dim**-0.5

    def workspace(self) -> Any:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        work = self.module.make_workspace(len(self.lengths), MAX_SEQ_LEN, sms, "cuda")
        work.parts.fill_(torch.nan)
        work.stats.fill_(torch.nan)
        return work

    def run(self, work: Any, config: Any, out: Tensor, lse: Tensor) -> None:
        extras = {**self.extras, "lse": lse} if self.spec.has_lse else self.extras
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        cache = self.module.Cache(self.pool)
        self.module.decode(
            self.q, cache, self.table, lengths, work, out, scale=self.scale, config=config, **extras
        )


def make_case(spec: DecodeSpec, lengths: list[int] = LENGTHS) -> Case:
    """Return a case whose pages hold NaN wherever nothing may be read."""
    torch.manual_seed(0)
    site = spec.site
    width = -(-MAX_SEQ_LEN // site.page_size)
    num_pages = 1 + len(lengths) * width
    planes = cases.random_planes(site, num_pages, "cuda")
    order = 1 + torch.randperm(num_pages - 1).reshape(len(lengths), width)
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    for b, length in enumerate(lengths):
        used = -(-length // site.page_size)
        table[b, :used] = order[b, :used]
    extras = cases.random_extras(spec, len(lengths), MAX_SEQ_LEN, "cuda")
    dtype = getattr(torch, site.dtype)
    wide = torch.randn(len(lengths), site.num_q_heads + 3, site.key.head_dim + 16, device="cuda")
    q = wide.to(dtype)[:, 1:-2, : site.key.head_dim]  # strides that no product of sizes gives
    scale = site.key.head_dim**-0.5
    out, lse = cases.reference(spec, q, planes, table.cuda(), lengths, scale, extras)
    poison(planes, table, lengths, site.page_size)
    pool = fragment.from_planes(site, planes)
    pool[0] = 0x7FFF7FFF  # the null page: NaN as float16 and as bfloat16
    q[[length == 0 for length in lengths]] = torch.nan
    module = load(emit(spec))
    return Case(spec, module, q, pool, table.cuda(), lengths, extras, out, lse)


def poison(
    planes: dict[str, dict[str, Tensor]], table: Tensor, lengths: list[int], page: int
) -> None:
    """Put NaN after the last token of each sequence and into pages that nobody owns, in place."""
    for stream in planes.values():
        for plane in stream.values():
            if plane.dtype == torch.uint8:
                continue
            kept = torch.full_like(plane, torch.nan)
            for b, length in enumerate(lengths):
                for i in range(-(-length // page)):
                    n, tokens = table[b, i], min(page, length - i * page)
                    kept[n, :, :tokens] = plane[n, :, :tokens]
            plane.copy_(kept)


def check(case: Case, config: Any) -> float:
    """Run a case and return the largest error of the output, which must be small."""
    work = case.workspace()
    case.module.prepare(work, case.lengths, case.table.cpu(), config=config)
    out = torch.full_like(case.out, torch.nan).to(case.q.dtype)
    lse = torch.full_like(case.lse, torch.nan).float()
    case.run(work, config, out, lse)
    error = (out.double() - case.out).abs().amax().item()
    streams = case.spec.site.streams.values()
    limit = max(
        TOLERANCE[case.spec.site.dtype], *(TOLERANCE[s.dtype or "float16"] for s in streams)
    )
    assert error < limit, (config, error)
    assert not out[[length == 0 for length in case.lengths]].any()
    if case.spec.has_lse:
        torch.testing.assert_close(lse, case.lse.float(), rtol=1e-3, atol=4e-3)
    assert not work.arrived.any()
    return error


def make_spec(
    kind: str, value: str = "", *, options: dict[str, Any] | None = None, **geometry: Any
) -> DecodeSpec:
    return DecodeSpec(cases.make_site(kind, value, **geometry), **(options or {}))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_config_of_every_format(kind: str) -> None:
    dtype = kind if kind in cases.PLAIN else "float16"
    case = make_case(make_spec(kind, dtype=dtype, options={"query_block": 128}))
    for config in case.module.CONFIGS:
        check(case, config)


GEOMETRIES = [
    ("int4", {"groups": 1}),
    ("int4", {"groups": 3, "heads": 3, "head_dim": 64}),
    ("int8", {"groups": 5, "head_dim": 64}),
    ("int4-symmetric", {"groups": 8}),
    ("int8-symmetric", {"groups": 16}),
    ("int4", {"groups": 12}),
    ("float16", {"head_dim": 64, "groups": 2}),
    ("bfloat16", {"groups": 16, "dtype": "bfloat16"}),
    ("int2", {"head_dim": 256, "groups": 2}),
    ("int4", {"head_dim": 256, "groups": 2}),
    ("int8", {"head_dim": 256, "groups": 8, "dtype": "bfloat16"}),
    ("int4", {"page_size": 16}),
    ("int2", {"page_size": 32}),
    ("int8", {"page_size": 256}),
    ("bfloat16", {"page_size": 16, "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("kind", "geometry"), GEOMETRIES)
def test_geometries(kind: str, geometry: dict[str, Any]) -> None:
    case = make_case(make_spec(kind, options={"has_lse": True}, **geometry))
    check(case, case.module.CONFIGS[0])


MIXED = [
    ("int8-symmetric", "int4"),
    ("int4", "int2"),
    ("int2", "int8"),
    ("float16", "int2"),
    ("int8", "bfloat16"),
]


@pytest.mark.parametrize(("key", "value"), MIXED)
def test_keys_and_values_of_different_formats(key: str, value: str) -> None:
    case = make_case(make_spec(key, value, options={"query_block": 64}))
    check(case, case.module.CONFIGS[0])


FEATURES = [
    {"window": 100, "has_lse": True},
    {"window": 1, "has_lse": True},
    {"chunk": 96, "has_lse": True, "query_block": 16},
    {"softcap": 2.0, "has_lse": True, "query_block": 8, "has_signs": True},
    {"has_sink_logits": True, "has_lse": True, "query_block": 32},
    {"has_alibi": True, "has_lse": True},
    {"has_slot_bias": True, "has_lse": True, "has_signs": True, "query_block": 128},
    {
        "window": 300,
        "softcap": 5.0,
        "has_sink_logits": True,
        "has_alibi": True,
        "has_slot_bias": True,
        "has_lse": True,
        "has_signs": True,
        "query_block": 128,
    },
]


@pytest.mark.parametrize("kind", ["int4", "int2", "int8-symmetric", "bfloat16"])
@pytest.mark.parametrize("options", FEATURES, ids=lambda options: "-".join(options))
def test_features(kind: str, options: dict[str, Any]) -> None:
    case = make_case(make_spec(kind, options=options))
    check(case, case.module.CONFIGS[0])


def test_a_window_reads_no_page_before_it() -> None:
    case = make_case(make_spec("bfloat16", options={"window": 100}), [1000])
    case.table[0, : (1000 - 100) // 64] = 2**30  # such a page is in nobody's memory
    check(case, case.module.CONFIGS[0])


def test_200_launches_give_the_same_bits() -> None:
    case = make_case(make_spec("int4", options={"query_block": 128}), [1000, 3, 777, 64])
    config = case.module.CONFIGS[0]
    work = case.workspace()
    case.module.prepare(work, case.lengths, case.table.cpu(), config=config)
    outs = [torch.empty_like(case.out).to(case.q.dtype) for _ in range(200)]
    for out in outs:
        case.run(work, config, out, case.lse)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_a_graph_follows_lengths_that_change() -> None:
    long = make_case(make_spec("int4"), [1000, 900, 64])
    config = long.module.CONFIGS[0]
    work = long.workspace()
    out = torch.empty_like(long.out).to(long.q.dtype)
    long.module.prepare(work, long.lengths, long.table.cpu(), config=config)
    long.run(work, config, out, long.lse)  # compiles
    graph = torch.cuda.CUDAGraph()
    lengths = torch.tensor(long.lengths, dtype=torch.int32, device="cuda")
    with torch.cuda.graph(graph):
        cache = long.module.Cache(long.pool)
        long.module.decode(
            long.q, cache, long.table, lengths, work, out, scale=long.scale, config=config
        )
    for changed in ([1000, 900, 64], [7, 899, 63], [512, 1, 2]):
        planes = fragment.to_planes(long.spec.site, long.pool)
        want, _ = cases.reference(
            long.spec, long.q, planes, long.table, changed, long.scale, long.extras
        )
        long.module.prepare(work, changed, long.table.cpu(), config=config)
        out.fill_(torch.nan)
        graph.replay()
        assert (out.double() - want).abs().amax() < TOLERANCE["float16"]


def test_a_plan_for_another_config_is_refused() -> None:
    case = make_case(make_spec("int4"), [10])
    first, second = case.module.CONFIGS[:2]
    work = case.workspace()
    case.module.prepare(work, case.lengths, case.table.cpu(), config=first)
    out = torch.empty_like(case.out).to(case.q.dtype)
    with pytest.raises(ValueError, match="planned for"):
        case.run(work, second, out, case.lse)
