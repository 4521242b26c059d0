"""What this lowering can express, as tables; a program outside of them is refused before work."""

from __future__ import annotations

import torch
from torch import fx

from kvxform.codegen.onnx import aten_math, aten_nn, aten_shape, attend, dialect
from kvxform.codegen.onnx.codecs import CODEC_EMITTERS
from kvxform.codegen.onnx.emission import EMITTERS
from kvxform.codecs.base import CODECS
from kvxform.errors import CodegenError
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11
MINIMUM_RUNTIME = "1.23"

EMITTER_MODULES = (aten_math, aten_nn, aten_shape, attend, dialect)
DTYPES = (torch.float32, torch.float16)  # Attention of ONNX Runtime on CPU has no other


def check_program(program: Program) -> None:
    pass


def metadata(program: Program) -> dict[str, str]:
    return {}
