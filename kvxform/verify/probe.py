"""Probe inputs, the source model run on them, and the difference of two sets of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.latent import find_latent
from kvxform.ir.program import Program, default_positions

PROBE_SEED = 1
REWRITES = 2


@dataclass(frozen=True)
class Probe:
    """Token ids of one batch; row i counts up to `lengths[i]`, the rest is padding on the right.

    Attributes:
        input_ids: int64 `[B, S]`.
        lengths: True lengths of the rows.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]

    @property
    def real(self) -> Tensor:
        """Which positions count, bool `[B, S]`."""
        steps = torch.arange(self.input_ids.shape[1])
        return steps < torch.tensor(self.lengths)[:, None]


@dataclass(frozen=True)
class Difference:
    """How far logits lie from reference logits, over the positions that count.

    Attributes:
        max_abs: Largest absolute difference.
        scale: Largest absolute reference logit.
        kl: Mean KL(reference || measured) per position, in nats.
        top1: Share of positions with the same greedy token.
    """

    max_abs: float
    scale: float
    kl: float
    top1: float

    @property
    def relative(self) -> float:
        """Largest absolute difference as a share of the largest logit."""
        return self.max_abs / max(self.scale, 1e-30)


@dataclass(frozen=True)
class SourceRun:
    """What the source computes on one probe.

    Attributes:
        logits: `[B, S, vocab]`.
        keys: K at the attention of each layer, `[B, Hk, S, D]`, after RoPE, un-rotated.
        values: V at the attention of each layer, `[B, Hk, S, D]`, un-rotated.
        latents: Of layers with a latent, that and the shared part of the keys,
            `[B, 1, S, rank + rope_dim]`.
    """

    logits: Tensor
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    latents: dict[int, Tensor]


def make_probe(vocab_size: int, lengths: Sequence[int]) -> Probe:
    """Return rows of seeded random token ids; the same for the same arguments."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    ids = torch.randint(0, vocab_size, (len(lengths), max(lengths)), generator=generator)
    return Probe(ids, tuple(lengths))


class _Recorder(fx.Interpreter):
    """Runs a program and keeps K and V of every attention, and latents."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.to_module())
        self._program = program
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._latents = {s.layer: find_latent(program, s) for s in program.sites if s.latent}
        found = [nodes for nodes in self._latents.values() if not isinstance(nodes, str)]
        self._kept = {node.name for nodes in found for node in (nodes.latent, nodes.shared)}
        self._values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._kept:
            self._values[n.name] = result.clone()
        return result

    def latents(self) -> dict[int, Tensor]:
        """Return what `cache-latent` would cache, `[B, 1, S, rank + rope_dim]` by layer."""
        found = {}
        for layer, nodes in self._latents.items():
            if not isinstance(nodes, str):
                latent, shared = (self._values[n.name] for n in (nodes.latent, nodes.shared))
                found[layer] = torch.cat([latent.reshape(*shared.shape[:3], -1), shared], -1)
        return found

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is kvx.ATTENTION:
            site, weights = self._program.site(kwargs["layer"]), self._program.weights
            self.keys[site.layer] = site.k_basis.unrotate(args[1].clone(), weights)
            self.values[site.layer] = site.v_basis.unrotate(args[2].clone(), weights)
        return super().call_function(target, args, kwargs)


@torch.inference_mode()
def run_source(program: Program, probe: Probe) -> SourceRun:
    """Run a program without a cache on `probe`, and keep its logits, K and V."""
    recorder = _Recorder(program)
    device = next(iter(program.weights.values())).device
    ids = probe.input_ids.to(device)
    logits = recorder.run(ids, default_positions(ids))
    return SourceRun(logits, recorder.keys, recorder.values, recorder.latents())


def write_probe(program: Program, lengths: Sequence[int]) -> Probe:
    """Return a probe whose text the source model wrote itself; see `rewrite_probe`."""

    def predict(ids: Tensor) -> Tensor:
        return run_source(program, Probe(ids, tuple(lengths))).logits

    return rewrite_probe(predict, program.info.vocab_size, lengths)


def rewrite_probe(
    predict: Callable[[Tensor], Tensor],
    vocab_size: int,
    lengths: Sequence[int],
    *,
    rewrites: int = REWRITES,
) -> Probe:
    """Return a probe whose text a model wrote itself.

    Random ids are unlike anything a model was trained on, and errors on them are two to three times
    those on text. So each token is drawn anew from what the model predicts after the tokens before
    it, all positions at once (the noise is fixed), `rewrites` times; the first ids are random.

    Args:
        predict: Takes ids `[B, S]` and returns logits `[B, S, vocab]`.
        vocab_size: Token ids to draw from.
        lengths: Of the rows.
        rewrites: How often every token is drawn anew.
    """
    probe = make_probe(vocab_size, lengths)
    generator = torch.Generator().manual_seed(PROBE_SEED + 1)
    shape = (*probe.input_ids.shape, vocab_size)
    noise = -torch.empty(shape).exponential_(generator=generator).log()  # Gumbel distributed
    for _ in range(rewrites):
        logits = predict(probe.input_ids)[..., :vocab_size].float().cpu()
        written = (logits + noise).argmax(-1)
        ids = torch.cat([probe.input_ids[:, :1], written[:, :-1]], 1)
        probe = Probe(ids, probe.lengths)
    return probe


class Reference:
    """Logits at the positions that count, ready to be compared with more than once.

    Args:
        logits: `[positions, vocab]`; compared in float64.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.double()

    @functools.cached_property
    def log_p(self) -> Tensor:
        """Log-probabilities, float64 `[positions, vocab]`."""
        return self.logits.log_softmax(-1)

    def compare(self, measured: Reference) -> Difference:
        """Return how far `measured` lies from these logits."""
        kl = (self.log_p.exp() * (self.log_p - measured.log_p)).sum(-1).mean()
        same = self.logits.argmax(-1) == measured.logits.argmax(-1)
        return Difference(
            max_abs=float((self.logits - measured.logits).abs().max()),
            scale=float(self.logits.abs().max()),
            kl=max(float(kl), 0.0),  # in this order: what is not a number stays so
            top1=float(same.double().mean()),
        )


def pick(logits: Tensor, probe: Probe) -> Tensor:
    """Return the logits at the positions that count: `[B, S, vocab]` -> `[positions, vocab]`."""
    return logits[probe.real.to(logits.device)]
