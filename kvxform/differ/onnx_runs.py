"""How an ONNX side runs, on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvxform.errors import ArtifactError
from kvxform.ir.program import Program
from kvxform.runtime.exporting import has_cuda
from kvxform.runtime.onnx_rows import OnnxModel
from kvxform.runtime.onnx_runtime import import_runtime
from kvxform.runtime.onnx_session import OnnxSession

PAST = "past_key_values."
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def package_model(program: Program, folder: Path) -> OnnxModel:
    """Return a package as a model with a cache; hidden states are those of its program."""
    provider = None if has_cuda() else "cpu"
    return OnnxModel(program, OnnxSession(folder, provider=provider, is_edited=True))


def file_logits(path: Path) -> FileRun | None:
    """Return what computes logits of an .onnx file that is no package of ours.

    Returns:
        None if an input is neither token ids, positions, a mask, nor an empty cache.

    Raises:
        ArtifactError: KVX602 if ONNX Runtime cannot load the file.
        KvxformError: KVX704 if onnxruntime is not installed.
    """
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a class for each status code
        reason = str(error).splitlines()[0]
        rule = "ONNX Runtime must be able to load the file"
        raise ArtifactError("KVX602", rule, where=path.name, got=reason) from error
    run = FileRun(session)
    return run if run.is_feedable else None


class FileRun:
    """Runs a decoder on token ids, with an empty cache if it takes one.

    Attributes:
        vocab_size: Width of the logits, or None if the file does not say.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = session.get_inputs()
        output = session.get_outputs()[0]
        self._output = output.name
        self.vocab_size = output.shape[-1] if isinstance(output.shape[-1], int) else None

    @property
    def is_feedable(self) -> bool:
        """Whether every input is one that a decoder has."""
        names = {x.name for x in self._inputs}
        plain = {"input_ids", "attention_mask", "position_ids"}
        rest = names - plain
        return "input_ids" in names and all(
            self._is_past(x) for x in self._inputs if x.name in rest
        )

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits `[B, S, vocab]`."""
        ids = input_ids.numpy()
        feeds = {x.name: self._feed(x, ids) for x in self._inputs}
        (logits,) = self._session.run([self._output], feeds)
        return torch.from_numpy(logits)

    @staticmethod
    def _is_past(port: Any) -> bool:
        sizes = port.shape
        is_known = len(sizes) == 4 and all(isinstance(sizes[axis], int) for axis in (1, 3))
        return port.name.startswith(PAST) and port.type in DTYPES and is_known

    @staticmethod
    def _feed(port: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        dtype = DTYPES[port.type]
        if port.name == "input_ids":
            return ids.astype(dtype)
        if port.name == "attention_mask":
            return np.ones(ids.shape, dtype)
        if port.name == "position_ids":
            return np.broadcast_to(np.arange(ids.shape[1], dtype=dtype), ids.shape).copy()
        return np.zeros((len(ids), port.shape[1], 0, port.shape[3]), dtype)
