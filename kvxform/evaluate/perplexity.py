"""Perplexity, KL divergence to the source model and top-1 agreement, in one sweep over a text.

The text is cut into windows without overlap; each window is a sequence of its own and its first
token is not scored. Two protocols, named in every result:

- `quantized-prefill`: one stateless call per window; K and V of every position pass through the
  codecs, as in the papers on cache quantisation;
- `decode`: token by token through a session, as at run time.

The two agree to rounding, because the cache has one step rule for every way to fill it
(docs/adr/0005-step-exact.md). `decode` is slower and checks just that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvxform.errors import KvxformError
from kvxform.evaluate.runners import Runner

Protocol = Literal["quantized-prefill", "decode"]
_ROWS = 64  # positions scored at a time: bounds float64 temporaries to `_ROWS * B * vocab`


@dataclass(frozen=True)
class EvalResult:
    """What was measured, and how.

    Attributes:
        protocol: `quantized-prefill` or `decode`.
        window: Tokens of one window.
        windows: Number of windows.
        scored_tokens: Tokens that count: `windows * (window - 1)`.
        perplexity: `exp` of the mean negative log likelihood in nats.
        reference_perplexity: That of the reference model, or None without one.
        kl: Mean KL(reference || model) per token in nats, or None.
        top1_agreement: Share of positions whose most likely token is the reference's, or None.
    """

    protocol: str
    window: int
    windows: int
    scored_tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)


def evaluate(
    runner: Runner,
    token_ids: Tensor,
    *,
    window: int = 1024,
    windows: int = 6,
    protocol: Protocol = "quantized-prefill",
    reference: Runner | None = None,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Measure `runner` on the first `windows * window` tokens of a text.

    Args:
        runner: The model.
        token_ids: The text, int64 `[n]`.
        window: Tokens of one window, at least 2.
        windows: Number of windows.
        protocol: `quantized-prefill` or `decode`.
        reference: The source model; always run statelessly, since its cache is exact.
        batch_size: Windows that run side by side, a row each.
        progress: Called with the number of windows done.

    Raises:
        KvxformError: KVX704 if the text is too short or an argument is out of range.
    """
    rows = _cut(token_ids, window, windows)
    if protocol not in get_args(Protocol):
        rule = f"the protocol must be one of {', '.join(get_args(Protocol))}"
        raise KvxformError("KVX704", rule, where="eval", got=repr(protocol))
    sums = torch.zeros(4, dtype=torch.float64)  # nll, nll of the reference, KL, agreements
    done = 0
    for batch in rows.split(batch_size):
        expected = None if reference is None else reference.logits(batch)
        for start, logits in _pieces(runner, batch, protocol):
            end = start + logits.shape[1]
            part = None if expected is None else expected[:, start:end].flatten(0, 1)
            targets = batch[:, start + 1 : end + 1].flatten()
            sums += _score(logits.flatten(0, 1), targets, part)
        done += len(batch)
        if progress is not None:
            progress(done)
    scored = windows * (window - 1)
    nll, reference_nll, kl, agreed = (sums / scored).tolist()
    compared = reference is not None
    return EvalResult(
        protocol=protocol,
        window=window,
        windows=windows,
        scored_tokens=scored,
        perplexity=math.exp(nll),
        reference_perplexity=math.exp(reference_nll) if compared else None,
        kl=kl if compared else None,
        top1_agreement=agreed if compared else None,
    )


def _cut(token_ids: Tensor, window: int, windows: int) -> Tensor:
    """Return the windows, int64 `[windows, window]`."""
    if window < 2 or windows < 1:
        raise KvxformError(
            "KVX704",
            "a window must have 2 tokens or more, and there must be one or more windows",
            where="eval",
            got=f"window {window}, windows {windows}",
        )
    if len(token_ids) < window * windows:
        raise KvxformError(
            "KVX704",
            f"the text must have {windows} x {window} = {windows * window} tokens",
            where="eval",
            got=len(token_ids),
            hint="take a longer text, or fewer or shorter windows",
        )
    return token_ids[: window * windows].view(windows, window)


def _pieces(runner: Runner, rows: Tensor, protocol: Protocol) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, logits `[B, n, vocab]`); the last position predicts nothing."""
    last = rows.shape[1] - 1
    if protocol == "quantized-prefill":
        logits = runner.logits(rows)
        for start in range(0, last, _ROWS):
            yield start, logits[:, start : min(start + _ROWS, last)]
        return
    held = [runner.prefill(rows[:, :1])]
    for position in range(1, last):
        if len(held) == _ROWS:
            yield position - _ROWS, torch.stack(held, 1)
            held = []
        held.append(runner.decode(rows[:, position]))
    yield last - len(held), torch.stack(held, 1)


def _score(logits: Tensor, targets: Tensor, expected: Tensor | None) -> Tensor:
    """Return sums over positions: nll, reference nll, KL, agreements; float64 `[4]`, on the CPU."""
    targets = targets.to(logits.device)[:, None]
    model = logits.double().log_softmax(-1)  # [n, vocab]
    nll = -model.gather(-1, targets).sum()
    if expected is None:
        zero = nll.new_zeros(())
        return torch.stack([nll, zero, zero, zero]).cpu()
    source = expected.to(logits.device).double().log_softmax(-1)
    source_nll = -source.gather(-1, targets).sum()
    kl = (source.exp() * (source - model)).sum()
    agreed = (model.argmax(-1) == source.argmax(-1)).sum().double()
    return torch.stack([nll, source_nll, kl, agreed]).cpu()
