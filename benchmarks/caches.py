"""Our kernels on benchmark problems: emitted for a format, pages filled by the append kernel."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from problems import (
    CHECKED_HEADS,
    DEVICE,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    SCALE,
    Problem,
    make_block_table,
)
from torch import Tensor

from kvxform.codecs.base import Codec, dtype_from_name
from kvxform.codecs.basis import Basis
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.capability import is_interpreted
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.formats import codec_fields
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import AppendSpec, DecodeSpec, KernelSpec, SiteSpec, StreamSpec

ROTATION = Basis("hadamard", HEAD_DIM)


@dataclass(frozen=True)
class Format:
    """A cache format of ours.

    Attributes:
        key: Codec of keys; None for the dtype of the model, likewise `value`.
        value: Codec of values.
        is_rotated: Whether q and K are rotated by a Hadamard of all channels in the kernels.
    """

    key: Codec | None
    value: Codec | None
    is_rotated: bool = True

    @classmethod
    def both(cls, codec: Codec) -> Format:
        """Return the format of keys and values in one codec."""
        return cls(codec, codec)

    def site(self, page_size: int, dtype: torch.dtype) -> SiteSpec:
        """Return the spec of a site, in fragment order if that layout can have it."""
        name = str(dtype).removeprefix("torch.")
        streams = [_stream(codec, name) for codec in (self.key, self.value)]
        sizes = (NUM_Q_HEADS, NUM_KV_HEADS, *streams, page_size)
        site = SiteSpec(*sizes, "fragment", name)
        if fragment.reason_against(site) is None:
            return site
        return SiteSpec(*sizes, "rows", name)


def _stream(codec: Codec | None, dtype: str) -> StreamSpec:
    """Return the spec of a stream; tokens that share scales wait for each other in a ring."""
    if codec is None:
        return StreamSpec(HEAD_DIM, 16, dtype=dtype, group=HEAD_DIM)
    chunk = codec.tokens_per_group
    exact_dtype = dtype if chunk > 1 else ""
    return StreamSpec(
        HEAD_DIM, **codec_fields(codec, HEAD_DIM), chunk=chunk, exact_dtype=exact_dtype
    )


def kivi(bits: int) -> Format:
    """Return KIVI's format: K per channel, V per token, in groups of 32, not rotated."""
    key = IntCodec(bits=bits, axis="channel", group=32, zero="float")
    value = IntCodec(bits=bits, group=32, zero="float")
    return Format(key, value, is_rotated=False)


OSCAR_KEY = TokenNormCodec(IntCodec(bits=2, axis="channel", group=32))
FORMATS = {
    "bf16": Format(None, None, is_rotated=False),
    "int8": Format.both(IntCodec(bits=8, symmetric=True)),
    "int8-zero": Format.both(IntCodec(bits=8)),
    "int4": Format.both(IntCodec(bits=4)),
    "int2": Format.both(IntCodec(bits=2)),
    "kivi4": kivi(4),
    "kivi2": kivi(2),
    "oscar2": Format(OSCAR_KEY, IntCodec(bits=2, group=32)),
    "turboquant4": Format.both(LloydMaxCodec(levels=16)),
    "turboquant2": Format.both(LloydMaxCodec(levels=4)),
    "fibquant2": Format.both(FibVqCodec(words=256, k=4)),
    "fibquant4": Format.both(FibVqCodec(words=256, k=2)),
}


def module_of(spec: KernelSpec) -> ModuleType:
    """Return the emitted module of a kernel."""
    return load(emit(spec, interpret=is_interpreted()))


