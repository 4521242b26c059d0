"""Which lowering runs a program in this process."""

from __future__ import annotations

import torch

from kvxform.codegen.eager.checkpoint import CheckpointExecutable
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
    if program.plan is not None and program.plan.layout.kind == "checkpoint":
        return CheckpointExecutable(program)
    if target.lowering != "triton":
        return EagerExecutable(program)
    from kvxform.codegen.triton.lowering import TritonExecutable

    return TritonExecutable(program, compile_decode=target.compile)


def check_target(program: Program, target: Target) -> None:
    """Refuse a finished program that its target cannot run; shapes are enough.

    Raises:
        CodegenError: KVX401 with what is supported, KVX403 if the options of a package are not
            legal for the program.
    """
    if target.lowering == "triton":
        from kvxform.codegen.triton.capability import check_program

        check_program(program)
    if target.lowering == "onnx":
        from kvxform.codegen.onnx.capability import check_form

        check_form(program, target.onnx_options)


def check_place(target: Target, device: torch.device | None) -> None:
    """Refuse a machine that the target cannot run on.

    Args:
        target: What is wanted.
        device: Where weights will live; None for the CPU.

    Raises:
        CodegenError: KVX401 with what is missing.
    """
    if target.lowering == "triton":
        from kvxform.codegen.triton.capability import check_device

        check_device(torch.device("cpu") if device is None else device)


def default_device(target: Target) -> torch.device | None:
    """Return where a model goes unless the caller says; None to leave it where it is."""
    if target.lowering != "triton":
        return None
    from kvxform.codegen.triton import capability

    return capability.default_device()
