"""What kernels over dense K and V have in common: widths of tiles, and what no tile can take."""

from __future__ import annotations

from dataclasses import dataclass

from kvxform.codegen.triton.refusal import refuse

DTYPES = ("float16", "bfloat16", "float32")
MAX_GROUPS = 16  # query heads of a KV head: the smallest tile has so many rows
MAX_HEAD_DIM = 256


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


def check_dense(dtype: str, head_dim: int, groups: int) -> None:
    """Raise CodegenError KVX401 for what no tile of a dense kernel can take."""
    if dtype not in DTYPES:
        rule, got, hint = f"the dtype must be one of {', '.join(DTYPES)}", dtype, "use float32"
    elif head_dim > MAX_HEAD_DIM:
        rule, got = f"head_dim must be at most {MAX_HEAD_DIM}", str(head_dim)
        hint = "use the eager lowering"
    elif groups > MAX_GROUPS:
        rule, got = f"at most {MAX_GROUPS} query heads may share a KV head", str(groups)
        hint = "use the eager lowering"
    else:
        return
    refuse(rule, got, "", hint)


def dot_precision(dtype: str) -> str:
    """Return the argument of `tl.dot` that keeps float32 models exact."""
    return ', input_precision="ieee"' if dtype == "float32" else ""