def count_sms() -> int:
    """Return the multiprocessors of the device; few where kernels are interpreted."""
    if DEVICE == "cpu":
        return 4
    return torch.cuda.get_device_properties(0).multi_processor_count


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a launcher has a parameter called `name`."""
    return name in inspect.signature(function).parameters


def make_tensors(site: SiteSpec, num_pages: int, num_rows: int = 1) -> dict[str, Tensor]:
    """Return an empty cache of a site, by the names that its kernels use."""
    if site.layout == "fragment":
        size = (num_pages, site.num_kv_heads, fragment.chunk_words(site))
        return {"pool": torch.zeros(size, dtype=torch.int32, device=DEVICE)}
    tensors = {}
    for half, stream in site.streams.items():
        for plane in stream.planes:
            rows = site.page_size // plane.tokens_per_row
            size = (num_pages, plane.heads(site.num_kv_heads), rows, plane.width)
            kind = plane.torch_dtype
            tensors[f"{half}_{plane.name}"] = torch.zeros(size, dtype=kind, device=DEVICE)
        if stream.capacity:
            size = (num_rows, site.num_kv_heads, stream.capacity, HEAD_DIM)
            kind = dtype_from_name(stream.exact_dtype)
            tensors[f"{half}_recent"] = torch.zeros(size, dtype=kind, device=DEVICE)
    return tensors


def row_options(site: SiteSpec, batch_size: int) -> dict[str, Tensor]:
    """Return the option of launchers that says which buffers a sequence has, if there are any."""
    if not site.has_exact:
        return {}
    return {"rows": torch.arange(batch_size, dtype=torch.int32, device=DEVICE)}


def make_cache(module: ModuleType, tensors: dict[str, Tensor]) -> Any:
    """Return the Cache of a module."""
    return module.Cache(**{name: tensors[name] for name in module.Cache._fields})


@dataclass(frozen=True, eq=False)
class Filled:
    """Pages that hold the K and V of a problem, stored in one format.

    Attributes:
        format: The format.
        site: The spec of the site.
        tensors: Pages by name.
        table: Block table on the CPU; page 0 is nobody's.
        lengths: int32 `[B]` on the GPU.
    """

    format: Format
    site: SiteSpec
    tensors: dict[str, Tensor]
    table: Tensor
    lengths: Tensor

    @property
    def cache_bytes(self) -> float:
        """Bytes of all cached tokens, metadata included."""
        return self.site.bytes_per_token * float(self.lengths.sum())

    def copy(self) -> dict[str, Tensor]:
        """Return other tensors with the same content."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def read_back(self, row: int) -> tuple[Tensor, Tensor]:
        """Return K and V of a sequence as stored, float64 `[Hk, T, D]`, K still rotated.

        Decoded by the codec, independently of the kernels.
        """
        pages = (
            self.table[row, : -(-int(self.lengths[row]) // self.site.page_size)].long().to(DEVICE)
        )
        if self.site.layout == "fragment":
            planes = fragment.to_planes(self.site, self.tensors["pool"][pages])
        else:
            planes = {half: self._planes(half, pages) for half in ("key", "value")}
        length = int(self.lengths[row])
        found = []
        for half, codec in (("key", self.format.key), ("value", self.format.value)):
            if length % self.site.streams[half].chunk:
                raise ValueError(f"the ring of {half}s is not read back; got {length} tokens")
            planes_of_half = planes[half]
            if codec is None:
                values = planes_of_half["value"].double()
            else:
                values = codec.decode(planes_of_half, torch.float64)
            found.append(values.transpose(0, 1).flatten(1, 2))  # [n, Hk, r, D] -> [Hk, n * r, D]
        return found[0], found[1]

    def _planes(self, half: str, pages: Tensor) -> dict[str, Tensor]:
        names = [plane.name for plane in self.site.streams[half].planes]
        return {name: self.tensors[f"{half}_{name}"][pages] for name in names}


def fill(name: str, problem: Problem, page_size: int) -> Filled:
    """Store K and V of a problem in format `name`, by the append kernel."""
    chosen = FORMATS[name]
    site = chosen.site(page_size, problem.q.dtype)
    module = module_of(AppendSpec(site, key_block=HEAD_DIM if chosen.is_rotated else 0))
    table = make_block_table(problem.lengths, page_size, first_page=1)
    tensors = make_tensors(site, int(table.max()) + 1, len(problem.lengths))
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=DEVICE)
    cache = make_cache(module, tensors)
    starts = torch.zeros_like(lengths)
    options = row_options(site, len(problem.lengths))
    module.append(problem.k, problem.v, cache, table.to(DEVICE), starts, lengths, **options)
    return Filled(chosen, site, tensors, table, lengths)


def attend_stored(filled: Filled, problem: Problem) -> Tensor:
    """Return attention in float64 over what is stored; see `problems.attend_exactly`."""
    outputs = []
    for row in problem.checked_rows:
        queries = problem.q[row].double().cpu()
        if filled.format.is_rotated:
            queries = ROTATION.rotate(queries)
        queries = queries.unflatten(0, (NUM_KV_HEADS, -1)).to(DEVICE)  # [H, D] -> [Hk, G, D]
        k, v = filled.read_back(row)
        for head in CHECKED_HEADS:
            keys, values = (x[head, : problem.lengths[row]] for x in (k, v))
            outputs.append(torch.softmax(queries[head] @ keys.T * SCALE, -1) @ values)
    return torch.stack(outputs).unflatten(0, (len(problem.checked_rows), -1))


class Decoder:
    """The decode kernel of a filled cache.

    Args:
        filled: The cache.
        problem: Its queries.
    """

    def __init__(self, filled: Filled, problem: Problem) -> None:
        block = HEAD_DIM if filled.format.is_rotated else 0
        self.module = module_of(DecodeSpec(filled.site, query_block=block))
        self.filled, self.problem = filled, problem
        self.table = filled.table.to(DEVICE)
        self.out = torch.empty_like(problem.q)
        self._sizes = (len(problem.lengths), problem.max_length, count_sms(), torch.device(DEVICE))

    def prepare(self, work: Any, config: Any) -> None:
        """Plan on the host, if the kernel needs it: once a step, for all layers."""
        module = self.module
        if hasattr(module, "prepare"):
            options = {"config": config} if takes(module.prepare, "config") else {}
            module.prepare(work, self.problem.lengths, self.filled.table, **options)

    def prepare_us(self, config: Any, *, turns: int = 20) -> float:
        """Return the microseconds of the host that a plan takes, the median."""
        work = self.module.make_workspace(*self._sizes)
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            self.prepare(work, config)
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def calls(self, copies: list[dict[str, Tensor]], config: Any) -> list[Callable[[], Tensor]]:
        """Return one launch for each copy of the cache, with launch parameters `config`."""
        module = self.module
        work = module.make_workspace(*self._sizes)
        options = row_options(self.filled.site, len(self.problem.lengths))
        self.prepare(work, config)

        def attend(cache: Any) -> Tensor:
            arguments = (self.problem.q, cache, self.table, self.filled.lengths, work, self.out)
            module.decode(*arguments, scale=SCALE, **options, config=config)
            return self.out

        return [functools.partial(attend, make_cache(module, copy)) for copy in copies]
