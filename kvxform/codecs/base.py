"""What a codec is: `encode(x) -> planes`, `decode(planes) -> x`, and the shape of each plane.

A codec is a frozen dataclass whose fields are its options. It is pure torch, keeps no state and
knows nothing of graphs or caches. A codec may wrap another one, its field `inner`, and add planes
to those of the inner one. `docs/codecs.md` lists the codecs with their equations.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kvxform.errors import RecipeError, nearest_hint


@dataclass(frozen=True)
class PlaneSpec:
    """One stored tensor of a codec.

    A plane of `T` cached tokens has shape `[..., T / tokens_per_row, width]`.

    Attributes:
        name: `codes`, `scale`, `zero`, `norm`, or `value` for an unquantised stream.
        dtype: Stored dtype by torch name, for instance `uint8` or `float16`.
        width: Elements in one row of one head.
        tokens_per_row: Cached tokens that share one row (1 for per-token planes).
        shared: All KV heads of a site have one row together, so that the head axis of the plane
            is 1.
        joined: KV heads that have one row together, where it is not all of them.
    """

    name: str
    dtype: str
    width: int
    tokens_per_row: int = 1
    shared: bool = False
    joined: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the plane."""
        return dtype_from_name(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one head."""
        return self.width * self.torch_dtype.itemsize

    def heads(self, num_heads: int) -> int:
        """Return the size of the head axis of the plane at a site of `num_heads` KV heads."""
        return 1 if self.shared else num_heads // self.joined

    def bytes_per_token(self, num_heads: int) -> float:
        """Return bytes of one token of all heads."""
        return self.heads(num_heads) * self.row_bytes / self.tokens_per_row


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype called `name`.

    Raises:
        RecipeError: KVX105 if torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError("KVX105", "a dtype must be one that torch knows", got=repr(name))
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without the `torch.` prefix."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class AffineCodes:
    """The affine form of encoded values: `x = scale * codes + offset`.

    Attributes:
        codes: Unpacked codes as floating point, shape `[..., T, D]`.
        scale: Broadcastable to `codes` once repeated over its groups; shape `[..., T, D / group]`
            when `axis` is `token`, `[..., T / group, D]` when it is `channel`.
        offset: Same shape as `scale`.
        axis: `token` (statistics over channels of one token) or `channel` (over a run of tokens).
        group: Elements along the reduced axis that share a scale.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    axis: str
    group: int


@dataclass(frozen=True)
class CodecSamples:
    """What a codec is fitted on: one stream of one site, as it is stored.

    Attributes:
        x: Values of N tokens in the stored basis and on the stored side of RoPE, `[Hk, N, D]`.
        weights: Squared gradients of the loss at `x`, same shape, or None.
        envelope: Largest magnitude a channel can have at any position, `[Hk, D]`, or None.
        elsewhere: Keys after RoPE as they would be at positions drawn over the whole context,
            `[Hk, N, D]`, or None where positions change nothing.
        first: Mean of the first tokens of sequences, `[Hk, D]`, or None.
    """

    x: Tensor
    weights: Tensor | None = None
    envelope: Tensor | None = None
    elsewhere: Tensor | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Codec(ABC):
    """How one stream is stored. Subclasses are frozen dataclasses; their fields are options."""

    name: ClassVar[str]
    is_affine: ClassVar[bool] = False  # whether `affine` gives a form

    @property
    def needs_calibration(self) -> bool:
        """Whether `fit` must run before `encode`."""
        return self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        """Whether `fit` weighs errors with gradients; it takes all alike where there are none."""
        return False

    @property
    def is_headwise(self) -> bool:
        """Whether each head is encoded on its own and all alike."""
        return True

    @property
    def tokens_per_group(self) -> int:
        """Tokens that must be encoded together; 1 for per-token codecs."""
        return 1

    @abstractmethod
    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if vectors of `head_dim` channels cannot be encoded."""

    @abstractmethod
    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the stored planes for vectors of `head_dim` channels."""

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, shape `[..., Hk, T, D]`, T a multiple of `tokens_per_group`.

        `x` may have any float dtype. Unless the codec `is_headwise`, all KV heads of the site must
        be there, in order; otherwise the head axis may be left out.

        Returns one tensor per plane, shape `[..., Hk, T / tokens_per_row, width]`, with
        `PlaneSpec.heads(Hk)` in place of Hk.
        """

    @abstractmethod
    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode planes to values of `dtype`, shape `[..., Hk, T, D]`."""

    def affine(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> AffineCodes | None:
        """Return the affine form of `planes` in `dtype`, or None if the codec has none."""
        return None

    def fit(self, samples: CodecSamples) -> Codec:
        """Return this codec with its constants fitted on `samples`; itself if it has none.

        Constants are nested tuples of floats in options, so that `to_dict` stays complete. Planes
        do not depend on them.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as plain data, `{"codec": name, **options}`; see `make_codec`."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"codec": self.name, **{name: _to_plain(value) for name, value in options.items()}}

    def bits_per_value(self, head_dim: int, num_heads: int = 1) -> float:
        """Return stored bits per element with all metadata, for `num_heads` KV heads."""
        rows = sum(plane.bytes_per_token(num_heads) for plane in self.planes(head_dim))
        return rows * 8 / (head_dim * num_heads)


class WrapperCodec(Codec):
    """A codec around another one, its field `inner`; what is not said here is the inner one's."""

    inner: Codec

    @property
    def is_headwise(self) -> bool:
        """Whether the inner codec takes heads alone."""
        return self.inner.is_headwise

    @property
    def needs_calibration(self) -> bool:
        """Whether the inner codec is to be fitted."""
        return self.inner.needs_calibration

    @property
    def needs_fisher(self) -> bool:
        """Whether the inner codec weighs errors."""
        return self.inner.needs_fisher

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a group of the inner codec."""
        return self.inner.tokens_per_group


CODECS: dict[str, type[Codec]] = {}
C = TypeVar("C", bound=type[Codec])


def register_codec(cls: C) -> C:
    """Make the codec class known under its `name`; the only registration place."""
    CODECS[cls.name] = cls
    return cls


def make_codec(spec: Mapping[str, Any]) -> Codec:
    """Build a codec from plain data such as `{"codec": "int", "bits": 4}`.

    An option that is such data itself is a codec too:
    `{"codec": "token-norm", "inner": {"codec": "int", "bits": 2}}`.

    Raises:
        RecipeError: KVX103 for an unknown codec, KVX102 for an unknown option, KVX107 for a value
            that the option cannot have.
    """
    options = dict(spec)
    name = options.pop("codec", None)
    if name not in CODECS:
        raise RecipeError(
            "KVX103",
            "codec must be a known name",
            got=repr(name),
            hint=nearest_hint(str(name), CODECS),
        )
    cls = CODECS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise RecipeError(
                "KVX102",
                f"codec '{name}' takes {', '.join(sorted(known)) or 'no options'}",
                got=repr(key),
                hint=nearest_hint(key, known),
            )
    return cls(**{key: _from_plain(value) for key, value in options.items()})


def layers_of(codec: Codec) -> tuple[Codec, ...]:
    """Return a codec and the codecs inside it, from the outermost one on."""
    values = (getattr(codec, field.name) for field in dataclasses.fields(codec))
    inner = [part for value in values if isinstance(value, Codec) for part in layers_of(value)]
    return (codec, *inner)


def require_option(condition: bool, codec: str, rule: str, got: object) -> None:
    """Raise RecipeError KVX107 unless `condition`: an option of `codec` must follow `rule`."""
    if not condition:
        raise RecipeError("KVX107", rule, where=f"codec {codec}", got=repr(got))


def _to_plain(value: Any) -> Any:
    if isinstance(value, Codec):
        return value.to_dict()
    return [_to_plain(part) for part in value] if isinstance(value, tuple) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping) and "codec" in value:
        return make_codec(value)
    return tuple(map(_from_plain, value)) if isinstance(value, list | tuple) else value
