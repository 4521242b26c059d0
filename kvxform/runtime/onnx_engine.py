"""The graph of a package, loaded by ONNX Runtime, with torch tensors as its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvxform.errors import ArtifactError, KvxformError
from kvxform.runtime.onnx_files import MODEL, REMAKE
from kvxform.runtime.onnx_runtime import check_runtime, first_line, import_runtime, open_graph

PAST, PRESENT = "past_key_values.", "present."
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
ELEMENTS = {  # numbers of TensorProto.DataType; numpy has no name for some of them
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
}


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its shape with symbols, its dtype."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype

    def sizes(self, batch_size: int, tokens: int) -> list[int]:
        """Return the shape of a cache plane `[B, Hk, tokens, width]`.

        Raises:
            ArtifactError: KVX602 if a graph that somebody edited declares another one.
        """
        heads, width = self.shape[1::2] if len(self.shape) == 4 else (None, None)
        if not isinstance(heads, int) or not isinstance(width, int):
            rule = "a plane of a cache must declare its heads and its width"
            raise ArtifactError("KVX602", rule, where=self.name, got=self.shape)
        return [batch_size, heads, tokens, width]


class Engine:
    """A package on one execution provider.

    Args:
        folder: The package, checked.
        onnx: The entry `onnx` of its description.
        provider: Where it runs.
        threads: Threads within an operation on the CPU; those of the machine by default.
        cuda_graph: Capture runs that name a graph, and replay them.

    Attributes:
        provider: Where it runs.
        device: Where tensors of the cache and logits are.
        past: Cache inputs in the order of the graph.
        inputs: Names of all other inputs.
        logits: The output with logits.
        is_last: Whether logits are those of the last token of each row alone.
        level: Emission level of the package.

    Raises:
        ArtifactError: KVX602 if the runtime cannot load the graph.
        KvxformError: KVX704 if the installed runtime cannot run it there.
    """

    def __init__(
        self,
        folder: Path,
        onnx: Mapping[str, Any],
        provider: str,
        *,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.provider = provider
        self.device = torch.device("cuda" if provider == "cuda" else "cpu")
        self.level, self.is_last = str(onnx["level"]), onnx["logits"] == "last"
        self.runtime = import_runtime()
        check_runtime(self.runtime, str(onnx["runtime"]), provider)
        self.session = open_graph(self.runtime, folder / MODEL, provider, threads, cuda_graph)
        ports = [_port(x) for x in self.session.get_inputs()]
        self.past = {p.name: p for p in ports if is_cache(p.name)}
        self.inputs = tuple(p.name for p in ports if not is_cache(p.name))
        self.logits = _logits_port(self.session.get_outputs())
        self._run_options: dict[int, Any] = {}

    def run(self, binding: Binding, graph: int | None = None) -> None:
        """Run once; on CUDA with graphs, capture or replay the one with number `graph`."""
        if self.provider == "cuda":  # the runtime has a stream of its own
            torch.cuda.current_stream().synchronize()
        number = -1 if graph is None else graph
        if number not in self._run_options:
            self._run_options[number] = self.runtime.RunOptions()
            self._run_options[number].add_run_config_entry("gpu_graph_id", str(number))
        try:
            self.session.run_with_iobinding(binding.io, self._run_options[number])
        except Exception as error:
            reason, hint = first_line(error), "rows are as they were before the call"
            if "cuDNN is unavailable" in reason:  # some reductions have no other kernel
                hint = "pip install 'onnxruntime-gpu[cudnn]', and its libraries on LD_LIBRARY_PATH"
            rule = "ONNX Runtime must be able to run the package"
            raise KvxformError("KVX706", rule, where="onnx", got=reason, hint=hint) from error

    def new_logits(self, batch_size: int, tokens: int) -> Tensor:
        """Return memory for the logits of a run, `[B, tokens or 1, vocab]`."""
        vocab = self.logits.shape[-1]
        assert isinstance(vocab, int), "packages declare the vocabulary"
        shape = (batch_size, 1 if self.is_last else tokens, vocab)
        return torch.empty(shape, dtype=self.logits.dtype, device=self.device)


class Binding:
    """What one run reads and writes; it keeps the tensors alive."""

    def __init__(self, engine: Engine) -> None:
        self.io = engine.session.io_binding()
        self._kept: dict[tuple[str, str], Tensor] = {}

    def read(self, name: str, x: Tensor) -> None:
        """Let an input be `x`, contiguous; instead of what it was."""
        self._bind(self.io.bind_input, "input", name, x)

    def write(self, name: str, x: Tensor) -> None:
        """Let an output be written into `x`, contiguous."""
        self._bind(self.io.bind_output, "output", name, x)

    def hold(self, planes: Mapping[str, Tensor]) -> None:
        """Let every plane be read and written in place."""
        for name, plane in planes.items():
            self.read(name, plane)
            self.write(present_of(name), plane)

    def _bind(self, bind: Any, side: str, name: str, x: Tensor) -> None:
        assert x.is_contiguous(), name
        self._kept[side, name] = x
        index = x.device.index or 0
        bind(name, x.device.type, index, ELEMENTS[x.dtype], list(x.shape), x.data_ptr())


def is_cache(name: str) -> bool:
    """Whether an input or output holds a part of the cache."""
    return name.startswith((PAST, PRESENT))


def present_of(past: str) -> str:
    """Return the output that belongs to a cache input."""
    return PRESENT + past.removeprefix(PAST)


def _port(x: Any) -> Port:
    if x.type not in DTYPES:
        rule = f"{x.name} must have a dtype that packages have"
        raise ArtifactError("KVX602", rule, where="onnx", got=x.type, hint=REMAKE)
    return Port(x.name, tuple(x.shape), DTYPES[x.type])


def _logits_port(outputs: Sequence[Any]) -> Port:
    for x in outputs:
        if x.name == "logits":
            return _port(x)
    names = ", ".join(x.name for x in outputs)
    rule = "a package must have the output logits"
    raise ArtifactError("KVX602", rule, where="onnx", got=names, hint=REMAKE)
