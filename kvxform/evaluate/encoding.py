"""What encoding costs: seconds until the tables of the codecs are there, and tokens per second.

As a program (`python -m kvxform.evaluate.encoding`) it reads codecs from stdin, encodes one group
with each and prints the seconds; `measure_encoding` starts it with an empty cache folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.ir.plan import CachePlan

BLOCK = 512  # tokens encoded at a time
PATIENCE = 0.5  # seconds of rounds after which a codec is not timed again
Kind = tuple[str, int, int]  # a codec as JSON, KV heads, channels


@dataclass(frozen=True)
class EncodeCost:
    """Cost of filling a cache, without the model around it.

    Attributes:
        build_s: Seconds of building all tables, measured in a process that has none in memory or
            on disk.
        cpu_tokens_per_s: Tokens per second through the codecs of all layers, in blocks, on the CPU.
        gpu_tokens_per_s: The same on the device of the model; None if that is the CPU.
        block: Tokens of a block.
    """

    build_s: float
    cpu_tokens_per_s: float
    gpu_tokens_per_s: float | None
    block: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)


def measure_encoding(
    plan: CachePlan, device: torch.device | str = "cpu", *, block: int = BLOCK, repeats: int = 5
) -> EncodeCost:
    """Time the codecs of `plan` on normally distributed values.

    Args:
        plan: What is cached.
        device: Where the model is.
        block: Tokens encoded at a time; rounded up to whole groups of a codec.
        repeats: Timed rounds, fewer for slow codecs; the median counts.
    """
    kinds = Counter(
        (json.dumps(stream.codec, sort_keys=True), site.num_kv_heads, stream.head_dim)
        for site in plan.owners
        for stream in site.streams.values()
    )

    def rate(place: torch.device) -> float:
        times = (n * _block_time(kind, place, block, repeats) for kind, n in kinds.items())
        return block / sum(times)

    place = torch.device(device)
    gpu = None if place.type == "cpu" else rate(place)
    return EncodeCost(_build_elsewhere(list(kinds)), rate(torch.device("cpu")), gpu, block)


def _block_time(kind: Kind, place: torch.device, block: int, repeats: int) -> float:
    """Return seconds of one stream for `block` tokens."""
    spec, heads, dim = kind
    codec = make_codec(json.loads(spec))
    tokens = -(-block // codec.tokens_per_group) * codec.tokens_per_group
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(heads, tokens, dim, generator=generator).to(place)
    _time_encoding(codec, x)  # a first one that does not count
    times = [_time_encoding(codec, x)]
    while len(times) < repeats and sum(times) < PATIENCE:
        times.append(_time_encoding(codec, x))
    return statistics.median(times) * block / tokens


def _time_encoding(codec: Codec, x: Tensor) -> float:
    start = time.perf_counter()
    _encode(codec, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _encode(codec: Codec, x: Tensor) -> None:
    if isinstance(codec, SaliencyCodec) and codec.needs_queries:
        codec.encode_ranked(x, x.square().sum(-1))  # scores come with the tokens
    else:
        codec.encode(x)


def _build_elsewhere(kinds: list[Kind]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "kvxform.evaluate.encoding"],
            input=json.dumps(kinds),
            env={**os.environ, "KVXFORM_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


def _build(kinds: Iterable[Kind]) -> float:
    start = time.perf_counter()
    for spec, heads, dim in kinds:
        codec = make_codec(json.loads(spec))
        _encode(codec, torch.ones(heads, codec.tokens_per_group, dim))
    return time.perf_counter() - start


if __name__ == "__main__":
    print(_build(json.load(sys.stdin)))
