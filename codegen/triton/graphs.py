"""Decode steps from CUDA graphs: recorded once per shape, then replayed with other numbers.

A shape is a number of rows, and a power of two that the longest one does not exceed. The first step
of a shape is launched kernel by kernel, which compiles and tunes what it needs. The second is
recorded. What a step needs from the host is one copy: its lengths, and its pages when they have
changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvxform.codegen.triton.cache import TritonCache
from kvxform.codegen.triton.decoding import Decoding
from kvxform.codegen.triton.kernels import LEAST_BUCKET
from kvxform.codegen.triton.step import FIELDS, KernelStep, pack_numbers
from kvxform.ir.execution import StepInputs

Forward = Callable[[Tensor, Tensor, TritonCache], Tensor]  # ids, positions, cache -> logits


@dataclass(eq=False)
class StaticStep:
    """Inputs of a decode step at fixed addresses.

    Attributes:
        batch_size: Entries, B.
        max_pages: Columns of the block table.
        device: Where the cache lives.
        input_ids: int64 `[B, 1]`.
    """

    batch_size: int
    max_pages: int
    device: torch.device
    input_ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        on_cuda = self.device.type == "cuda"
        self._table_start = len(FIELDS) * self.batch_size
        size = self._table_start + self.batch_size * self.max_pages
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_cuda)
        self._numbers = torch.zeros(size, dtype=torch.int32, device=self.device)
        self.input_ids = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.device)
        self._table: Tensor | None = None
        self._copied = torch.cuda.Event() if on_cuda else None

    def view(self, total: int) -> KernelStep:
        """Return the tensors as a step whose longest row has about `total` tokens."""
        numbers = self._numbers[: self._table_start].view(len(FIELDS), -1)
        table = self._numbers[self._table_start :].view(self.batch_size, -1)
        return KernelStep.unpack(numbers, table, num_new=1, total=total)

    def fill(self, input_ids: Tensor, inputs: StepInputs, table: Tensor) -> None:
        """Set the tensors for a step; `table` has pages as kernels count them, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()  # the host buffer is free again
        size = self._table_start
        self._host[:size] = pack_numbers(inputs).flatten()
        if self._table is None or not torch.equal(self._table, table):
            pages = self._host[size:].view(self.batch_size, -1)
            pages.zero_()[:, : table.shape[1]] = table
            self._table, size = table, self._host.shape[0]
        self._numbers[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.input_ids.copy_(input_ids, non_blocking=True)


@dataclass(eq=False)
class Recording:
    """A recorded decode step; belongs to one cache.

    Attributes:
        step: Its inputs.
        tokens: Longest sequence it is tuned for.
        is_warm: A step of this shape has run, so all that it needs has been compiled.
        graph: The recording, or None before the second step.
        logits: What it writes, `[B, 1, vocab]`.
    """

    step: StaticStep
    tokens: int
    is_warm: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None

    def replay(self) -> Tensor:
        """Run the recorded step; returns logits of its own."""
        assert self.graph is not None, "recorded"
        assert self.logits is not None, "set with the graph"
        self.graph.replay()
        return self.logits.clone()


class DecodeGraphs:
    """Runs decode steps of the caches of one executable.

    Args:
        forward: Runs the graph of the program within a step.
        decoding: Plans the launches of attention.
        device: Where it runs.

    Attributes:
        why_direct: Why the last step was not a replay; empty if it was one.
    """

    def __init__(self, forward: Forward, decoding: Decoding, device: torch.device) -> None:
        self._forward, self._decoding, self._device = forward, decoding, device
        self._refusal = "" if device.type == "cuda" else "graphs need a CUDA device"
        self.why_direct = self._refusal

    def decode(self, input_ids: Tensor, inputs: StepInputs, cache: TritonCache) -> Tensor:
        """Feed one token to each row; returns logits `[B, 1, vocab]`."""
        batch_size, tokens = len(inputs.rows), _round_up(max(inputs.ends))
        recording = cache.recordings.get((batch_size, tokens))
        if recording is None:
            static = StaticStep(batch_size, cache.max_pages, self._device)
            recording = cache.recordings[batch_size, tokens] = Recording(static, tokens)
        table = cache.kernel_table(inputs.block_table)
        recording.step.fill(input_ids, inputs, table)
        step = recording.step.view(tokens)
        self._decoding.plan(step, inputs, table, cache.storages, cache.sizes)
        inputs.check()
        if not recording.is_warm:
            return self._launch(recording, inputs, cache, "the first step of this shape")
        if self._refusal:
            return self._launch(recording, inputs, cache, self._refusal)
        if recording.graph is None and not self._record(recording, cache):
            return self._launch(recording, inputs, cache, self._refusal)
        self.why_direct = ""
        return recording.replay()

    def _launch(
        self, recording: Recording, inputs: StepInputs, cache: TritonCache, why: str
    ) -> Tensor:
        """Run the step kernel by kernel."""
        self.why_direct = self._refusal or why
        step = dataclasses.replace(recording.step.view(recording.tokens), host=inputs)
        logits = self._run(recording, step, cache)
        recording.is_warm = True
        return logits

    def _run(self, recording: Recording, step: KernelStep, cache: TritonCache) -> Tensor:
        cache.begin(step)
        logits = self._forward(recording.step.input_ids, step.positions(), cache)
        cache.commit()
        return logits

    def _record(self, recording: Recording, cache: TritonCache) -> bool:
        """Record the step without running it; return False, and why, if it cannot be."""
        graph = torch.cuda.CUDAGraph()
        if cache.graph_pool is None:
            cache.graph_pool = torch.cuda.graph_pool_handle()
        step = recording.step.view(recording.tokens)
        try:
            with torch.cuda.graph(graph, pool=cache.graph_pool):
                recording.logits = self._run(recording, step, cache)
        except RuntimeError as error:  # the graph of the model has a call that waits for the device
            cache.abort()
            self._refusal = f"the step cannot be recorded: {str(error).splitlines()[0]}"
            return False
        recording.graph = graph
        return True


def _round_up(tokens: int) -> int:
    """Return the power of two that stands for sequences of so many tokens."""
    return max(LEAST_BUCKET, 1 << (tokens - 1).bit_length())
