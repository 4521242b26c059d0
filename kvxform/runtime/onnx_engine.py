"""The graph of a package, loaded by ONNX Runtime, with torch tensors as its memory.

Every refusal that has to do with the installed runtime is made here: none installed, too old, no
CUDA build, no CUDA libraries, a node that would run on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvxform.errors import ArtifactError, KvxformError
from kvxform.runtime.onnx_files import MODEL, REMAKE

PAST, PRESENT = "past_key_values.", "present."
CUDA = "CUDAExecutionProvider"
PLACEMENT_RUNTIME = "1.30"  # tells where each node runs
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": CUDA}
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


# CUDA has kernels of these for all our dtypes. The runtime leaves them on the CPU where they make
# sizes, that is a few integers whose consumers want them there.
SIZE_OPS = {
    *("Add", "Cast", "Concat", "Div", "Equal", "Gather", "Identity", "Max", "Min", "Mul"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze"),
    *("Sub", "Unsqueeze", "Where"),
}


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its shape with symbols, its dtype."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype

    def sizes(self, batch_size: int, tokens: int) -> list[int]:
        """Return the shape of a cache plane `[B, Hk, tokens, width]`."""
        heads, width = self.shape[1], self.shape[3]
        assert isinstance(heads, int), "planes declare their heads"
        assert isinstance(width, int), "planes declare their width"
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
        _check_version(self.runtime.__version__, str(onnx["runtime"]), "the package needs")
        _check_provider(self.runtime, provider)
        self.session = self._load(folder / MODEL, threads, cuda_graph)
        ports = [_port(x) for x in self.session.get_inputs()]
        self.past = {p.name: p for p in ports if is_cache(p.name)}
        self.inputs = tuple(p.name for p in ports if not is_cache(p.name))
        self.logits = _logits_port(self.session.get_outputs())
        self._run_options: dict[int, Any] = {}

    def _load(self, path: Path, threads: int | None, cuda_graph: bool) -> Any:
        options = self.runtime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised, in one line
        if threads is not None:
            options.intra_op_num_threads = threads
        settings: dict[str, str] = {}
        if self.provider == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            settings = {"enable_cuda_graph": str(int(cuda_graph))}
        providers = [(PROVIDERS[self.provider], settings)]
        try:
            session = self.runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the runtime has a class for each status code
            raise _cannot_load(error) from error
        if self.provider == "cuda" and CUDA not in session.get_providers():
            refuse_here(
                "ONNX Runtime must be able to load its CUDA provider",
                "only the CPU provider",
                "put the libraries of CUDA 13 on LD_LIBRARY_PATH, or take provider cpu",
            )
        if self.provider == "cuda":
            _check_placement(session.get_provider_graph_assignment_info())
        return session

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
            reason, hint = _first_line(error), "rows are as they were before the call"
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


def import_runtime() -> Any:
    """Return the module onnxruntime; KVX704 if it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise KvxformError(
            "KVX704",
            "an ONNX session needs the package onnxruntime",
            where="onnx",
            hint="pip install 'kvxform[cpu]', or 'kvxform[gpu]' for CUDA",
        ) from error
    return onnxruntime


def _check_version(installed: str, needed: str, who: str) -> None:
    if _numbers(installed) < _numbers(needed):
        rule = f"{who} ONNX Runtime {needed} or newer"
        refuse_here(rule, installed, "pip install -U onnxruntime, or onnxruntime-gpu for CUDA")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _check_provider(runtime: Any, provider: str) -> None:
    if provider not in PROVIDERS:
        refuse_here("provider must be cpu or cuda", provider, "take one of them")
    if provider == "cpu":
        return
    _check_version(runtime.__version__, PLACEMENT_RUNTIME, "provider cuda needs")
    available: Sequence[str] = runtime.get_available_providers()
    if CUDA not in available:
        refuse_here(
            "provider cuda needs a build of ONNX Runtime for CUDA",
            ", ".join(available),
            "pip uninstall onnxruntime; pip install onnxruntime-gpu (a build for CUDA 13)",
        )
    if not torch.cuda.is_available():
        rule = "provider cuda needs a GPU that torch can use: it holds the cache"
        refuse_here(
            rule, f"torch {torch.__version__}", "install torch for CUDA, or take provider cpu"
        )


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


def _check_placement(parts: Sequence[Any]) -> None:
    """Refuse a graph with a node that fell back to the CPU."""
    off = [n for part in parts if part.ep_name != CUDA for n in part.get_nodes()]
    for node in off:
        if node.op_type not in SIZE_OPS:
            hint = "export the package with --provider cuda, or take provider cpu"
            refuse_here("every node must run on CUDA", f"{node.op_type} on the CPU", hint)


def _cannot_load(error: Exception) -> KvxformError:
    """Return what the runtime said of a graph that it refused, in one line."""
    reason = _first_line(error)
    if "cannot use the graph capture feature" in reason:
        return KvxformError(
            "KVX704",
            "a CUDA graph needs every node on CUDA",
            where="onnx",
            got=reason.rpartition("as all ")[2],
            hint="export the package with --provider cuda, or take cuda_graph=False",
        )
    return ArtifactError("KVX602", "ONNX Runtime must be able to load model.onnx", got=reason)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def refuse_here(rule: str, got: object, hint: str) -> NoReturn:
    """Raise KVX704 for what a package, or the installed runtime, cannot do."""
    raise KvxformError("KVX704", rule, where="onnx", got=got, hint=hint)
