"""Models whose layers have equal keys and values, so that sharing a cache changes nothing."""

from __future__ import annotations

import torch
from families import ALL
from programs import gpt2_program, llama_program
from torch import nn

from kvxform.ir.program import Program

LAST = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "out_proj", "fc2")
TOY_LAST = {"llama": ("attn.o", "mlp.down"), "gpt2": ("attn.c_proj", "mlp.c_proj")}


def equal_layers(family: str) -> nn.Module:
    """Return a float64 model of two layers; the first adds nothing, so both see the same input."""
    model = ALL[family].build(torch.float64)
    first, second = _layers(model)
    second.load_state_dict(first.state_dict())
    for name, module in first.named_modules():
        if name.rpartition(".")[2] in LAST:
            for parameter in module.parameters():
                parameter.data.zero_()
    return model


def _layers(model: nn.Module) -> nn.ModuleList:
    (found,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return found


def equal_toy(kind: str = "llama", **options) -> Program:
    """Return a program of `tests/programs.py` whose layers after the first repeat its K and V."""
    program = llama_program(**options) if kind == "llama" else gpt2_program(**options)
    stem = "layers" if kind == "llama" else "h"
    own = {n: w for n, w in program.weights.items() if n.startswith(f"{stem}.0.")}
    for layer in range(1, len(program.sites)):
        for name, weight in own.items():
            program.weights[name.replace(f"{stem}.0.", f"{stem}.{layer}.")] = weight.clone()
    for layer in range(len(program.sites) - 1):
        for last in TOY_LAST[kind]:
            for name in (f"{stem}.{layer}.{last}.weight", f"{stem}.{layer}.{last}.bias"):
                if name in program.weights:
                    program.weights[name] = torch.zeros_like(program.weights[name])
    return program
