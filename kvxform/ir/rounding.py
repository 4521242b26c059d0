"""How precise a program is: the coarsest dtype among those that decide its logits."""

from __future__ import annotations

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the floating-point dtype with the largest rounding error."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def rounding_dtype(program: Program) -> torch.dtype:
    """Return the dtype whose rounding a program shows however its tokens arrive.

    Some models compute scores or their softmax in float32 whatever their dtype. And complex
    products round differently at the end of a run of memory, so a rotary embedding in complex64, as
    DeepSeek-V2 has it, is reproducible to float32 alone.

    Args:
        program: With or without a cache.
    """
    found = [program.dtype]
    for node in program.graph.nodes:
        type_ = node.meta.get("type")
        if isinstance(type_, TensorType) and type_.dtype is torch.complex64:
            found.append(torch.float32)
    for node in program.calls(*kvx.ATTENTION_OPS):
        q, softmax = node.args[0], node.kwargs.get("softmax_dtype")
        assert isinstance(q, fx.Node), "operands of attention are nodes"
        found.append(q.meta["type"].dtype)
        if isinstance(softmax, torch.dtype):
            found.append(softmax)
    return coarsest(*found)
