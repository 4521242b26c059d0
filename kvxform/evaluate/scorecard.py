"""Scorecard: all that is measured of one cache format, beside its true bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvxform.evaluate.attention import AttentionError, measure_attention
from kvxform.evaluate.encoding import EncodeCost, measure_encoding
from kvxform.evaluate.footprint import Footprint, measure_footprint
from kvxform.evaluate.passkey import DEPTHS, PasskeyPrompts, PasskeyResult, find_passkeys
from kvxform.evaluate.passkey import make_prompts as make_passkeys
from kvxform.evaluate.peers import find_peer, make_peer_runner, peer_footprint
from kvxform.evaluate.perplexity import EvalResult, Protocol, evaluate
from kvxform.evaluate.runners import Remembered, Runner, SessionRunner, SourceRunner
from kvxform.runtime.model import OptimizedModel

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        window: Tokens of one window.
        windows: Number of windows.
        decode_window: Tokens of a window that are decoded one by one; 0 leaves the protocol out.
        batch_size: Windows or prompts that run side by side in a prefill.
        passkey_lengths: Lengths of passkey prompts; none leaves the test out.
        passkey_depths: Where numbers are hidden.
        passkey_keys: Numbers at each depth.
        encoding: Time the codecs.
    """

    window: int = 1024
    windows: int = 6
    decode_window: int = 256
    batch_size: int = 1
    passkey_lengths: tuple[int, ...] = (1024,)
    passkey_depths: tuple[float, ...] = DEPTHS
    passkey_keys: int = 1
    encoding: bool = True


@dataclass(frozen=True)
class Scorecard:
    """What was measured of one format.

    Attributes:
        name: Recipe, peer, or `source`.
        footprint: True bits; None for the source model.
        prefill: Protocol `quantized-prefill`; None where that means nothing.
        decode: Protocol `decode`, on the first `decode_window` tokens of each window.
        attention: Error of each layer alone.
        passkeys: What was found, by length.
        encoding: What encoding costs.
    """

    name: str
    footprint: Footprint | None = None
    prefill: EvalResult | None = None
    decode: EvalResult | None = None
    attention: AttentionError | None = None
    passkeys: tuple[PasskeyResult, ...] = ()
    encoding: EncodeCost | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        parts = ("footprint", "prefill", "decode", "attention", "encoding")
        found = {name: getattr(self, name) for name in parts}
        return {
            "name": self.name,
            **{name: None if part is None else part.to_dict() for name, part in found.items()},
            "passkeys": [passkey.to_dict() for passkey in self.passkeys],
        }


class Bench:
    """A text, prompts and a source model, against which formats are measured.

    Args:
        source: The unrewritten model.
        tokenizer: Its tokenizer.
        token_ids: The text, int64 `[n]`.
        effort: How much to measure.
        tell: Called with a word before each part.
    """

    def __init__(
        self,
        source: nn.Module,
        tokenizer: Any,
        token_ids: Tensor,
        effort: Effort,
        tell: Tell | None = None,
    ) -> None:
        self._module, self._effort = source, effort
        self._source = Remembered(SourceRunner(source))
        self._tokens = token_ids
        self._tell = tell or (lambda part: None)
        self._prompts: Sequence[PasskeyPrompts] = [
            make_passkeys(tokenizer, length, depths=effort.passkey_depths, keys=effort.passkey_keys)
            for length in effort.passkey_lengths
        ]

    def measure_source(self) -> Scorecard:
        """Measure the source model itself: what every other row is compared with."""
        card = Scorecard("source", prefill=self._evaluate(self._source, "quantized-prefill"))
        return self._with_steps(card, self._source)

    def measure_model(self, name: str, model: OptimizedModel) -> Scorecard:
        """Measure a recipe.

        Args:
            name: What to call it.
            model: The optimised source model.
        """
        plan = model.plan
        assert plan is not None, "a format has a cache"
        longest = max([self._effort.window, *self._effort.passkey_lengths])
        runner = SessionRunner(model, longest)
        card = Scorecard(
            name,
            measure_footprint(plan),
            self._evaluate(runner, "quantized-prefill"),
            attention=self._attention(model),
            encoding=self._encoding(model),
        )
        return self._with_steps(card, runner)

    def measure_peer(self, name: str) -> Scorecard:
        """Measure a setting of Hugging Face's `QuantizedCache`; see `kvxform.evaluate.peers`.

        Raises:
            KvxformError: KVX801 if it is unknown or its package is not installed.
        """
        peer = find_peer(name)
        card = Scorecard(name, peer_footprint(self._module, peer))
        return self._with_steps(card, make_peer_runner(self._module, peer))

    def _with_steps(self, card: Scorecard, runner: Runner) -> Scorecard:
        """Add what is decoded token by token."""
        decode = self._evaluate(runner, "decode") if self._effort.decode_window else None
        self._tell("passkey")
        size = self._effort.batch_size
        found = tuple(find_passkeys(runner, prompts, batch_size=size) for prompts in self._prompts)
        return dataclasses.replace(card, decode=decode, passkeys=found)

    def _evaluate(self, runner: Runner, protocol: Protocol) -> EvalResult:
        self._tell(protocol)
        effort, tokens = self._effort, self._tokens[: self._effort.windows * self._effort.window]
        size, window = effort.batch_size, effort.window
        if protocol == "decode":  # steps are short: all windows go side by side
            size, window = effort.windows, effort.decode_window
            tokens = tokens.view(effort.windows, effort.window)[:, :window].flatten()
        return evaluate(
            runner,
            tokens,
            window=window,
            windows=effort.windows,
            protocol=protocol,
            reference=self._source,
            batch_size=size,
        )

    def _attention(self, model: OptimizedModel) -> AttentionError:
        self._tell("attention")
        return measure_attention(model, self._tokens[None, : self._effort.window])

    def _encoding(self, model: OptimizedModel) -> EncodeCost | None:
        if not self._effort.encoding:
            return None
        self._tell("encoding")
        assert model.plan is not None, "a format has a cache"
        return measure_encoding(model.plan, model.device)
