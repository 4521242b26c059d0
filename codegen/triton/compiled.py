"""The rest of a decode step through `torch.compile`: norms, RoPE, activations and residuals fused.

The cached ops stay what they are in the dialect: opaque to the compiler, ordered by the handle that
each append returns. So a whole step is one compiled graph. Products with weights are opaque too,
where `product` kernels do them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvxform.codegen.eager.specialise import specialise
from kvxform.codegen.triton.cache import TritonCache
from kvxform.codegen.triton.graphs import Forward
from kvxform.codegen.triton.products import use_products
from kvxform.ir.program import Program


def compiled_forward(program: Program) -> Forward:
    """Return what runs one step of `program`, compiled for each batch size when it first comes.

    Args:
        program: Without the rotations that kernels do; it is not changed.
    """
    by_batch_size: dict[int, Any] = {}

    def forward(input_ids: Tensor, positions: Tensor, cache: TritonCache) -> Tensor:
        batch_size = input_ids.shape[0]
        if batch_size not in by_batch_size:
            module = specialise(program.clone(), fuse_norms=True, keep_handle=True)
            use_products(module, batch_size)
            by_batch_size[batch_size] = torch.compile(module, fullgraph=True, dynamic=False)
        logits: Tensor = by_batch_size[batch_size](input_ids, positions, cache.handle)
        return logits

    return forward
