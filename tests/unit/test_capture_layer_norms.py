"""Recognition of LayerNorm that is written out, and its near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvxform.capture.exporting import export_module, prepare
from kvxform.capture.layer_norms import raise_layer_norms
from kvxform.capture.normalise import normalise
from kvxform.capture.norms import raise_norms
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.tidy import remove_dead

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = 1e-5
LAYER_NORM = torch.ops.aten.layer_norm.default


class One(nn.Module):
    """Embedding, one formula of the embedded tokens, a gain and a bias, and an activation."""

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = {"table": (9, 16), "gain": (16,), "shift": (16,)}
        for name, size in sizes.items():
            value = torch.randn(size, generator=generator, dtype=dtype)
            setattr(self, name, nn.Parameter(value))
        self.formula = formula

    def forward(self, input_ids: Tensor) -> Tensor:
        x = nn.functional.embedding(input_ids, self.table)
        return self.formula(x, self.gain, self.shift).tanh()


def raised(formula: Formula, dtype: torch.dtype = torch.float64) -> tuple[int, Prober, float]:
    """Return how many norms were raised, the prober, and the change of the output."""
    graph, weights = normalise(export_module(prepare(One(formula, dtype))))
    prober = Prober(graph, weights)
    (output,) = (n for n in graph.nodes if n.op == "output")
    setting = Setting.first(4, batch=2)
    (before,) = prober.run([output.args[0]], setting)
    assert raise_norms(prober) == 0
    count = raise_layer_norms(prober)
    remove_dead(graph)
    (after,) = prober.run([output.args[0]], setting)
    return count, prober, float((after - before).abs().max())


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def root(x: Tensor, eps: float = EPS) -> Tensor:
    return (centred(x).pow(2).mean(-1, keepdim=True) + eps).sqrt()


def wide(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.to(torch.float32)
    return (w.to(torch.float32) * (centred(y) / root(y))).to(x.dtype)


GOOD: dict[str, tuple[Formula, list[str | None]]] = {
    "gain and bias": (lambda x, w, b: centred(x) / root(x) * w + b, ["gain", "shift"]),
    "gain alone": (lambda x, w, b: w * (centred(x) / root(x)), ["gain", None]),
    "nothing else": (lambda x, w, b: centred(x) / root(x), [None, None]),
    "variance by an op": (
        lambda x, w, b: centred(x) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS) * w,
        ["gain", None],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_ways_to_write_layer_norm_are_raised(name: str) -> None:
    formula, weights = GOOD[name]
    count, prober, change = raised(formula)
    assert count == 1
    (node,) = (n for n in prober.graph.nodes if n.target is LAYER_NORM)
    names = [None if n is None else str(n.target).split(".")[-1] for n in node.args[2:4]]
    assert names == weights
    assert node.args[4] == EPS
    assert change <= 1e-12


def test_statistics_in_float32_are_raised_in_a_float32_model_only() -> None:
    assert raised(wide, torch.float32)[0] == 1
    assert raised(wide, torch.float64)[::2] == (0, 0.0)


BAD: dict[str, Formula] = {
    "the unbiased variance": lambda x, w, b: (
        centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w
    ),
    "eps outside the root": lambda x, w, b: (
        centred(x) / (centred(x).pow(2).mean(-1, keepdim=True).sqrt() + EPS) * w
    ),
    "half of the mean": lambda x, w, b: (x - 0.5 * x.mean(-1, keepdim=True)) / root(x) * w,
    "a large eps": lambda x, w, b: centred(x) / root(x, 0.5) * w,
    "another axis": lambda x, w, b: centred(x.transpose(1, 2)).transpose(1, 2) / root(x) * w,
}


@pytest.mark.parametrize("name", BAD)
def test_near_misses_are_left_alone(name: str) -> None:
    count, prober, change = raised(BAD[name])
    assert (count, change) == (0, 0.0)
    assert not [n for n in prober.graph.nodes if n.target is LAYER_NORM]
