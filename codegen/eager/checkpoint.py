"""The eager lowering of the `checkpoint` layout: token ids, and K and V of the last tokens alone.

A step computes all other tokens anew, layer by layer, beside the new ones. So every step costs a
prefill of what has left the window, and holds for its time the residual stream of those tokens and
their K and V of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvxform.codegen.eager.layerwise import LayerKV, LayerwiseRunner, Pass, Result
from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.ir.execution import CacheSizes, LiveCache, StepInputs
from kvxform.ir.program import Program


@dataclass(frozen=True)
class Kept:
    """What is held of one row.

    Attributes:
        ids: All tokens, int64 `[T]`.
        hot: K and V by owner of the last tokens, the same number of them everywhere.
        length: How many these are.
    """

    ids: Tensor
    hot: dict[int, LayerKV] = field(default_factory=dict)
    length: int = 0

    def cut(self, tokens: int) -> Kept:
        """Return what is held of the first `tokens` tokens."""
        gone = len(self.ids) - tokens
        if gone <= 0:
            return self
        left = max(0, self.length - gone)
        hot = {owner: tuple(x[:, :, :left].clone() for x in kv) for owner, kv in self.hot.items()}
        return Kept(self.ids[:tokens].clone(), hot if left else {}, left)

    def bytes_held(self) -> int:
        """Return bytes of all tensors."""
        return self.ids.nbytes + sum(x.nbytes for kv in self.hot.values() for x in kv)


class CheckpointCache:
    """Rows of a session in the `checkpoint` layout; see `kvxform.ir.execution.LiveCache`.

    Attributes:
        peak_bytes: Most bytes that a step held for its time, beside the rows.
    """

    def __init__(self, executable: CheckpointExecutable) -> None:
        self._executable = executable
        self.rows: dict[int, Kept] = {}
        self.peak_bytes = 0
        self._known: tuple[Tensor, dict[int, LayerKV]] | None = None  # of the row asked for last

    def abort(self) -> None:
        """Do nothing: rows change when a step has ended."""

    def stored(
        self, layer: int, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row, computed anew; V may be all of K. Each `[Hk, length, D]`."""
        ids = self.rows[row].ids[:length]
        if self._known is None or not torch.equal(self._known[0], ids):
            self._known = ids, self._executable.compute(Kept(ids[:0]), ids, length).held
        found = self._known[1][self._executable.owner(layer)]
        return found[0][0], found[-1][0]

    def planes(
        self, layer: int, row: int, length: int, pages: Sequence[int]
    ) -> dict[str, dict[str, Tensor]]:
        """Return nothing: no token is encoded."""
        return {}

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Forget `rows`."""
        for row in rows:
            self.rows.pop(row, None)

    def crop(self, row: int, length: int) -> None:
        """Keep the first tokens of a row."""
        self.rows[row] = self.rows[row].cut(length)

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Do nothing: there are no pages."""

    def move_rows(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Let each of `rows` become what its source was before."""
        found = [self.rows[source] for source in sources]
        self.rows.update(zip(rows, found, strict=True))

    def copy(self, sizes: CacheSizes) -> CheckpointCache:
        """Return another cache that holds the same; nothing is written in place."""
        cache = CheckpointCache(self._executable)
        cache.rows = dict(self.rows)
        return cache

    def bytes_held(self, num_pages: int, num_rows: int) -> int:
        """Return bytes of what is held of all rows; `peak_bytes` says what steps add."""
        return sum(kept.bytes_held() for kept in self.rows.values())


class CheckpointExecutable:
    """A program in the `checkpoint` layout; see `kvxform.ir.execution.Executable`."""

    def __init__(self, program: Program) -> None:
        self._eager = EagerExecutable(program)  # checks the program
        self._runner = LayerwiseRunner(program)
        assert program.plan is not None, "it has a layout"
        self._plan = program.plan

    @property
    def program(self) -> Program:
        """What is run."""
        return self._eager.program

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._eager.device

    def owner(self, layer: int) -> int:
        """Return the layer whose K and V `layer` reads."""
        return self._plan.site(layer).owner

    def new_cache(self, sizes: CacheSizes) -> CheckpointCache:
        """Return an empty cache."""
        return CheckpointCache(self)

    def step(
        self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache, *, all_logits: bool = False
    ) -> Tensor:
        """Feed new tokens to a cache, row by row; see `Executable.step`."""
        assert isinstance(cache, CheckpointCache), "made by `new_cache`"
        inputs.check()
        input_ids = input_ids.to(self.device)
        changed, logits = {}, []
        for entry, (row, count) in enumerate(zip(inputs.rows, inputs.counts, strict=True)):
            old, new = cache.rows.get(row), input_ids[entry, :count]
            old = Kept(new[:0]) if old is None else old
            window = self._plan.layout.hot_window
            result = self.compute(old, new, window, all_logits=all_logits)
            ids = torch.cat([old.ids, new])
            hot, length = result.held if window else {}, min(window, len(ids))
            changed[row] = Kept(ids, hot, length)
            cache.peak_bytes = max(cache.peak_bytes, result.peak_bytes)
            logits.append(_padded(result.hidden[0], input_ids.shape[1] if all_logits else 1))
        cache.rows.update(changed)
        found = torch.stack(logits)
        return found if all_logits else found[:, 0]

    def compute(self, old: Kept, new: Tensor, window: int, *, all_logits: bool = False) -> Result:
        """Compute new tokens of a row, and with them those whose K and V are not held.

        Args:
            old: The row so far.
            new: Its next tokens, int64 `[n]`, n at least 1.
            window: How many of the last tokens to return K and V of.
            all_logits: Return the logits of all new tokens, not of the last one alone.
        """
        before, total = len(old.ids), len(old.ids) + len(new)
        gone = before - old.length
        positions = torch.cat([torch.arange(gone), torch.arange(before, total)]).to(self.device)
        ids = torch.cat([old.ids[:gone], new])
        task = Pass(ids[None], positions[None], old.hot, gone, total, window)
        return self._runner.run(task, gone if all_logits else len(ids) - 1)


def _padded(logits: Tensor, tokens: int) -> Tensor:
    """Return logits `[n, vocab]` with zeros behind them, `[tokens, vocab]`."""
    missing = tokens - logits.shape[0]
    return torch.nn.functional.pad(logits, (0, 0, 0, missing))
