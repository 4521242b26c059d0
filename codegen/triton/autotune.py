"""Choose launch parameters by timing, once per device, kernel and bucket of shapes.

An emitted module offers at most 8 of them in `CONFIGS`. The choice is kept as JSON in the cache
folder, so that only the first session on a machine spends time on it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kvxform.atomic import write_atomically
from kvxform.folders import cache_folder
from kvxform.ir.schema import canonical_json

MAX_CONFIGS = 8
LAUNCHES = 10  # in one graph, so that the launch of the graph itself does not count
REPLAYS = 20

Config = Any  # a NamedTuple class of the emitted module
Timer = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Bucket:
    """Shapes that share a choice: both sizes rounded up to powers of two.

    Attributes:
        heads: Sequences times KV heads.
        tokens: Longest sequence.
    """

    heads: int
    tokens: int

    @classmethod
    def of(cls, batch_size: int, num_kv_heads: int, max_seq_len: int) -> Bucket:
        """Return the bucket of a shape."""
        return cls(_power_of_two(batch_size * num_kv_heads), _power_of_two(max_seq_len))


def tune(
    module: ModuleType,
    bucket: Bucket,
    run: Callable[[Config], None],
    *,
    device: torch.device,
    prepare: Callable[[Config], None] | None = None,
    timer: Timer | None = None,
) -> Config:
    """Return the quickest of the `CONFIGS` of an emitted module, from the cache folder if known.

    Args:
        module: What `loading.load` returned.
        bucket: Shapes of the session.
        run: Launches the kernel once with a config, on buffers of those shapes.
        device: Where it runs. On a CPU, where kernels are interpreted, nothing is timed.
        prepare: What the host does for a config before it is launched; not timed.
        timer: Returns the microseconds of one call; `time_graph` by default.
    """
    configs = module.CONFIGS[:MAX_CONFIGS]
    if len(configs) == 1 or (device.type == "cpu" and timer is None):
        return configs[0]
    identity = _identity(module, bucket, device)
    path = _path(identity)
    known = _read(path, identity, configs)
    if known is not None:
        return known
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        times = _time_all(configs, run, prepare, timer or time_graph)
    best = min(times, key=lambda config: times[config])
    microseconds = [[config._asdict(), round(time, 3)] for config, time in times.items()]
    _write(path, {**identity, "config": best._asdict(), "microseconds": microseconds})
    return best


def time_graph(launch: Callable[[], None]) -> float:
    """Return the median time of one launch in microseconds, from replays of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        launch()  # compiles
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(LAUNCHES):
                launch()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    torch.cuda.current_stream().wait_stream(stream)
    return float(statistics.median(times))


def _time_all(
    configs: tuple[Config, ...],
    run: Callable[[Config], None],
    prepare: Callable[[Config], None] | None,
    timer: Timer,
) -> dict[Config, float]:
    """Time each config that fits the device; raise Triton's own error if none does."""
    from triton.runtime.errors import OutOfResources

    times: dict[Config, float] = {}
    failure: Exception | None = None
    for config in configs:
        if prepare is not None:
            prepare(config)
        try:
            times[config] = timer(functools.partial(run, config))
        except OutOfResources as error:
            failure = error
    if failure is not None and not times:
        raise failure
    return times


def _identity(module: ModuleType, bucket: Bucket, device: torch.device) -> dict[str, Any]:
    meta = module.__kvx_meta__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kept = ("kernel", "spec_hash", "template_hash", "versions")
    return {"device": name, "bucket": asdict(bucket), **{key: meta[key] for key in kept}}


def _path(identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(canonical_json(identity)).hexdigest()
    return cache_folder() / "tuning" / f"{identity['kernel']}_{digest[:24]}.json"


def _read(path: Path, identity: dict[str, Any], configs: tuple[Config, ...]) -> Config | None:
    """Return the stored choice, or None if there is none that can be used."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or any(data.get(k) != v for k, v in identity.items()):
        return None
    return next((config for config in configs if config._asdict() == data.get("config")), None)


def _write(path: Path, data: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, canonical_json(data))


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
