"""Toy packages of every form, for tests of where and how they run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cached import cached_program
from programs import apply, llama_program, token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.ir.program import Program
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4}
STATIC8, STATIC4 = ({"codec": "static-int", "bits": n, "scale": [6.0 / 2**n]} for n in (8, 4))


@dataclass(frozen=True)
class ToyForm:
    """What is cached, and what is asked of the export."""

    level: str
    codec: dict[str, Any] | None = None
    opset: int | None = None

    def program(self, dtype: torch.dtype = torch.float16) -> Program:
        program = cached_program(dtype=dtype, layers=2, heads=4, kv_heads=1, head_dim=64)
        if self.codec is not None:
            program, _ = apply(QuantizeKv(key=self.codec, value=self.codec), program)
        return program

    def export(self, folder: Path, provider: str, logits: str = "all") -> Path:
        asked: dict[str, Any] = {"level": self.level, "opset": self.opset, "logits": logits}
        return export_onnx(self.program(), folder, OnnxOptions(provider=provider, **asked))


def export_recipe(name: str, folder: Path) -> Path:
    """Export a toy for CUDA after a bundled recipe, at the best legal level."""
    program = llama_program(dtype=torch.float16, heads=4, kv_heads=1, head_dim=64)
    program.info = dataclasses.replace(program.info, context_length=None)
    recipe = load_recipe(load_recipe(name).to_data() | {"bounds": {}})
    calibration = token_ids(program, 8, 64)
    program, _ = run_pipeline(
        program, recipe, executor=OptimizedModel, verify="none", calibration=calibration
    )
    return export_onnx(program, folder, OnnxOptions(provider="cuda", logits="last"))


FORMS = {
    "L0": ToyForm("L0"),
    "L0 int4": ToyForm("L0", INT4),
    "L1 opset 23": ToyForm("L1", opset=23),
    "L1 opset 24": ToyForm("L1", opset=24),
    "L2 int4 opset 23": ToyForm("L2", INT4, opset=23),
    "L2 int4 opset 24": ToyForm("L2", INT4, opset=24),
    "L3": ToyForm("L3"),
    "L3 int8": ToyForm("L3", STATIC8),
    "L3 int4": ToyForm("L3", STATIC4),
    "L4": ToyForm("L4"),
    "L4 int8": ToyForm("L4", STATIC8),
    "L4 int4": ToyForm("L4", STATIC4),
    "L5 int4": ToyForm("L5", INT4),
}
