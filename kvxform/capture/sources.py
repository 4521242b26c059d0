"""Where models come from: modules, functions, checkpoints, GGUF files, exported programs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kvxform.capture.checkpoints import find_snapshot, load_checkpoint, open_store
from kvxform.capture.factories import call_factory, split_factory
from kvxform.capture.gguf_files import load_gguf
from kvxform.capture.pt2_files import open_pt2
from kvxform.capture.smollm2 import SMOLLM2, smollm2_folder
from kvxform.errors import CaptureError
from kvxform.ir.program import ModelInfo
from kvxform.ir.store import WeightStore

AnySource = nn.Module | ExportedProgram | str | Path


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        model: The module or exported program.
        info: What is known of it; vocabulary and dtype are filled in after export.
        store: Where its weights are if they are too many to hold in memory.
    """

    model: nn.Module | ExportedProgram
    info: ModelInfo
    store: WeightStore | None = None


def open_source(
    source: AnySource, *, name: str | None = None, dtype: torch.dtype | None = None
) -> Source:
    """Open a source; see `capture` for its forms.

    Raises:
        CaptureError: KVX301 if it is none of them, or cannot be read.
    """
    if isinstance(source, ExportedProgram):
        return Source(source, ModelInfo(name or "exported", "ExportedProgram", 0))
    if isinstance(source, nn.Module):
        return Source(source, _info_of(source, name or type(source).__name__, None))
    if not isinstance(source, str | Path):
        raise _unknown(type(source).__name__)
    text = str(source)
    factory = split_factory(text)
    if factory is not None:
        return _from_factory(*factory, name)
    path = smollm2_folder() if text == SMOLLM2 else Path(text).expanduser()
    label = name or (text if text == SMOLLM2 else path.name or text)
    if path.suffix == ".pt2":
        return Source(open_pt2(path), ModelInfo(label, "ExportedProgram", 0))
    model, tokenizer, store = _load(path, text, dtype)
    return Source(model, _info_of(model, label, tokenizer), store)


def _from_factory(file: str, function: str, name: str | None) -> Source:
    model = call_factory(file, function)
    label = name or f"{Path(file).name}:{function}"
    if isinstance(model, ExportedProgram):
        return Source(model, ModelInfo(label, "ExportedProgram", 0))
    return Source(model.eval(), _info_of(model, label, None))


def load_source_module(source: AnySource, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the unrewritten model of a source, in evaluation mode.

    A module is returned as it is; an exported program as its own module.

    Raises:
        CaptureError: KVX301 if the source is unknown or cannot be read.
    """
    if isinstance(source, nn.Module):
        return source
    model = open_source(source, dtype=dtype).model
    return model.module() if isinstance(model, ExportedProgram) else model.eval()


def _load(
    path: Path, text: str, dtype: torch.dtype | None
) -> tuple[nn.Module, str | None, WeightStore | None]:
    """Return the model, the place of its tokenizer, and the store of its weights if it is large."""
    is_gguf = path.suffix == ".gguf"
    if is_gguf and not path.is_file():
        raise _unknown(text, "no such GGUF file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise _unknown(text, "the folder has no config.json")
    try:
        if is_gguf:
            return load_gguf(path, dtype or torch.float32), str(path), None
        folder = path if path.is_dir() else find_snapshot(text)
        store = open_store(folder)
        return load_checkpoint(folder, dtype or "auto", store), str(folder), store
    except Exception as failure:  # readers of damaged files raise many unrelated types
        first_line = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
        raise _unknown(text, first_line[:200]) from failure


def _unknown(text: str, why: str = "") -> CaptureError:
    return CaptureError(
        "KVX301",
        "a model source must be a module, an exported program, a Hugging Face folder or cached id, "
        f"a .gguf or .pt2 file, FILE.py:FUNCTION or {SMOLLM2!r}",
        where="capture",
        got=f"{text!r}: {why}" if why else repr(text),
        hint="nothing is downloaded; give the path of a local model",
    )


def _info_of(model: nn.Module, name: str, tokenizer: str | None) -> ModelInfo:
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__name__
    info = ModelInfo(name, family, 0, tokenizer_path=tokenizer)
    if config is None:
        return info
    generation = getattr(model, "generation_config", None)
    end = _first_given("eos_token_id", generation, config)
    return dataclasses.replace(
        info,
        context_length=getattr(config, "max_position_embeddings", None),
        bos_token_id=_first_given("bos_token_id", generation, config),
        eos_token_ids=tuple(end)
        if isinstance(end, list | tuple)
        else ()
        if end is None
        else (end,),
        pad_token_id=_first_given("pad_token_id", generation, config),
    )


def _first_given(name: str, *holders: object) -> Any:
    values = (getattr(holder, name, None) for holder in holders)
    return next((value for value in values if value is not None), None)
