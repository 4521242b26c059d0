"""Launch parameters by timing: the quickest wins, is kept, and a bad file counts as none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from kvxform.codegen.triton.autotune import Bucket, tune

CPU = torch.device("cpu")
BUCKET = Bucket.of(3, 8, 5000)


class Config(NamedTuple):
    num_warps: int


def make_module(count: int = 3, spec_hash: str = "a") -> ModuleType:
    module = ModuleType("emitted")
    module.CONFIGS = tuple(Config(2**i) for i in range(count))
    module.__kvx_meta__ = {
        "kernel": "decode",
        "spec_hash": spec_hash,
        "template_hash": "b",
        "versions": {"triton": "3.6.0"},
    }
    return module


class Clock:
    """Times launches by a table of microseconds for each number of warps."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times, self.ran = times, []

    def run(self, config: Config) -> None:
        self.ran.append(config.num_warps)

    def __call__(self, launch: Callable[[], None]) -> float:
        launch()
        return self.times[self.ran[-1]]

    def tune(self, module: ModuleType, bucket: Bucket = BUCKET) -> Any:
        return tune(module, bucket, self.run, device=CPU, timer=self)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path))


def test_buckets_are_powers_of_two():
    assert Bucket.of(3, 8, 5000) == Bucket(32, 8192)
    assert Bucket.of(4, 8, 8192) == Bucket(32, 8192)
    assert Bucket.of(1, 1, 1) == Bucket(1, 1)


def test_the_quickest_wins_and_is_remembered():
    clock = Clock({1: 30.0, 2: 10.0, 4: 20.0})
    assert clock.tune(make_module()) == Config(2)
    assert clock.ran == [1, 2, 4]
    assert Clock({}).tune(make_module()) == Config(2)  # a new process: nothing is timed


def test_another_shape_or_kernel_is_timed_on_its_own():
    Clock({1: 1.0, 2: 2.0, 4: 3.0}).tune(make_module())
    slower = {1: 3.0, 2: 2.0, 4: 1.0}
    assert Clock(slower).tune(make_module(), Bucket.of(1, 8, 5000)) == Config(4)
    assert Clock(slower).tune(make_module(spec_hash="c")) == Config(4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: b"[]",
        lambda data: data.replace(b'"num_warps": 2', b'"num_warps": 64'),  # not on offer any more
        lambda data: data.replace(b"3.6.0", b"9.9.9"),
    ],
)
def test_a_bad_file_counts_as_none(damage: Callable[[bytes], bytes], tmp_path: Path):
    Clock({1: 30.0, 2: 10.0, 4: 20.0}).tune(make_module())
    (path,) = (tmp_path / "tuning").iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    clock = Clock({1: 30.0, 2: 10.0, 4: 20.0})
    assert clock.tune(make_module()) == Config(2)
    assert clock.ran == [1, 2, 4]
    assert path.read_bytes() == good


def test_the_file_says_what_was_measured(tmp_path: Path):
    Clock({1: 30.0, 2: 10.0, 4: 20.0}).tune(make_module())
    (path,) = (tmp_path / "tuning").iterdir()
    data = json.loads(path.read_text())
    assert data["device"] == "cpu"
    assert data["bucket"] == {"heads": 32, "tokens": 8192}
    assert data["microseconds"][1] == [{"num_warps": 2}, 10.0]


def test_at_most_eight_are_timed():
    clock = Clock({2**i: 1.0 + i for i in range(10)})
    clock.tune(make_module(10))
    assert len(clock.ran) == 8


def test_the_host_prepares_each_config_before_it_is_timed():
    clock, events = Clock({1: 30.0, 2: 10.0, 4: 20.0}), []

    def prepare(config: Config) -> None:
        events.append(("prepare", config))

    def run(config: Config) -> None:
        events.append(("run", config))
        clock.run(config)

    module = make_module()
    tune(module, BUCKET, run, device=CPU, prepare=prepare, timer=clock)
    assert events == [(what, config) for config in module.CONFIGS for what in ("prepare", "run")]


def test_one_config_or_the_interpreter_needs_no_clock():
    clock = Clock({})
    assert clock.tune(make_module(1)) == Config(1)
    assert tune(make_module(), BUCKET, clock.run, device=CPU) == Config(1)
    assert clock.ran == []


def test_a_config_that_does_not_fit_is_left_out():
    errors = pytest.importorskip("triton.runtime.errors")

    def run(config: Config) -> None:
        if config.num_warps > 1:
            raise errors.OutOfResources(300, 200, "shared memory")
        clock.run(config)

    clock = Clock({1: 30.0})
    assert tune(make_module(), BUCKET, run, device=CPU, timer=clock) == Config(1)


def test_if_none_fits_the_error_of_triton_is_shown():
    errors = pytest.importorskip("triton.runtime.errors")

    def run(config: Config) -> None:
        raise errors.OutOfResources(300, 200, "shared memory")

    with pytest.raises(errors.OutOfResources, match="shared memory"):
        tune(make_module(), BUCKET, run, device=CPU, timer=Clock({}))
