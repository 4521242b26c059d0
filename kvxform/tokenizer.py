"""Tokenizers of source models: open one, and carry its files into artifacts and packages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def load_tokenizer(path: str | Path | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a folder or GGUF file, or None if there is none."""
    place = Path(path) if path else None
    if place is None or not place.exists():
        return None
    from transformers import AutoTokenizer  # seconds, so only where it is needed

    is_file = place.is_file()
    options = {"gguf_file": place.name} if is_file else {}
    try:
        return AutoTokenizer.from_pretrained(
            str(place.parent if is_file else place), local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError):
        return None


def tokenizer_files(path: str | Path | None) -> dict[str, bytes]:
    """Return the files of a tokenizer by name; none if there is no tokenizer.

    Args:
        path: Folder whose files are taken as they are, or a GGUF file, whose tokenizer is written
            out by transformers.
    """
    place = Path(path) if path else None
    if place is None or not place.is_file():
        return _read_files(place) if place is not None else {}
    tokenizer = load_tokenizer(place)
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _read_files(Path(folder))


def _read_files(folder: Path) -> dict[str, bytes]:
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {name: (folder / name).read_bytes() for name in names}
