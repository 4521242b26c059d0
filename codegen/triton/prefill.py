"""Emission of `prefill`: causal attention of many new queries over dense K and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvxform.codegen.triton.registry import Emission, emits
from kvxform.codegen.triton.spec import PrefillSpec
from kvxform.errors import CodegenError

DTYPES = ("float16", "bfloat16", "float32")
MAX_GROUPS = 16  # query heads of a KV head: the smallest tile has so many rows
MAX_HEAD_DIM = 256

# (block_m, block_n, num_warps, num_stages), the best guess first
_SHORT_CONFIGS = ((128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3))
_LONG_CONFIGS = ((128, 64, 8, 2), (64, 64, 4, 2))  # head_dim above 128
_FLOAT32_CONFIGS = ((64, 32, 4, 2), (32, 32, 4, 2))


@dataclass(frozen=True)
class DenseStream:
    """K or V of a dense kernel, as its template needs it.

    Attributes:
        name: `key` or `value`.
        dim: Channels of one head.
        rule: Sink, keep and chunk of its regions.
    """

    name: str
    dim: int
    rule: tuple[int, int, int] = (0, 0, 1)

    @property
    def block(self) -> int:
        """Channels of a tile: the next power of two."""
        return 1 << (self.dim - 1).bit_length()

    @property
    def has_copies(self) -> bool:
        """Whether a query may read a token exact that a later one reads encoded."""
        return self.rule[1:] != (0, 1)

    def mask(self, channels: str) -> str:
        """Return the arguments of a load that only channels limit."""
        return "" if self.block == self.dim else f", mask={channels} < {self.dim}, other=0.0"

    def and_mask(self, channels: str) -> str:
        """Return the same as one more condition of a mask."""
        return "" if self.block == self.dim else f" & ({channels} < {self.dim})"


@emits(PrefillSpec)
def make_context(spec: PrefillSpec, *, interpret: bool) -> Emission:
    """Return the template of `prefill` and its variables.

    Raises:
        CodegenError: KVX401 for a dtype, head_dim or number of heads that has no tile.
    """
    groups = spec.num_q_heads // spec.num_kv_heads
    check_dense(spec.dtype, max(spec.key_dim, spec.value_dim), groups)
    if spec.key_sink != spec.value_sink:
        raise CodegenError(
            "KVX401",
            "K and V must have the same number of sink tokens",
            where="triton",
            got=f"{spec.key_sink} and {spec.value_sink}",
            hint="give both the same `sink`",
        )
    key = DenseStream("key", spec.key_dim, (spec.key_sink, spec.key_keep, spec.key_chunk))
    value = DenseStream(
        "value", spec.value_dim, (spec.value_sink, spec.value_keep, spec.value_chunk)
    )
    variables = {
        "groups": groups,
        "key": key,
        "value": value,
        "copied": [stream for stream in (key, value) if stream.has_copies],
        "is_local": spec.window is not None or spec.chunk is not None,
        "is_product": spec.softcap is None and not spec.has_alibi,
        "precision": dot_precision(spec.dtype),
        "extras": _extras(spec),
        "configs": _configs(spec),
    }
    return Emission("prefill.py.jinja", variables)


def check_dense(dtype: str, head_dim: int, groups: int) -> None:
    """Raise CodegenError KVX401 for what no tile of a dense kernel can take."""
    for fits, rule, got, hint in (
        (dtype in DTYPES, f"the dtype must be one of {', '.join(DTYPES)}", dtype, "use float32"),
        (
            head_dim <= MAX_HEAD_DIM,
            f"head_dim must be at most {MAX_HEAD_DIM}",
            head_dim,
            "use the eager lowering",
        ),
        (
            groups <= MAX_GROUPS,
            f"at most {MAX_GROUPS} query heads may share a KV head",
            groups,
            "use the eager lowering",
        ),
    ):
        if not fits:
            raise CodegenError("KVX401", rule, where="triton", got=got, hint=hint)


def dot_precision(dtype: str) -> str:
    """Return the argument of `tl.dot` that keeps float32 models exact."""
    return ', input_precision="ieee"' if dtype == "float32" else ""


def _extras(spec: PrefillSpec) -> dict[str, str]:
    """Return what the docstring says of each optional tensor, by name."""
    heads = spec.num_q_heads
    meanings = {
        "sink_logits": (spec.has_sink_logits, f"A softmax column without a value, `[{heads}]`."),
        "alibi_slopes": (spec.has_alibi, f"Slopes of ALiBi, `[{heads}]`."),
        "lse": (
            spec.has_lse,
            f"Log-sum-exp of scores{' and sink logit' if spec.has_sink_logits else ''}, natural"
            f" logarithm, float32 `[B, {heads}, S]`, contiguous; -inf for padding.",
        ),
    }
    return {name: meaning for name, (wanted, meaning) in meanings.items() if wanted}


def _configs(spec: PrefillSpec) -> tuple[tuple[int, ...], ...]:
    if spec.dtype == "float32":
        return _FLOAT32_CONFIGS
    return _LONG_CONFIGS if max(spec.key_dim, spec.value_dim) > 128 else _SHORT_CONFIGS
