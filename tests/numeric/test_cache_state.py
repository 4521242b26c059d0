"""The cache-state checker finds planted faults, each of which leaves most of a model right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cached import cached_program
from programs import llama_program
from session_faults import (
    after_commit,
    copy_all_pages,
    crop_and_remember,
    forget_a_token,
    leave_buffers,
    leave_rows,
    lose_a_byte,
    physical_positions,
    remember_positions,
    requantise,
    see_the_future,
    shift_one_scale,
    swap_pages,
    write_shared_pages,
)

from kvxform.errors import VerifyError
from kvxform.ir.program import Program
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session import Session
from kvxform.verify.cache_state import check_schedule, is_lossy
from kvxform.verify.probe import make_probe, run_source
from kvxform.verify.prober import Prober
from kvxform.verify.schedules import full_schedules
from kvxform.verify.tolerances import tolerance_for

INT4 = {"codec": "int", "bits": 4, "clip": 0.9}
LOSSY = {"key": INT4, "value": INT4}
WITH_REGIONS = {
    "key": {"codec": "int", "bits": 4, "axis": "channel", "group": 8, "zero": "float"},
    "value": INT4,
    "regions": {"sink": 2},
    "key_regions": {"recent": 16},
    "value_regions": {"recent": 5},
}
BLOCKS = {
    "key": {"codec": "int", "bits": 4, "axis": "channel", "group": 8, "zero": "float"},
    "value": INT4,
    "key_regions": {"recent": 32, "flush": "block"},
    "value_regions": {"recent": 0},
}
SALIENCY = {"codec": "saliency", "chunk": 16, "last": 0.1, "random": 0.4}
RANKED = {"key": SALIENCY, "value": SALIENCY, "regions": {"sink": 2}}
Plant = Callable[[Session], None]


def source_program(**model) -> Program:
    program = llama_program(**model)
    program.info = dataclasses.replace(program.info, context_length=None)
    return program


ROW_FAULTS: dict[str, tuple[Plant, str]] = {
    "rows are not moved": (leave_rows, "lengths"),
    "buffers are not moved": (leave_buffers, "logical cache"),
    "shared pages are written": (write_shared_pages, "bytes"),
    "pages are copied too soon": (copy_all_pages, "bytes"),
    "positions after a crop": (crop_and_remember, "K and V handed"),
}

FAULTS: dict[str, tuple[Plant, str]] = {
    "codes are encoded again": (requantise, "logical cache"),
    "two pages swapped": (swap_pages, "logical cache"),
    "one scale shifted": (shift_one_scale, "logical cache"),
    "positions by page": (physical_positions, "K and V handed"),
    "positions of the last owner": (remember_positions, "K and V handed"),
    "bytes": (lose_a_byte, "bytes"),
    "lengths": (forget_a_token, "lengths"),
    "scores": (see_the_future, "attention over the cache"),
}


def check_all(program: Program, quantised: Program, plant: Plant | None = None) -> set[str]:
    class Model(OptimizedModel):
        def new_session(self, *args, **options):
            session = super().new_session(*args, **options)
            if plant is not None and session.max_batch_size > 1:
                plant(session)
            return session

    prober = Prober(program, Model, quantised.plan)
    return {check.schedule for check in prober.check_full(quantised)}


@pytest.mark.parametrize("folded", [False, True], ids=["decoded", "folded"])
@pytest.mark.parametrize("options", [None, LOSSY, WITH_REGIONS], ids=["exact", "int4", "regions"])
@pytest.mark.parametrize(
    "page_size",
    [
        pytest.param(None, id="contiguous", marks=pytest.mark.slow),
        pytest.param(16, id="paged"),
    ],
)
def test_sound_caches_pass_every_schedule(options, page_size, folded):
    cached = cached_program(options, page_size, folded=folded and options is not None)
    assert is_lossy(cached.plan, torch.float64) == (options is not None)
    rewinds = set() if options is WITH_REGIONS else {"fork, crop and rewind"}
    assert check_all(source_program(), cached) == rewinds | {
        "prefill",
        "chunked prefill",
        "decode",
        "padded on both sides",
        "ragged batch",
        "page reuse after free",
        "batch reorder",
        "beam fork",
    }


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="f64", marks=pytest.mark.slow),
        pytest.param(torch.float32, id="f32"),
    ],
)
def test_planted_fault_is_found_and_named(name, dtype):
    plant, word = FAULTS[name]
    program = source_program(dtype=dtype)
    quantised = cached_program(LOSSY, 16, dtype=dtype)
    with pytest.raises(VerifyError, match=word) as caught:
        check_all(program, quantised, plant)
    assert caught.value.code == "KVX502"


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_planted_fault_of_rows_is_found_and_named(name):
    plant, word = ROW_FAULTS[name]
    with pytest.raises(VerifyError, match=word):
        check_all(source_program(), cached_program(BLOCKS, 16), plant)


def test_shared_pages_with_wrong_content_are_found_even_if_the_bytes_are_right():
    def plant(session: Session) -> None:
        session._cache.copy_pages = lambda old, new: None

    with pytest.raises(VerifyError, match="logical cache"):
        check_all(source_program(), cached_program(LOSSY, 16), plant)


def forget_scores(session: Session) -> None:
    """Scores of tokens that wait are lost between two steps."""

    def change() -> None:
        for site in session._cache._stores.values():
            for store in site._stores:
                store.scores.zero_()

    after_commit(session, change)


def test_scores_that_are_forgotten_between_steps_are_found():
    with pytest.raises(VerifyError, match="logical cache"):
        check_all(source_program(), cached_program(RANKED, 16), forget_scores)


@pytest.mark.slow
def test_a_cache_that_ranks_tokens_passes_and_cannot_be_cropped():
    names = check_all(source_program(), cached_program(RANKED, 16))
    assert "beam fork" in names
    assert "fork, crop and rewind" not in names


def test_a_window_is_wrapped_and_a_cache_that_cannot_be_cropped_is_not():
    sliding = {**LOSSY, "regions": {"recent": 6}}
    window = {"window": 9}
    cached = cached_program(sliding, 16, attention=window)
    names = check_all(source_program(attention=window), cached)
    assert "window wrap" in names
    assert "beam fork" in names
    assert "fork, crop and rewind" not in names


@pytest.mark.parametrize("name", ["two pages swapped", "positions by page", "scores"])
def test_planted_fault_of_an_exact_cache_is_found(name):
    plant, word = FAULTS[name]
    with pytest.raises(VerifyError, match=word):
        check_all(source_program(), cached_program(None, 16), plant)


def test_error_against_the_source_is_that_of_the_codec_in_the_first_layer():
    program, cached = (
        source_program(),
        cached_program({"key": {"codec": "int", "bits": 8}, "value": None}, 16),
    )
    sequences = make_probe(program.info.vocab_size, (40, 30, 20))
    source = run_source(program, sequences)
    schedule = full_schedules(sequences.lengths)[0]
    check = check_schedule(OptimizedModel(cached), schedule, sequences, source, torch.float64)
    check.require(tolerance_for(torch.float64), "test")
    assert 1e-3 < check.layers[0].key < 1e-2
    assert check.layers[0].value < 1e-12
    assert check.layers[1].value > 1e-5  # V of layer 1 sees the codes of layer 0
    assert check.state_error < 1e-12


def test_precision_is_lost_by_narrow_storage_too():
    exact = cached_program(None, 16)
    assert not is_lossy(exact.plan, torch.float64)
    assert not is_lossy(exact.plan, torch.float32)
    assert is_lossy(cached_program(None, 16, dtype=torch.float32).plan, torch.float64)
