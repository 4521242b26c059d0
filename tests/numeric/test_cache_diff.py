"""Two caches in lockstep: each planted fault shows its own symptom, in its own layer alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st
from session_faults import (
    after_commit,
    lose_a_byte,
    physical_positions,
    remember_positions,
    requantise,
    see_the_future,
    shift_one_scale,
    swap_pages,
)

import kvxform.ir.ops as kvx
from kvxform.diffing.caches import cache_lengths, compare_caches, comparison_schedule
from kvxform.diffing.input_faults import explain_inputs
from kvxform.diffing.symptoms import CacheDiff
from kvxform.ir.program import Program
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session import Session
from kvxform.verify.probe import make_probe

INT4 = {"codec": "int", "bits": 4, "clip": 0.9}
OPTIONS = {"key": INT4, "value": INT4, "regions": {"sink": 2, "dtype": "float32"}}
FLOAT32 = {"dtype": torch.float32}


def model(plant: Any = None, options: Any = OPTIONS, page: int | None = 16, **sizes: Any) -> Any:
    """Return a model whose sessions have a fault."""

    class Faulty(OptimizedModel):
        def new_session(self, *args: Any, **keys: Any) -> Session:
            session = super().new_session(*args, **keys)
            if plant is not None:
                plant(session)
            return session

    return Faulty(
        usual()
        if (options, page, sizes) == (OPTIONS, 16, {})
        else cached_program(options, page, **{**FLOAT32, **sizes})
    )


@functools.cache
def usual() -> Program:
    return cached_program(OPTIONS, 16, **FLOAT32)


def compare(a: Any, b: Any) -> CacheDiff:
    vocab = a.program.info.vocab_size
    return compare_caches(a, b, make_probe(vocab, cache_lengths(a, b)))


def edited(change: Any, **sizes: Any) -> Any:
    """Return a model of which one attention has other options."""
    program = cached_program(OPTIONS, 16, **FLOAT32, **sizes) if sizes else usual().clone()
    change(program)
    return OptimizedModel(program)


class Encoder:
    """A codec that spoils a plane of what it encodes."""

    def __init__(self, codec: Any, plane: str, change: Any) -> None:
        self._codec, self._plane, self._change = codec, plane, change

    def encode(self, x: Any) -> Any:
        planes = dict(self._codec.encode(x))
        planes[self._plane] = self._change(planes[self._plane])
        return planes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


def spoil(plane: str, change: Any) -> Any:
    def plant(session: Session) -> None:
        store = session._cache._stores[1]._stores[-1]
        store._codec = Encoder(store._codec, plane, change)

    return plant


def forget_scale_on_reading(session: Session) -> None:
    store = session._cache._stores[1]._stores[-1]
    decode, codec = store._codec.decode, store._codec

    class Reader:
        def decode(self, planes: Any, dtype: Any) -> Any:
            return 0.5 * decode(planes, dtype)

        def __getattr__(self, name: str) -> Any:
            return getattr(codec, name)

    store._codec = Reader()


def lose_sink(session: Session) -> None:
    def change() -> None:
        for store in session._cache._stores[1]._stores:
            store.sink.zero_()

    after_commit(session, change)


FAULTS: dict[str, tuple[Any, str, str]] = {
    "codes are encoded again": (requantise, "rewritten", "codes"),
    "two pages swapped": (swap_pages, "page-order", "page 0 of row 0 holds page 1 of row 0"),
    "one scale grows in every step": (shift_one_scale, "rewritten", "scale"),
    "scale of 1": (spoil("scale", torch.ones_like), "plane-scaled", "every value is 1"),
    "scale doubled": (spoil("scale", lambda x: 2 * x), "plane-scaled", "times 2"),
    "zero shifted": (spoil("zero", lambda x: x + 3), "plane-shifted", "shifted by 3"),
    "codes of other values": (spoil("codes", lambda x: x ^ 1), "codes", "of codes differ"),
    "half of every value read": (forget_scale_on_reading, "decoded", "tokens of row"),
    "sink lost": (lose_sink, "sink", "first 2 tokens"),
    "scores": (see_the_future, "reads", "from position"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_one_layer_is_found_there_and_nowhere_else(name):
    plant, kind, words = FAULTS[name]
    found = compare(model(), model(plant)).symptoms
    layers = {0, 1} if plant is requantise else {1}
    assert {s.layer for s in found} == layers
    assert {s.kind for s in found} == {kind}
    assert all(words in s.what for s in found)


@pytest.mark.parametrize(
    ("plant", "words", "rows"),
    [(physical_positions, "off by -", (0, 1)), (remember_positions, "off by +", (0,))],
)
def test_wrong_positions_are_told_and_no_wrong_keys(plant, words, rows):
    found = compare(model(), model(plant)).symptoms
    assert {s.kind for s in found} == {"positions"}
    assert {s.layer for s in found} == {0, 1}
    assert all(words in s.what and s.rows == rows for s in found)


def test_positions_of_padded_rows_alone_are_told_apart():
    def count_padding(session: Session) -> None:
        step = session._executable.step

        class Physical:
            program = session._executable.program

            def step(self, ids: Any, inputs: Any, cache: Any, **options: Any) -> Any:
                pads = [ids.shape[1] - n for n in inputs.counts]
                moved = [p + n for p, n in zip(inputs.positions, pads, strict=True)]
                return step(ids, dataclasses.replace(inputs, positions=moved), cache, **options)

        session._executable = Physical()

    found = compare(model(), model(count_padding)).symptoms
    assert {s.kind for s in found} == {"positions"}
    assert all(s.padded_only and s.rows == (1,) for s in found)


def test_bytes_that_are_not_those_of_the_plan_are_a_complaint_of_that_side():
    found = compare(model(lose_a_byte), model())
    assert found.symptoms == ()
    assert all(line.startswith("A: the cache must hold") for line in found.complaints)
    assert found.complaints


def test_window_off_by_one_is_an_option_of_one_attention():
    def narrow(program: Any) -> None:
        node = program.attention_node(1)
        node.kwargs = {**node.kwargs, "window": 8}

    found = compare(
        edited(lambda _: None, attention={"window": 9}), edited(narrow, attention={"window": 9})
    ).symptoms
    assert [(s.kind, s.layer, s.what) for s in found] == [("scoring", 1, "window 9 -> 8")]


def test_other_frequencies_turn_keys_and_queries_by_other_angles():
    def turn(program: Any) -> None:
        node = list(program.calls(kvx.ROPE))[-1]  # of the keys of the last layer
        name = node.args[2].target
        program.weights["other"] = program.weights[name] * 1.1
        with program.graph.inserting_before(node):
            other = program.graph.get_attr("other")
        other.meta = dict(node.args[2].meta)
        node.update_arg(2, other)

    found = compare(edited(lambda _: None), edited(turn)).symptoms
    assert {(s.kind, s.layer, s.what) for s in found} == {("inputs", 1, "turned by other angles")}


def test_a_layer_that_reads_the_cache_of_another_one_is_named():
    def share(program: Any) -> None:
        program.plan = program.plan.replace_site(1, owner=0)

    a, b = edited(lambda _: None), edited(lambda _: None)
    share(b.program)
    with torch.inference_mode():
        append = b.program.append_node(1)
    assert append is not None
    for node in [n for n in b.program.graph.nodes if n is append]:
        node.replace_all_uses_with(b.program.append_node(0))
        b.program.graph.erase_node(node)
    found = compare(a, OptimizedModel(b.program)).symptoms
    assert [(s.kind, s.layer, s.value) for s in found] == [("owner", 1, 0.0)]


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["exact", "int4"])
def test_equal_models_show_nothing_whatever_their_pages(options):
    found = compare(model(options=options), model(options=options, page=None))
    assert found.symptoms == () == found.complaints
    assert all(diff.key == diff.value == 0 for diff in found.layers)
    assert all(diff.codes == (None if options is None else 0) for diff in found.layers)


def test_another_codec_has_an_error_in_every_layer_and_no_codes():
    other = {"key": {"codec": "int", "bits": 2}, "value": INT4}
    found = compare(model(options=OPTIONS), model(options=other))
    assert all(0.01 < diff.key < 1 for diff in found.layers)
    first = found.layers[0]
    assert first.value < 0.2  # of the sink alone, which one side has encoded


def test_layers_that_one_side_lacks_are_left_out_and_pairs_are_taken():
    a, b = model(layers=3), model(layers=2)
    probe = make_probe(a.program.info.vocab_size, cache_lengths(a, b))
    assert [diff.layer for diff in compare_caches(a, b, probe).layers] == [0, 1]
    moved = compare_caches(a, b, probe, pairs=[(0, 0), (2, 1)])
    assert [diff.layer for diff in moved.layers] == [0, 2]


def test_programs_without_a_cache_have_nothing_to_compare():
    from programs import llama_program

    plain = OptimizedModel(llama_program(**FLOAT32))
    probe = make_probe(plain.program.info.vocab_size, (8, 8, 8))
    assert compare_caches(plain, model(), probe) == CacheDiff()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(5, 60), min_size=2, max_size=5))
def test_the_schedule_feeds_every_sequence_within_its_length(lengths):
    seen = dict.fromkeys(range(len(lengths)), 0)
    rows: dict[int, int] = {}
    for action in comparison_schedule(lengths).actions:
        if hasattr(action, "tokens"):
            rows |= action.sequences or {}
            for row, count in action.tokens.items():
                assert count >= 1
                seen[rows[row]] += count
        elif hasattr(action, "steps"):
            for row in rows:
                seen[rows[row]] += action.steps
        elif hasattr(action, "order"):
            rows = {i: rows[source] for i, source in enumerate(action.order)}
        else:
            rows = {row: s for row, s in rows.items() if row not in action.rows}
    assert all(seen[i] <= n for i, n in enumerate(lengths))
    assert [seen[i] for i in range(1, len(lengths))] == lengths[1:]


def test_other_heads_and_factors_of_what_is_handed_in_are_told():
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert explain_inputs(x, x[:, [2, 0, 1]], "value", 1e-6).startswith("heads 2, 0, 1 in")
    assert explain_inputs(x, -0.5 * x, "value", 1e-6) == "times -0.5"
    assert explain_inputs(x, x + 1, "value", 1e-6) == ""
