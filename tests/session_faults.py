"""Faults of a runtime, planted in a session; each leaves most of what it does right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from kvxform.runtime.session import Session
from kvxform.runtime.state import SequenceState


def after_commit(session: Session, change: Callable[[], None]) -> None:
    """Run `change` after every step."""
    cache = session._cache
    commit = cache.commit

    def commit_and_change() -> None:
        commit()
        change()

    cache.commit = commit_and_change


def requantise(session: Session) -> None:
    """Every step decodes and encodes again what is already in the pages."""

    def change() -> None:
        for site in session._cache._stores.values():
            for store in site._stores:
                planes = {name: pool.transpose(1, 2) for name, pool in store.pools.items()}
                again = store._codec.encode(store._codec.decode(planes, torch.float32))
                for name, pool in store.pools.items():
                    pool.copy_(again[name].transpose(1, 2))

    after_commit(session, change)


def swap_pages(session: Session) -> None:
    """Two pages change places once they are full."""

    def change() -> None:
        if min(session.sequence_lengths(), default=0) == 0:
            pool = session._cache._stores[1]._stores[0].pools
            for plane in pool.values():
                plane[[1, 2]] = plane[[2, 1]]

    after_commit(session, change)


def shift_one_scale(session: Session) -> None:
    """One head of one layer has scales that are two per cent too large."""

    def change() -> None:
        scale = session._cache._stores[1]._stores[-1].pools["scale"]
        scale[:, :, -1] *= 1.02  # the last head of V

    after_commit(session, change)


def physical_positions(session: Session) -> None:
    """Positions follow pages instead of tokens: they are rounded down to whole pages."""
    executable = session._executable
    size = session._pool.page_size

    class Rounded:
        program = executable.program

        def step(self, ids, inputs, cache, **options):
            if ids.shape[1] == 1:
                rounded = [position // size * size for position in inputs.positions]
                inputs = dataclasses.replace(inputs, positions=rounded)
            return executable.step(ids, inputs, cache, **options)

    session._executable = Rounded()


def remember_positions(session: Session) -> None:
    """A row that is used again goes on counting where its last sequence ended."""
    free = session.free

    def free_and_remember(rows) -> None:
        ends = {row: session._rows[row].logical_length for row in rows}
        free(rows)
        for row, end in ends.items():
            session._rows[row] = SequenceState(logical_length=end, physical_length=0)

    session.free = free_and_remember
    session.sequence_lengths = lambda: tuple(
        s.physical_length for _, s in sorted(session._rows.items()) if s.physical_length
    )


def lose_a_byte(session: Session) -> None:
    held = session.cache_bytes
    session.cache_bytes = lambda: held() - 1


def forget_a_token(session: Session) -> None:
    lengths = session.sequence_lengths
    session.sequence_lengths = lambda: tuple(n - (n > 50) for n in lengths())


def see_the_future(session: Session) -> None:
    """Attention of one layer also scales its scores a little."""
    attend = session._cache.attend

    def scaled(layer, q, positions, scoring):
        return attend(layer, q * (1.01 if layer == 1 else 1.0), positions, scoring)

    session._cache.attend = scaled


def leave_rows(session: Session) -> None:
    """Rows stay where they are, unless they are forked."""
    reorder = session.reorder
    session.reorder = lambda order: None if len(set(order)) == len(order) > 1 else reorder(order)


def leave_buffers(session: Session) -> None:
    """Pages follow their rows, buffers of recent tokens do not."""
    session._cache.move_rows = lambda rows, sources: None


def write_shared_pages(session: Session) -> None:
    """Forked rows go on writing to the same pages."""
    session._pool._shared = lambda sequence, pages: []


def copy_all_pages(session: Session) -> None:
    """A row that writes gets copies of pages that it does not write to."""
    session._written = lambda before, after: set(range(-(-after // session._pool.page_size)))


def crop_and_remember(session: Session) -> None:
    """A cropped row goes on counting positions where it was."""
    crop = session.crop

    def crop_tokens(length, rows) -> None:
        ends = {row: session._rows[row].logical_length for row in rows}
        crop(length, rows)
        for row, end in ends.items():
            session._rows[row].logical_length = end

    session.crop = crop_tokens
