"""What codecs of directions share: one norm a vector, and a table for the vector of norm 1.

    stored:  g, codes of u = x / |x|          decoded:  g u',  with u' the decoded direction

`gain` says which number g is stored, in float16:

- `norm`       g = |x|: what tables of smallest mean squared error are made for
- `corrected`  g = |x| / |u'|: decoded vectors have the norm of x (norm correction)
- `projected`  g = x . u' / |u'|^2: the smallest error that any g gives

Tables suppose that directions are uniform, which a rotation makes nearly true of real vectors.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, require_option
from kvxform.errors import PassError

GAINS = ("norm", "corrected", "projected")
CHANNELS = 8  # head_dim must be a multiple of it
LARGEST_HEAD_DIM = 1024
LARGEST_NORM = 65504.0  # largest float16


@dataclass(frozen=True, kw_only=True)
class DirectionCodec(Codec):
    """A codec of directions with one norm a vector.

    Attributes:
        gain: Which factor is stored; see the module.
    """

    gain: Literal["norm", "corrected", "projected"] = "norm"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        rule = "gain must be norm, corrected or projected"
        require_option(self.gain in GAINS, self.name, rule, self.gain)

    @abstractmethod
    def code_planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of a direction; the widths tell the head_dim, see `head_dim_of`."""

    @abstractmethod
    def encode_directions(self, u: Tensor) -> dict[str, Tensor]:
        """Encode vectors of norm 1 (or 0), float32 `[..., D]`, to the code planes."""

    @abstractmethod
    def decode_directions(
        self, planes: Mapping[str, Tensor], head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Decode directions, `[..., D]`, in `dtype`."""

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 unless `head_dim` is a multiple of 8 that widths can tell."""
        if head_dim % CHANNELS or not 0 < head_dim <= LARGEST_HEAD_DIM:
            raise PassError(
                "KVX203",
                f"codec {self.name} needs a head_dim that is a multiple of {CHANNELS}",
                got=head_dim,
                hint="use codec int, or none",
            )
        told = head_dim_of(self, self._widths(head_dim))
        if told != head_dim:
            raise PassError(
                "KVX203",
                f"codec {self.name} needs a head_dim that its bytes tell apart from {told}",
                got=head_dim,
                hint="use codes of more bits",
            )

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the code planes and `norm`."""
        return (*self.code_planes(head_dim), PlaneSpec("norm", "float16", 1))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., T, D]`, in float32."""
        x = x.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        u = (x / norm.clamp_min(torch.finfo(torch.float32).tiny)).contiguous()
        planes = self.encode_directions(u)
        gain = norm if self.gain == "norm" else norm * self._factor(u, planes)
        return {**planes, "norm": gain.clamp(max=LARGEST_NORM).half()}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        names = (plane.name for plane in self.code_planes(CHANNELS))
        head_dim = head_dim_of(self, tuple(planes[name].shape[-1] for name in names))
        return (self.decode_directions(planes, head_dim, wide) * planes["norm"].to(wide)).to(dtype)

    def _factor(self, u: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        decoded = self.decode_directions(planes, u.shape[-1], torch.float32)
        square = decoded.square().sum(-1, keepdim=True).clamp_min(1e-12)
        if self.gain == "corrected":
            return square.rsqrt()
        return ((u * decoded).sum(-1, keepdim=True) / square).clamp_min(0)

    def _widths(self, head_dim: int) -> tuple[int, ...]:
        return tuple(plane.width for plane in self.code_planes(head_dim))


@functools.cache
def head_dim_of(codec: DirectionCodec, widths: tuple[int, ...]) -> int:
    """Return the channels of vectors whose code planes have `widths`.

    Where several head_dims fill the same bytes, it is the one with the most factors of two.
    """
    sizes = range(CHANNELS, LARGEST_HEAD_DIM + 1, CHANNELS)
    fitting = [head_dim for head_dim in sizes if codec._widths(head_dim) == widths]
    if not fitting:
        raise ValueError(f"no head_dim gives code planes of widths {widths}")
    return max(fitting, key=lambda head_dim: head_dim & -head_dim)
