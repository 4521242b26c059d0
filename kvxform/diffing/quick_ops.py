"""Dialect ops by their fast forms, with what all layers of one run share.

The reference implementations compute cosine and sine of RoPE in every layer, and a Hadamard
transform step by step. The eager lowering has forms that share tables; these use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import hadamard_matrix
from kvxform.codegen.eager.specialise import (
    WIDE_DTYPES,
    fused_rms_norm,
    rope_table,
    rotate_blocks,
    rotate_halves,
)


class QuickOps:
    """The ops of one run; tables are made when they are first needed."""

    def __init__(self) -> None:
        # With the positions, which live on so that no other tensor is taken for them.
        self._tables: dict[tuple[object, ...], tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self._matrices: dict[tuple[int, torch.dtype], Tensor] = {}
        self._forms: dict[object, Callable[..., Tensor]] = {
            kvx.RMS_NORM: self._rms_norm,
            kvx.ROPE: self._rope,
            kvx.HADAMARD: self._hadamard,
        }

    def find(self, target: Any) -> Callable[..., Any]:
        """Return the fast form of an op, or the op itself."""
        found: Callable[..., Any] = self._forms.get(target, target)
        return found

    def _rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, **options: Any) -> Tensor:
        computed = options.get("compute_dtype") or x.dtype
        if x.dtype in WIDE_DTYPES and computed == x.dtype and not options.get("weight_offset"):
            return fused_rms_norm(x, weight, eps)
        return kvx.rms_norm(x, weight, eps, **options)

    def _rope(self, x: Tensor, positions: Tensor, inv_freq: Tensor, **options: Any) -> Tensor:
        if options.get("interleaved"):
            return kvx.rope(x, positions, inv_freq, **options)
        scaling = options.get("attention_scaling", 1.0)
        key = (id(positions), tuple(inv_freq.tolist()), inv_freq.dtype, scaling, x.dtype)
        if key not in self._tables:
            table = rope_table(positions, inv_freq, scaling=scaling, dtype=x.dtype)
            self._tables[key] = positions, table
        return rotate_halves(x, self._tables[key][1])

    def _hadamard(self, x: Tensor, *, block: int, signs: Tensor | None = None) -> Tensor:
        if x.dtype not in WIDE_DTYPES:
            return kvx.hadamard(x, block=block, signs=signs)
        key = (block, x.dtype)
        if key not in self._matrices:
            self._matrices[key] = hadamard_matrix(block).to(x)
        return rotate_blocks(x, self._matrices[key], signs)
