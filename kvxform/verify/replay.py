"""Replay: carries out the actions of a schedule on a session, and keeps account of them.

What every row has seen, what its logits were, and which pages rows share follows from the schedule
alone; the checker compares the session with that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvxform.ir.plan import CachePlan
from kvxform.verify.probe import Probe
from kvxform.verify.protocols import ModelLike, SessionLike
from kvxform.verify.schedules import Action, Crop, Decode, Free, Prefill, Reorder
from kvxform.verify.shadow import Shadow
from kvxform.verify.sharing import PageLedger

EXTRA_COLUMNS = 2  # of padding on each side of the longest row, where both sides are padded


class Replay:
    """A session, its shadow, and which tokens every row has seen.

    Args:
        model: The cached model.
        sequences: Token ids that schedules feed.

    Attributes:
        rows: Sequence and tokens seen of each live row.
        logits: What came out, `[vocab]`, by sequence and position.
    """

    def __init__(self, model: ModelLike, sequences: Probe) -> None:
        plan = model.plan
        assert plan is not None, "the model has a cache"
        self.plan: CachePlan = plan
        self.sequences = sequences
        self.max_seq_len = sequences.input_ids.shape[1]
        self.session: SessionLike = model.new_session(
            max_batch_size=len(sequences.lengths), max_seq_len=self.max_seq_len
        )
        self.shadow = Shadow(model.program)
        self.ledger = PageLedger(plan, plan.page_size(self.max_seq_len))
        self.rows: dict[int, tuple[int, int]] = {}
        self.logits: dict[tuple[int, int], Tensor] = {}

    def act(self, action: Action) -> None:
        """Carry out one action."""
        if isinstance(action, Prefill):
            self._prefill(action)
        elif isinstance(action, Decode):
            for _ in range(action.steps):
                self._decode()
        elif isinstance(action, Free):
            self.session.free(action.rows)
            for row in action.rows:
                self._keep({r: r for r in self.rows if r != row})
        elif isinstance(action, Reorder):
            self.session.reorder(action.order)
            self._keep(dict(enumerate(action.order)))
            self._rename(action.sequences or {})
        elif isinstance(action, Crop):
            self.session.crop(list(action.tokens.values()), list(action.tokens))
            for row, tokens in action.tokens.items():
                self.shadow.crop(row, tokens)
                self.ledger.crop(row, tokens)
                self.rows[row] = (self.rows[row][0], tokens)
            self._rename(action.sequences or {})

    def expected_bytes(self) -> int:
        """Return bytes that the session must hold: those of the plan, less shared pages."""
        lengths = [seen for _, seen in self.rows.values()]
        saved = self.ledger.saved() * self.plan.page_bytes(self.ledger.page_size)
        return self.plan.bytes_at(lengths, self.max_seq_len) - saved

    def _keep(self, sources: dict[int, int]) -> None:
        """Let each row become what its source was; all others are gone."""
        self.rows = {row: self.rows[source] for row, source in sources.items()}
        self.shadow.reorder(sources)
        self.ledger.reorder(sources)

    def _rename(self, sequences: Mapping[int, int]) -> None:
        """Let rows go on as other sequences, which begin with the same tokens."""
        for row, sequence in sequences.items():
            old, seen = self.rows[row]
            ids = self.sequences.input_ids
            assert torch.equal(ids[old, :seen], ids[sequence, :seen]), "they begin alike"
            self.rows[row] = (sequence, seen)

    def _prefill(self, action: Prefill) -> None:
        for row, sequence in (action.sequences or {}).items():
            self.rows[row] = (sequence, 0)
        rows, counts = list(action.tokens), list(action.tokens.values())
        longest = max(counts)
        width = longest + (2 * EXTRA_COLUMNS if action.padding == "both" else 0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        first = [_first_column(action, count, width) for count in counts]
        for entry, (row, count) in enumerate(action.tokens.items()):
            sequence, seen = self.rows[row]
            columns = slice(first[entry], first[entry] + count)
            ids[entry, columns] = self.sequences.input_ids[sequence, seen : seen + count]
            mask[entry, columns] = 1
        chunk = min(action.chunk_size or longest, self.plan.max_step_tokens or longest)
        for start in range(0, longest, chunk):
            fed = [
                (r, min(n - start, chunk)) for r, n in zip(rows, counts, strict=True) if n > start
            ]
            self.shadow.expect(fed)
        logits = self.session.prefill(
            ids, mask, rows=rows, chunk_size=action.chunk_size, all_logits=action.all_logits
        )
        for entry, (row, count) in enumerate(action.tokens.items()):
            sequence, seen = self.rows[row]
            self.rows[row] = (sequence, seen + count)
            self.ledger.append(row, seen, seen + count)
            if action.all_logits:
                for i in range(count):
                    self.logits[sequence, seen + i] = logits[entry, first[entry] + i]
            else:
                self.logits[sequence, seen + count - 1] = logits[entry]

    def _decode(self) -> None:
        rows = sorted(self.rows)
        tokens = [int(self.sequences.input_ids[self.rows[row]]) for row in rows]
        self.shadow.expect([(row, 1) for row in rows])
        logits = self.session.decode(torch.tensor(tokens))
        for entry, row in enumerate(rows):
            sequence, seen = self.rows[row]
            self.logits[sequence, seen] = logits[entry]
            self.rows[row] = (sequence, seen + 1)
            self.ledger.append(row, seen, seen + 1)


def _first_column(action: Prefill, count: int, width: int) -> int:
    """Return the column of the first of `count` tokens in a batch of `width` columns."""
    if action.padding == "both":
        return (width - count) // 2
    return width - count if action.padding == "left" else 0
