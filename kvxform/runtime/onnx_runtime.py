"""The installed ONNX Runtime: what a package needs of it, and a session of its graph.

Every refusal that has to do with the installation is made here: none installed, too old, no build
or no libraries for CUDA, a node that would run on the CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from kvxform.errors import ArtifactError, KvxformError

CUDA = "CUDAExecutionProvider"
PLACEMENT_RUNTIME = "1.30"  # tells where each node runs
NO_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # read by the runtime when it makes kernels
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": CUDA}
# CUDA has kernels of these for all our dtypes. The runtime leaves them on the CPU where they make
# sizes, that is a few integers whose consumers want them there.
SIZE_OPS = {
    *("Add", "Cast", "Concat", "Div", "Equal", "Gather", "Identity", "Max", "Min", "Mul"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze"),
    *("Sub", "Unsqueeze", "Where"),
}


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


def check_runtime(runtime: Any, needed: str, provider: str) -> None:
    """Refuse an installed runtime that is too old for a package, or cannot use a provider.

    Args:
        runtime: The module onnxruntime.
        needed: The oldest version that has the operators of the package.
        provider: `cpu` or `cuda`.

    Raises:
        KvxformError: KVX704.
    """
    _check_version(runtime.__version__, needed, "the package needs")
    _check_provider(runtime, provider)


def open_graph(
    runtime: Any, path: Path, provider: str, threads: int | None, cuda_graph: bool
) -> Any:
    """Return the session of a graph on a provider that `check_runtime` has passed.

    Raises:
        ArtifactError: KVX602 if the runtime cannot load the graph.
        KvxformError: KVX704 if it cannot run all of it there.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, in one line
    if threads is not None:
        options.intra_op_num_threads = threads
    settings: dict[str, str] = {}
    if provider == "cuda":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings = {"enable_cuda_graph": str(int(cuda_graph))}
    providers = [(PROVIDERS[provider], settings)]
    try:
        with _whole_scores():
            session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the runtime has a class for each status code
        raise _cannot_load(error) from error
    if provider == "cuda" and CUDA not in session.get_providers():
        refuse_here(
            "ONNX Runtime must be able to load its CUDA provider",
            "only the CPU provider",
            "put the libraries of CUDA 13 on LD_LIBRARY_PATH, or take provider cpu",
        )
    if provider == "cuda":
        _check_placement(session.get_provider_graph_assignment_info())
    return session


@contextmanager
def _whole_scores() -> Iterator[None]:
    """Let kernels of `GroupQueryAttention` that are made meanwhile work out scores in one piece.

    On the CPU prompts take up to a quarter less time then, in runs as short as those of
    `BufferCache`. What the environment says already is kept.
    """
    is_given = NO_TILES in os.environ
    os.environ.setdefault(NO_TILES, "1")
    try:
        yield
    finally:
        if not is_given:
            del os.environ[NO_TILES]


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


def _check_placement(parts: Sequence[Any]) -> None:
    """Refuse a graph with a node that fell back to the CPU."""
    off = [n for part in parts if part.ep_name != CUDA for n in part.get_nodes()]
    for node in off:
        if node.op_type not in SIZE_OPS:
            hint = "export the package with --provider cuda, or take provider cpu"
            refuse_here("every node must run on CUDA", f"{node.op_type} on the CPU", hint)


def _cannot_load(error: Exception) -> KvxformError:
    """Return what the runtime said of a graph that it refused, in one line."""
    reason = first_line(error)
    if "cannot use the graph capture feature" in reason:
        return KvxformError(
            "KVX704",
            "a CUDA graph needs every node on CUDA",
            where="onnx",
            got=reason.rpartition("as all ")[2],
            hint="export the package with --provider cuda, or take cuda_graph=False",
        )
    return ArtifactError("KVX602", "ONNX Runtime must be able to load model.onnx", got=reason)


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def refuse_here(rule: str, got: object, hint: str) -> NoReturn:
    """Raise KVX704 for what a package, or the installed runtime, cannot do."""
    raise KvxformError("KVX704", rule, where="onnx", got=got, hint=hint)
