"""Hugging Face's `QuantizedCache` as something to measure beside recipes, at its true bits.

Its prefill attends to exact keys and values, and only what comes later reads codes. A stateless
call therefore measures nothing, and peers are measured by protocol `decode` alone. Whenever its
window of exact tokens is full, everything is decoded and encoded again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvxform.errors import KvxformError, nearest_hint
from kvxform.evaluate.footprint import SHORT, Footprint
from kvxform.evaluate.runners import SourceRunner
from kvxform.ir.plan import BASELINE_BITS

PREFIX = "hf-"  # begins the names of peers
METADATA_BITS = 32  # scale and zero point of a group, 16 bits each


@dataclass(frozen=True)
class Peer:
    """One setting of `QuantizedCache`.

    Attributes:
        backend: `quanto` or `hqq`.
        bits: Bits of a code.
        axis: Axis option of keys and values; these values group the channels of one token.
        package: Module that must be importable.
        group: Elements of a group.
        residual: Most tokens that are kept exact.
    """

    backend: str
    bits: int
    axis: int
    package: str
    group: int = 64
    residual: int = 128

    @property
    def bits_per_value(self) -> float:
        """True bits of an encoded element in a 16-bit model."""
        return self.bits + METADATA_BITS / self.group

    def exact_tokens(self, tokens: int) -> int:
        """Return how many of `tokens` tokens, decoded one by one, are not encoded."""
        return (tokens - 1) % self.residual


PEERS = {
    "hf-quanto-4": Peer("quanto", 4, 0, "optimum.quanto"),
    "hf-quanto-2": Peer("quanto", 2, 0, "optimum.quanto"),
    "hf-hqq-4": Peer("hqq", 4, 1, "hqq"),
    "hf-hqq-2": Peer("hqq", 2, 1, "hqq"),
}


def find_peer(name: str) -> Peer:
    """Return the peer called `name`.

    Raises:
        KvxformError: KVX801 if there is none, or its package is not installed.
    """
    if name not in PEERS:
        hint = nearest_hint(name, PEERS)
        raise KvxformError("KVX801", "a peer must be a known name", got=repr(name), hint=hint)
    peer = PEERS[name]
    if not is_installed(peer):
        rule = f"{name} needs the package {peer.package}"
        raise KvxformError("KVX801", rule, where="eval", hint="install kvxform[peers]")
    return peer


def is_installed(peer: Peer) -> bool:
    """Return whether the package of a peer is there."""
    parent = peer.package.partition(".")[0]
    return (
        importlib.util.find_spec(parent) is not None
        and importlib.util.find_spec(peer.package) is not None
    )


class _PeerRunner(SourceRunner):
    """Runs a multiple of `rows` sequences, copies of the last one where there are fewer.

    HQQ packs codes of several groups into a byte and refuses what does not fill it. Every group
    belongs to one sequence, so copies change nothing.
    """

    def __init__(self, module: nn.Module, make_cache: Callable[[], Any], rows: int) -> None:
        super().__init__(module, make_cache)
        self._rows = rows

    def logits(self, input_ids: Tensor) -> Tensor:
        """Refuse: nothing of a stateless call passes through the cache."""
        raise NotImplementedError("peers are measured by protocol decode")

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Start new sequences; logits of the last position `[B, vocab]`."""
        return super().prefill(self._fill(input_ids))[: len(input_ids)]

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; logits `[B, vocab]`."""
        return super().decode(self._fill(token_ids))[: len(token_ids)]

    def _fill(self, x: Tensor) -> Tensor:
        missing = -len(x) % self._rows
        return torch.cat([x, *[x[-1:]] * missing])


def make_peer_runner(module: nn.Module, peer: Peer) -> SourceRunner:
    """Return the Hugging Face model `module` with this cache."""
    from transformers import QuantizedCache

    config: Any = module.config

    def make_cache() -> Any:
        return QuantizedCache(
            backend=peer.backend,
            config=config,
            nbits=peer.bits,
            axis_key=peer.axis,
            axis_value=peer.axis,
            q_group_size=peer.group,
            residual_length=peer.residual,
        )

    codes_per_byte = 1 if peer.backend == "quanto" else 8 // peer.bits
    return _PeerRunner(module, make_cache, codes_per_byte)


def peer_footprint(module: nn.Module, peer: Peer, tokens: int = SHORT) -> Footprint:
    """Return what a peer holds in a 16-bit model.

    Args:
        module: The Hugging Face model.
        peer: The setting.
        tokens: Cached tokens at which exact ones are counted.
    """
    config: Any = module.config
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * heads * dim  # of one token
    exact = peer.exact_tokens(tokens)
    bits = ((tokens - exact) * peer.bits_per_value + exact * BASELINE_BITS) / tokens
    return Footprint(peer.bits_per_value, bits, tokens, round(bits * values * tokens / 8))
