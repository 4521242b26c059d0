"""Which lowering runs a program in this process."""

from __future__ import annotations

import torch

from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.ir.execution import Executable
from kvxform.ir.program import Program
from kvxform.recipe import Target


def make_executable(program: Program, target: Target) -> Executable:
    """Return `program` as something that runs.

    A program for `onnx` runs eagerly here; its package is what `export_onnx` writes.

    Raises:
        CodegenError: KVX401 if the lowering cannot run the plan, or cannot run on this machine.
    """
    if target.lowering != "triton":
        return EagerExecutable(program)
    from kvxform.codegen.triton.lowering import TritonExecutable

    return TritonExecutable(program, compile_decode=target.compile)


def default_device(target: Target) -> torch.device | None:
    """Return where a model goes unless the caller says; None to leave it where it is."""
    if target.lowering != "triton":
        return None
    from kvxform.codegen.triton import capability

    return capability.default_device()
