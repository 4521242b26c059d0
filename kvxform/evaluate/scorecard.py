"""Scorecard: all that is measured of one cache format, beside its true bits, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvxform.evaluate.attention import measure_attention
from kvxform.evaluate.encoding import measure_encoding
from kvxform.evaluate.footprint import Footprint, measure_footprint
from kvxform.evaluate.passkey import DEPTHS, find_passkeys
from kvxform.evaluate.passkey import make_prompts as make_passkeys
from kvxform.evaluate.peers import find_peer, make_peer_runner, peer_footprint
from kvxform.evaluate.perplexity import EvalResult, Protocol, evaluate
from kvxform.evaluate.runners import Remembered, Runner, SessionRunner, SourceRunner
from kvxform.runtime.model import OptimizedModel
from kvxform.texts import encode_text

Card = Mapping[str, Any]  # the parts of a format as plain data; None where one means nothing


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
class Subject:
    """A format that is ready to be measured.

    Attributes:
        name: Recipe, peer, or `source`.
        runner: What runs it.
        footprint: True bits; None for the source model.
        model: The optimised model, if it is a recipe.
        is_stateless: Whether a stateless call passes through the cache. It does not in peers,
            whose prefill attends to exact values.
    """

    name: str
    runner: Runner
    footprint: Footprint | None = None
    model: OptimizedModel | None = None
    is_stateless: bool = True


class Bench:
    """A text, prompts and a source model, against which formats are measured.

    Args:
        source: The unrewritten model.
        tokenizer: Its tokenizer.
        text: What is measured on; numbers are hidden in it too.
        effort: How much to measure.
    """

    def __init__(self, source: nn.Module, tokenizer: Any, text: str, effort: Effort) -> None:
        self._module, self._effort = source, effort
        self._source = Remembered(SourceRunner(source))
        self._tokens = encode_text(tokenizer, text)[: effort.windows * effort.window]
        self._prompts = [
            make_passkeys(
                tokenizer,
                length,
                depths=effort.passkey_depths,
                keys=effort.passkey_keys,
                filler=text,
            )
            for length in effort.passkey_lengths
        ]
        self._parts: dict[str, Callable[[Subject], Any]] = {
            "prefill": self._prefill,
            "attention": self._attention,
            "passkeys": self._passkeys,
            "decode": self._decode,
            "encoding": self._encoding,
        }

    def source(self) -> Subject:
        """Return the source model itself: what every other row is compared with."""
        return Subject("source", self._source)

    def recipe(self, name: str, model: OptimizedModel) -> Subject:
        """Return an optimised source model as something to measure."""
        assert model.plan is not None, "a format has a cache"
        longest = max([self._effort.window, *self._effort.passkey_lengths])
        return Subject(name, SessionRunner(model, longest), measure_footprint(model.plan), model)

    def peer(self, name: str) -> Subject:
        """Return a setting of Hugging Face's `QuantizedCache`; see `kvxform.evaluate.peers`.

        Raises:
            KvxformError: KVX801 if it is unknown or its package is not installed.
        """
        peer = find_peer(name)
        runner = make_peer_runner(self._module, peer)
        return Subject(name, runner, peer_footprint(self._module, peer), is_stateless=False)

    def measure(self, subject: Subject, parts: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return parts of the scorecard of a format as plain data, all of them by default."""
        return {part: self._parts[part](subject) for part in parts or self._parts}

    def _prefill(self, subject: Subject) -> dict[str, Any] | None:
        if not subject.is_stateless:
            return None
        effort = self._effort
        return self._evaluate(
            subject.runner, "quantized-prefill", effort.window, effort.batch_size
        ).to_dict()

    def _decode(self, subject: Subject) -> dict[str, Any] | None:
        """Decode all windows side by side; steps of one token are short."""
        effort = self._effort
        if not effort.decode_window:
            return None
        return self._evaluate(
            subject.runner, "decode", effort.decode_window, effort.windows
        ).to_dict()

    def _evaluate(
        self, runner: Runner, protocol: Protocol, window: int, batch_size: int
    ) -> EvalResult:
        rows = self._tokens.view(self._effort.windows, self._effort.window)[:, :window]
        return evaluate(
            runner,
            rows.flatten(),
            window=window,
            windows=len(rows),
            protocol=protocol,
            reference=self._source,
            batch_size=batch_size,
        )

    def _attention(self, subject: Subject) -> dict[str, Any] | None:
        if subject.model is None:
            return None
        return measure_attention(subject.model, self._tokens[None, : self._effort.window]).to_dict()

    def _passkeys(self, subject: Subject) -> list[dict[str, Any]]:
        size = self._effort.batch_size
        found = (find_passkeys(subject.runner, p, batch_size=size) for p in self._prompts)
        return [result.to_dict() for result in found]

    def _encoding(self, subject: Subject) -> dict[str, Any] | None:
        if subject.model is None or not self._effort.encoding:
            return None
        assert subject.model.plan is not None, "a format has a cache"
        return measure_encoding(subject.model.plan, subject.model.device).to_dict()


def heading(subject: Subject) -> dict[str, Any]:
    """Return what a scorecard says of a format before anything is run."""
    footprint = subject.footprint
    return {"name": subject.name, "footprint": None if footprint is None else footprint.to_dict()}
