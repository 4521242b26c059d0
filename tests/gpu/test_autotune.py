"""Launch parameters by timing on a real device: replays of CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from kvxform.codegen.triton.autotune import Bucket, time_graph, tune

pytestmark = pytest.mark.gpu


class Config(NamedTuple):
    repeats: int


def test_times_grow_with_work_and_are_those_of_one_launch():
    x = torch.zeros(1 << 26, device="cuda")  # 256 MB: much more than the caches hold
    once = time_graph(lambda: x.add_(1))
    twice = time_graph(lambda: x.add_(1).add_(1))
    assert 0.05 < 2 * x.nbytes / once / 1e6 < 5  # TB/s
    assert 1.6 < twice / once < 2.4


def test_the_least_work_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path))
    x = torch.zeros(1 << 24, device="cuda")
    module = ModuleType("emitted")
    module.CONFIGS = (Config(9), Config(1), Config(4))
    names = ("kernel", "spec_hash", "template_hash", "versions")
    module.__kvx_meta__ = dict.fromkeys(names, "test")

    def run(config: Config) -> None:
        for _ in range(config.repeats):
            x.add_(1)

    assert tune(module, Bucket(1, 1), run, device=x.device) == Config(1)
    (path,) = (tmp_path / "tuning").iterdir()
    data = json.loads(path.read_text())
    assert data["device"] == torch.cuda.get_device_name()
    assert [config for config, _ in data["microseconds"]] == [c._asdict() for c in module.CONFIGS]
