"""The Triton lowering: cached attention by generated kernels, the rest of the graph by torch.

On a CUDA device a decode step is replayed from a CUDA graph. With `TRITON_INTERPRET=1` in the
environment everything runs on a CPU too, slowly and without graphs.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.codegen.triton.cache import Launchers, TritonCache
from kvxform.codegen.triton.capability import (
    check_device,
    check_interpreter,
    check_program,
    is_interpreted,
)
from kvxform.codegen.triton.compiled import compiled_forward
from kvxform.codegen.triton.graphs import DecodeGraphs
from kvxform.codegen.triton.kernels import Kernels
from kvxform.codegen.triton.step import make_step
from kvxform.ir.cache import is_watched
from kvxform.ir.execution import CacheSizes, LiveCache, StepInputs
from kvxform.ir.program import Program


class TritonExecutable:
    """A cached Program that can be called.

    Args:
        program: Its weights are shared, not copied.
        compile_decode: Run the rest of a decode step through `torch.compile`.

    Raises:
        CodegenError: KVX401 if the plan or the machine is not what this lowering can run on.
    """

    def __init__(self, program: Program, *, compile_decode: bool = False) -> None:
        check_program(program)
        self.program = program
        check_device(self.device)
        check_interpreter(program)
        self._kernels = Kernels(program, self.device, interpret=is_interpreted())
        self._launchers = Launchers.of(self._kernels)
        self._graph = EagerExecutable(self._fold_rotations(), fuse_norms=True)
        forward = compiled_forward(self._graph.program) if compile_decode else self._run_folded
        self._graphs = DecodeGraphs(forward, self._launchers.decoding, self.device)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(iter(self.program.weights.values())).device

    @functools.cached_property
    def _watched_graph(self) -> EagerExecutable:
        """The graph with all its rotations, so that watchers see K and q as they are cached."""
        return EagerExecutable(self.program, fuse_norms=True)

    @property
    def why_direct(self) -> str:
        """Why the last decode step was launched kernel by kernel; empty if it was a replay."""
        return self._graphs.why_direct

    def new_cache(self, sizes: CacheSizes) -> TritonCache:
        """Return an empty cache."""
        assert self.program.plan is not None, "checked by `check_program`"
        return TritonCache(self.program.plan, self._launchers, sizes, self.device)

    def step(
        self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache, *, all_logits: bool = False
    ) -> Tensor:
        """Feed new tokens to a cache; see `Executable.step`."""
        assert isinstance(cache, TritonCache), "made by `new_cache`"
        is_decode = input_ids.shape[1] == 1
        with _current_device(self.device), torch.inference_mode():
            if is_decode and not is_watched():
                logits = self._graphs.decode(input_ids, inputs, cache)
                return logits if all_logits else logits[:, 0]
            return self._step_directly(input_ids, inputs, cache, all_logits)

    def _step_directly(
        self, input_ids: Tensor, inputs: StepInputs, cache: TritonCache, all_logits: bool
    ) -> Tensor:
        """Run a step of any kind, kernel by kernel, on tensors of its own."""
        is_folded, table = not is_watched(), cache.kernel_table(inputs.block_table)
        step = make_step(inputs, table, self.device, is_folded=is_folded)
        if step.num_new == 1:
            self._launchers.decoding.plan(step, inputs, table, cache.storages, cache.sizes)
        graph = self._graph if is_folded else self._watched_graph
        last = None if all_logits else step.counts.long() - 1
        inputs.check()
        cache.begin(step)
        logits = graph(input_ids.to(self.device), step.positions(), cache, last=last)
        cache.commit()
        return logits

    def _run_folded(self, input_ids: Tensor, positions: Tensor, cache: TritonCache) -> Tensor:
        """Run the graph within a step; logits `[B, S, vocab]`."""
        return self._graph(input_ids, positions, cache)

    def _fold_rotations(self) -> Program:
        """Return the program without the rotations that kernels do."""
        program = self.program.clone()
        names = self._kernels.folded_nodes
        for node in list(program.graph.nodes):
            if node.name in names:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
        return program


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels are launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
