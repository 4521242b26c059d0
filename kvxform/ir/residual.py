"""Keys and values made from the input of a layer when they are read.

What is cached of a token is the vector x that W_k and W_v read, `[W]`. With one matrix a KV head,
key_h = x M_h + b_h before RoPE, and value_h = x N_h; a bias of the values is added to what
attention returns, for its weights sum to 1.
"""

from __future__ import annotations

from torch import Tensor

from kvxform.codecs.basis import rotate_heads


def make_heads(stored: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the heads of keys or values.

    Args:
        stored: `[..., Hk, T, D]` in another basis, or `[..., 1, T, W]` to make heads from.
        matrices: See `rotate_heads`; or `[Hk, W, D]` where `stored` is one vector a token.
        bias: `[Hk, 1, D]`, or None.

    Returns:
        `[..., Hk, T, D]`, in the dtype of `stored`.
    """
    is_one = stored.shape[-3] == 1 and matrices.shape[-2] == stored.shape[-1]
    if not is_one:
        return rotate_heads(stored, matrices)
    made = stored @ matrices.to(stored)
    return made if bias is None else made + bias.to(stored)
