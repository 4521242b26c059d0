"""Recognition of RMSNorm, and its near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvxform.ir.ops as kvx
from kvxform.capture.exporting import export_module, prepare
from kvxform.capture.normalise import normalise
from kvxform.capture.norms import raise_norms
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.tidy import remove_dead

Formula = Callable[[Tensor, Tensor], Tensor]
EPS = 1e-5


class One(nn.Module):
    """Embedding, one formula, and a projection."""

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(9, 16, generator=generator, dtype=dtype))
        self.gain = nn.Parameter(torch.randn(16, generator=generator, dtype=dtype))
        self.formula = formula

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.formula(nn.functional.embedding(input_ids, self.table), self.gain).tanh()


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def upcast(x: Tensor, w: Tensor) -> Tensor:
    y = x.to(torch.float32)
    return w * (y * torch.rsqrt(mean_square(y) + EPS)).to(x.dtype)


def raised(formula: Formula, dtype: torch.dtype) -> tuple[int, Prober, list[Tensor]]:
    """Return how many norms were raised, the prober, and the output before and after."""
    graph, weights = normalise(export_module(prepare(One(formula, dtype))))
    prober = Prober(graph, weights)
    (output,) = (n for n in graph.nodes if n.op == "output")
    setting = Setting.first(4, batch=2)
    (before,) = prober.run([output.args[0]], setting)
    count = raise_norms(prober)
    remove_dead(graph)
    (after,) = prober.run([output.args[0]], setting)
    return count, prober, [before, after]


GOOD: dict[str, Formula] = {
    "rsqrt": lambda x, w: x * torch.rsqrt(mean_square(x) + EPS) * w,
    "division by a root": lambda x, w: w * (x / (mean_square(x) + EPS).sqrt()),
    "power": lambda x, w: x * (mean_square(x) + EPS).pow(-0.5) * w,
    "product with itself": lambda x, w: x * torch.rsqrt((x * x).mean(-1, True) + EPS) * w,
    "one op": lambda x, w: nn.functional.rms_norm(x, (16,), w, EPS),
    "gain plus one": lambda x, w: x * torch.rsqrt(mean_square(x) + EPS) * (1.0 + w),
    "upcast": upcast,
}


@pytest.mark.parametrize("name", GOOD)
def test_ways_to_write_rms_norm_are_raised(name: str) -> None:
    count, prober, (before, after) = raised(GOOD[name], torch.float64)
    assert count == 1
    (node,) = (n for n in prober.graph.nodes if n.target is kvx.RMS_NORM)
    assert node.args[1].target == "gain"
    assert node.args[2] == EPS
    assert node.kwargs.get("weight_offset", 0.0) == (1.0 if name == "gain plus one" else 0.0)
    assert node.kwargs.get("compute_dtype") == (torch.float32 if name == "upcast" else None)
    assert float((after - before).abs().max()) < 1e-14
    assert not [n for n in prober.graph.nodes if "pow" in n.name or "rsqrt" in n.name]


BAD: dict[str, Formula] = {
    "mean removed": lambda x, w: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True)) * w,
    "eps outside the root": lambda x, w: x / (mean_square(x).sqrt() + EPS) * w,
    "sum for mean": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, True) + EPS) * w,
    "wrong power": lambda x, w: x * (mean_square(x) + EPS).pow(-0.25) * w,
    "over tokens": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, True) + EPS) * w,
}


@pytest.mark.parametrize("name", BAD)
def test_near_misses_are_left_alone(name: str) -> None:
    count, _, (before, after) = raised(BAD[name], torch.float64)
    assert count == 0
    assert torch.equal(after, before)


@pytest.mark.parametrize("channels", [16, 96, 576])
def test_statistics_of_a_float16_model_stay_wide(channels: int) -> None:
    """Of small values, narrow statistics look the same; squares of large ones overflow."""

    class Wide(One):
        def __init__(self) -> None:
            super().__init__(upcast, torch.float16)
            self.table = nn.Parameter(torch.randn(9, channels).half())
            self.gain = nn.Parameter(torch.ones(channels, dtype=torch.float16))

    torch.manual_seed(0)
    graph, weights = normalise(export_module(prepare(Wide())))
    prober = Prober(graph, weights)
    assert raise_norms(prober) == 1
    (node,) = (n for n in graph.nodes if n.target == kvx.RMS_NORM)
    assert node.kwargs["compute_dtype"] == torch.float32
