"""Emission of `column_scores`: the attention that each cached token got, summed over queries."""

from __future__ import annotations

from kvxform.codegen.triton.dense import DenseStream, check_dense, dot_precision
from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import ColumnScoresSpec

# (block_m, block_n, num_warps, num_stages), the best guess first
_CONFIGS = ((64, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2))
_FLOAT32_CONFIGS = ((32, 32, 4, 2), (32, 64, 4, 2))


@emits(ColumnScoresSpec)
def make_context(spec: ColumnScoresSpec, *, interpret: bool) -> Emission:
    """Return the template of `column_scores` and its variables.

    Raises:
        CodegenError: KVX401 for a dtype, head_dim or number of heads that has no tile.
    """
    groups = spec.num_q_heads // spec.num_kv_heads
    check_dense(spec.dtype, spec.head_dim, groups)
    variables = {
        "groups": groups,
        "key": DenseStream("key", spec.head_dim),
        "is_local": spec.window is not None or spec.chunk is not None,
        "precision": dot_precision(spec.dtype),
        "configs": _FLOAT32_CONFIGS if spec.dtype == "float32" else _CONFIGS,
    }
    return Emission("column_scores.py.jinja", variables)
