"""Hugging Face checkpoints: read by transformers, mapped from their files, streamed if large."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import torch
from torch import nn

from kvxform.folders import cache_folder
from kvxform.ir.store import WeightStore

STREAM_FROM = 1 << 30  # bytes; smaller models are kept in memory, for that is quicker


def find_snapshot(name: str) -> Path:
    """Return the folder of a Hugging Face id that is in the local cache.

    Raises:
        OSError: If it is not there.
    """
    from transformers.utils import cached_file

    missing = "no such file or folder, and no such id in the local cache of Hugging Face"
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except OSError as error:
        raise OSError(missing) from error
    if found is None:
        raise OSError(missing)
    return Path(found).parent


def open_store(folder: Path) -> WeightStore | None:
    """Return a store for the weights of a checkpoint, or None if it is small."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return WeightStore(cache_folder() / "scratch") if size >= STREAM_FROM else None


def load_checkpoint(
    folder: Path, dtype: torch.dtype | str, store: WeightStore | None = None
) -> nn.Module:
    """Return the model of a checkpoint, in evaluation mode; its weights stay in their files.

    Weights that must be converted, to `dtype` or because they are stored in another form, are put
    into files of `store`, if there is one.

    Raises:
        ValueError: If weights are missing or have other shapes; transformers would invent them.
        Exception: Whatever transformers raises for files that it cannot read.
    """
    from transformers import AutoModelForCausalLM

    with contextlib.nullcontext() if store is None else store.loading():
        model, found = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    assert isinstance(model, nn.Module)
    if store is not None:
        store.adopt(itertools.chain(model.parameters(), model.buffers()))
    return model.eval()
