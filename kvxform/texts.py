"""The text that models are measured on: a file, or text that every Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvxform.errors import KvxformError


def default_text() -> str:
    """Return the help topics of the standard library, about 460 kB of English on Python.

    The text depends on the Python version; numbers on it compare models, not papers.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path | None) -> str:
    """Return the text of a UTF-8 file, or `default_text` if `path` is None.

    Raises:
        KvxformError: KVX801 if the file cannot be read as text.
    """
    if path is None:
        return default_text()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise KvxformError(
            "KVX801", "a text must be a readable UTF-8 file", got=f"'{path}' ({reason})"
        ) from error


def encode_text(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of `text` without special tokens, int64 `[n]`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: Raw text.
    """
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)
