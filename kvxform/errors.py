"""Every exception that kvxform raises on purpose, each with a stable code.

The text of an error has one form, so that people and tools can read it::

    KVX203 [quantize-kv] head_dim must be a multiple of 16; got 72 at layers.3.attn. Hint: skip it.

Code ranges: 1xx recipes, 2xx passes, 3xx capture, 4xx code generation, 5xx verification,
6xx artifacts, 7xx run time, 8xx command line. `docs/errors.md` lists them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word nearest to `word`, or lists them all."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'" if close else f"choose from {', '.join(names)}"


class KvxformError(Exception):
    """Base of all errors with a code.

    Args:
        code: Stable code, `KVX` and three digits.
        rule: What must hold, as a clause without a final full stop.
        where: Pass, module or file that found it; printed in brackets.
        got: What was found instead.
        at: Graph node, source line, layer or file position.
        hint: What to do about it, as a sentence without a final full stop.
    """

    def __init__(
        self,
        code: str,
        rule: str,
        *,
        where: str = "",
        got: object = None,
        at: str = "",
        hint: str = "",
    ) -> None:
        self.code, self.rule, self.where = code, rule, where
        self.got, self.at, self.hint = got, at, hint
        text = f"{code} [{where}] {rule}" if where else f"{code} {rule}"
        if got is not None:
            text += f"; got {got}"
        if at:
            text += f" at {at}"
        text = text.rstrip(".") + "."
        if hint:
            text += f" Hint: {hint}."
        super().__init__(text)


class RecipeError(KvxformError):
    """A recipe cannot be read, or its passes cannot run in the order given."""


class PassError(KvxformError):
    """A pass cannot run on this program, or broke its own promise."""


class CaptureError(KvxformError):
    """A model cannot be captured, or no attention was found in it.

    Args:
        code: As for `KvxformError`.
        rule: As for `KvxformError`.
        rejected: The candidates that were left alone, as `ir.program.RejectedSite`.
        parts: As for `KvxformError`.
    """

    def __init__(self, code: str, rule: str, *, rejected: Iterable[Any] = (), **parts: Any) -> None:
        super().__init__(code, rule, **parts)
        self.rejected = tuple(rejected)


class CodegenError(KvxformError):
    """A program cannot be lowered to the wanted target."""


class VerifyError(KvxformError):
    """A measured error is larger than its contract or bound allows."""


class ArtifactError(KvxformError):
    """A saved artifact is missing, damaged, or not safe to read."""


class CacheFullError(KvxformError):
    """The cache has no room for the tokens asked for; what it held is still there."""
