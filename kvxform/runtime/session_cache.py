"""SessionCache: a session in the place of the cache of a transformers model.

transformers counts columns of a padded batch, a session counts the tokens of each row. The cache
remembers which columns were padding, and so turns the one into the other. Reordering, forking and
cropping act on the pages and buffers of the session.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from kvxform.errors import CacheFullError, KvxformError
from kvxform.runtime.inputs import check_ids
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session import Session


class SessionCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The `past_key_values` of `KvxformForCausalLM`.

    Args:
        model: The model whose session this is.
        max_batch_size: Rows to make room for at first.
        max_seq_len: Tokens to make room for at first; the session grows when that is not enough.

    Raises:
        CacheFullError: KVX703 if `max_seq_len` is more than the model allows.
    """

    def __init__(
        self, model: OptimizedModel, *, max_batch_size: int = 1, max_seq_len: int = 1
    ) -> None:
        super().__init__(layers=[])
        self._model, self._session = model, model.new_session(1, 1)
        self._real = torch.zeros(0, 0, dtype=torch.bool)  # [B, columns seen], false at padding
        self._make_room(max_batch_size, max_seq_len)

    @property
    def session(self) -> Session:
        """What holds the tokens."""
        return self._session

    def feed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Append tokens and return logits.

        Args:
            input_ids: Integer `[B, S]`, padded on either side.
            attention_mask: 0 and 1 for all columns, `[B, cached + S]`; None if all S are tokens.
            position_ids: `[B, S]` or `[1, S]`; must count the tokens of each row.
            last_only: Return logits of the last token of each row alone.

        Returns:
            Logits `[B, S, vocab]`, zero at padding, or `[B, 1, vocab]`.

        Raises:
            CacheFullError: KVX703 if a row becomes longer than the model allows.
            KvxformError: KVX704 for input that does not continue what is cached.
        """
        check_ids(input_ids, 2, self._model.program.info.vocab_size)
        new = self._new_columns(input_ids, attention_mask)
        self._check_positions(position_ids, new)
        lengths = self._lengths() + new.sum(1)
        self._make_room(len(new), int(lengths.max()))
        logits = self._run(input_ids, new, last_only)
        self._real = torch.cat([self._past(len(new)), new], 1)
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included; the same for every layer."""
        return self._real.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the longest sequence of the model, or -1 if it is unknown."""
        return self._model.program.info.context_length or -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    @property
    def batch_size(self) -> int:
        """Rows in use, or -1 before the first tokens."""
        return len(self._real) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have been cached."""
        return self._real.shape[1] > 0

    @property
    def is_compileable(self) -> bool:
        """False: page tables change from step to step."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works for every length."""
        return self._session.is_croppable

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: windows are masks here, all tokens stay cached."""
        return [False] * len(self)

    def __len__(self) -> int:
        """Return the number of cached layers."""
        return len(self._session.plan.sites)

    def __repr__(self) -> str:
        rows = list(self._session.sequence_lengths())
        return f"SessionCache(layers={len(self)}, tokens={rows}, bytes={self.nbytes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCache:
        twin = SessionCache(self._model)
        twin._session, twin._real = self._session.copy(), self._real.clone()
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the pages and buffers in use."""
        return self._session.cache_bytes()

    def reset(self) -> None:
        """Forget everything."""
        self._session.free()
        self._real = self._real.new_zeros(0, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i become what row `beam_idx[i]` was."""
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by `repeats` copies of it, which share pages."""
        self._reorder([row for row in range(len(self._real)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` (numbers or a mask) select."""
        self._reorder(torch.arange(len(self._real))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest columns.

        Args:
            tokens_to_remove: Minus the number of columns to drop. A positive number is the number
                of columns to keep, as before transformers 5.

        Raises:
            KvxformError: KVX705 if the plan has encoded what would have to be exact again.
        """
        columns = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else columns + tokens_to_remove
        if keep >= columns:
            return
        left = self._real[:, : max(keep, 0)]
        rows = self._session.rows
        self._session.crop([int(left[row].sum()) for row in rows], rows)
        self._real = left

    def activate_past_recording(self) -> None:
        """Accept that `crop` will be called.

        Raises:
            KvxformError: KVX705 if the plan does not allow it.
        """
        if not self.is_croppable:
            raise KvxformError(
                "KVX705",
                "assisted decoding needs a cache that can be cropped",
                where="huggingface",
                got="a plan that keeps recent tokens exact for a while",
                hint="use a recipe without recent tokens and groups of tokens, or no assistant",
            )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: tokens come in through `KvxformForCausalLM.forward` alone."""
        _refuse(
            "keys and values of single layers cannot be put into a compiled model's cache", None
        )

    def _reorder(self, order: list[int]) -> None:
        self._make_room(len(order), 1)
        self._session.reorder(order)
        self._real = self._real[order]

    def _past(self, batch_size: int) -> Tensor:
        return self._real if self.is_initialized else self._real.new_zeros(batch_size, 0)

    def _lengths(self) -> Tensor:
        return self._real.sum(1) if self.is_initialized else torch.zeros(1, dtype=torch.int64)

    def _new_columns(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return which of the new columns are tokens, bool `[B, S]`, checked against the past."""
        batch_size, width = input_ids.shape
        past = self._past(batch_size)
        if len(past) != batch_size:
            _refuse(f"the batch must have the {len(past)} rows of the cache", batch_size)
        if attention_mask is None:
            return torch.ones(batch_size, width, dtype=torch.bool)
        columns = past.shape[1] + width
        if attention_mask.shape != (batch_size, columns):
            rule = (
                f"attention_mask must have shape {[batch_size, columns]}, cached columns included"
            )
            _refuse(rule, list(attention_mask.shape))
        mask = attention_mask.cpu() != 0
        if not torch.equal(mask[:, : past.shape[1]], past):
            _refuse("attention_mask must not change where tokens are cached", None)
        return mask[:, past.shape[1] :]

    def _check_positions(self, position_ids: Tensor | None, new: Tensor) -> None:
        if position_ids is None:
            return
        expected = self._lengths()[:, None] + new.cumsum(1) - 1
        got = position_ids.cpu()
        if got.shape[-1] != new.shape[1] or bool((got != expected)[new].any()):
            _refuse("position_ids must count the tokens of each row, padding left out", None)

    def _make_room(self, rows: int, tokens: int) -> None:
        limit = self._model.program.info.context_length
        if limit is not None and tokens > limit:
            raise CacheFullError(
                "KVX703",
                f"prompt and new tokens must be within the model's {limit} tokens",
                where="huggingface",
                got=tokens,
                hint="shorten the prompt, or lower max_new_tokens",
            )
        session = self._session
        if rows <= session.max_batch_size and tokens <= session.max_seq_len:
            return
        longest = session.max_seq_len
        if tokens > longest:
            longest = max(tokens, 2 * longest) if self.is_initialized else tokens
            longest = longest if limit is None else min(longest, limit)
        session.resize(max_batch_size=max(rows, session.max_batch_size), max_seq_len=longest)

    def _run(self, input_ids: Tensor, new: Tensor, last_only: bool) -> Tensor:
        session, fed = self._session, new.any(1).nonzero()[:, 0].tolist()
        if new.shape[1] == 1 and session.rows == fed:
            return session.decode(input_ids[:, 0])[:, None]
        packed = PackedColumns.of(new[fed])
        ids = packed.pack(input_ids[fed])
        part = session.prefill(ids, packed.mask, rows=fed, all_logits=not last_only)
        part = part[:, None] if last_only else packed.unpack(part)
        if len(fed) == len(new):
            return part
        logits = part.new_zeros(len(new), *part.shape[1:])
        logits[fed] = part
        return logits


@dataclass(frozen=True)
class PackedColumns:
    """The tokens of each row moved to the left: how transformers sees masked columns, without them.

    Attributes:
        order: Columns of each row, tokens first, `[B, S]`.
        mask: Which packed columns are tokens, `[B, most tokens]`.
    """

    order: Tensor
    mask: Tensor

    @classmethod
    def of(cls, real: Tensor) -> PackedColumns:
        """Return the packing of rows whose tokens are where `real` `[B, S]` is true."""
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        counts = real.sum(1)
        return cls(order, torch.arange(int(counts.max())) < counts[:, None])

    def pack(self, input_ids: Tensor) -> Tensor:
        """Return ids `[B, most tokens]`."""
        order = self.order.to(input_ids.device)
        return input_ids.gather(1, order)[:, : self.mask.shape[1]]

    def unpack(self, logits: Tensor) -> Tensor:
        """Move `[B, most tokens, vocab]` back to the caller's columns, zero elsewhere."""
        batch_size, width = self.order.shape
        out = logits.new_zeros(batch_size, width, logits.shape[2])
        places = self.order.to(logits.device)[:, : self.mask.shape[1], None]
        return out.scatter_(1, places.expand_as(logits), logits)


def _refuse(rule: str, got: object) -> NoReturn:
    raise KvxformError("KVX704", rule, where="huggingface", got=got)
