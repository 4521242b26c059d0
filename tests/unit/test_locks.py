"""Locks: their text, what a digest shows and what it must not mind, and what a check says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import llama_program

from kvxform.errors import ArtifactError
from kvxform.ir.program import Program, default_positions
from kvxform.locks.checking import check_lock, compare_locks
from kvxform.locks.compact_json import WIDTH, compact_json
from kvxform.locks.contracts import PassContract, is_same_measure, mark
from kvxform.locks.digests import fixed_tokens, make_digest
from kvxform.locks.files import read_lock, write_lock
from kvxform.locks.making import make_lock
from kvxform.locks.records import Build, Lock, is_lock
from kvxform.locks.sketches import make_sketch
from kvxform.locks.widening import widen
from kvxform.recipe import bundled_recipes
from kvxform.runtime.model import OptimizedModel

ROOT = Path(__file__).resolve().parents[2]
INT4 = {"codec": "int", "bits": 4, "axis": "token"}
INT4_CACHE = {"key": INT4, "value": INT4}
F32 = torch.float32


@pytest.fixture(scope="module")
def program() -> Program:
    return cached_program(INT4_CACHE, dtype=F32)


@pytest.fixture(scope="module")
def lock(program) -> Lock:
    return make_lock(OptimizedModel(program))


def rules(result) -> set[str]:
    return {finding.rule for finding in result.findings if finding.severity != "note"}


def with_weight(program: Program, name: str, change) -> Program:
    changed = program.clone()
    changed.weights[name] = change(program.weights[name].clone())
    return changed


# The text


def test_text_is_canonical_and_comes_back(lock):
    named = dataclasses.replace(
        lock,
        build=Build("model.py:make_model", "kv4", verify="probe"),
        passes=(PassContract("fuse-norms", "exact", 5, "rounding"),),
    )
    text = named.to_text()
    assert Lock.from_text(text) == named
    assert Lock.from_text(text).to_text() == text
    assert max(map(len, text.splitlines())) <= 2 * WIDTH


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda data: data.update(kvxform_lock=2), "KVX612"),
        (lambda data: data.pop("digest"), "KVX611"),
        (lambda data: data.update(extra=1), "KVX611"),
        (lambda data: data["layers"].update(other="0" * 24), "KVX611"),
        (lambda data: data["graph"]["graph"]["patterns"][0].pop(), "KVX611"),
        (lambda data: data["digest"].update(greedy="none"), "KVX611"),
    ],
)
def test_a_lock_that_was_edited_is_refused(lock, edit, code):
    data = json.loads(lock.to_text())
    edit(data)
    with pytest.raises(ArtifactError, match=code):
        Lock.from_text(json.dumps(data), "x.lock")


@pytest.mark.parametrize("text", ["", "[]", "1", '{"kvxform_lock": 1}', "not json", "\x00"])
def test_what_is_no_lock_is_refused(text):
    with pytest.raises(ArtifactError, match="KVX611"):
        Lock.from_text(text)


def test_only_locks_are_replaced(lock, tmp_path):
    path = tmp_path / "new" / "kvxform.lock"
    size = write_lock(lock, path)
    assert (size, is_lock(path)) == (path.stat().st_size, True)
    assert read_lock(path) == lock
    write_lock(lock, path)
    other = tmp_path / "poetry.lock"
    other.write_text("[[package]]\n")
    assert not is_lock(other)
    with pytest.raises(ArtifactError, match="KVX610"):
        write_lock(lock, other)
    with pytest.raises(ArtifactError, match="KVX610"):
        read_lock(tmp_path / "none.lock")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@settings(max_examples=50, deadline=None)
@given(_JSON)
def test_compact_json_is_json(data):
    assert json.loads(compact_json(data)) == data


def test_compact_json_puts_short_things_on_one_line():
    assert compact_json({"a": [1, 2], "b": {}}) == '{"a": [1, 2], "b": {}}\n'
    long = compact_json({"numbers": list(range(100)), "end": 1})
    assert max(map(len, long.splitlines())) <= WIDTH + 1
    assert len(long.splitlines()) < 12


# Digests


def test_a_wide_program_is_that_program_in_float64():
    narrow, exact = (llama_program(dtype=dtype) for dtype in (F32, torch.float64))
    exact.weights = {name: weight.float().double() for name, weight in exact.weights.items()}
    wide = widen(narrow)
    ids, _ = fixed_tokens(narrow.info.vocab_size, (9,))
    positions = default_positions(ids)
    got, want = (p.to_module()(ids, positions) for p in (wide, exact))
    assert (got.dtype, wide.dtype) == (torch.float64, torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    assert not torch.equal(got, narrow.to_module()(ids, positions).double())
    assert {w.dtype for w in narrow.weights.values()} == {F32}


def test_tied_weights_stay_tied():
    narrow = llama_program(dtype=F32, tied=True)
    groups = {id(w): 0 for w in narrow.weights.values()}
    assert len({id(w) for w in widen(narrow).weights.values()}) == len(groups)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0))
def test_a_sketch_estimates_the_relative_distance(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 40, 2, 32, generator=generator, dtype=torch.float64)
    y = x + size * noise
    one, two = (make_sketch(t, "x", 64, 1e-6) for t in (x, y))
    expected = float((x - y).norm() / x.norm())
    assert one.distance(two, 1e-6, 1e-6) == pytest.approx(expected, rel=0.4)
    assert one.distance(one, 1e-6, 1e-6) == 0


def test_sketches_of_zero_and_of_other_shapes():
    zero, one = (make_sketch(f(5, 4, dtype=torch.float64), "x", 4, 1e-3) for f in ZEROS_AND_ONES)
    other = make_sketch(torch.ones(5, 2, dtype=torch.float64), "x", 4, 1e-3)
    assert zero.distance(zero, 1e-3, 1e-3) == 0
    assert zero.distance(one, 1e-3, 1e-3) == math.inf
    assert one.distance(other, 1e-3, 1e-3) is None


ZEROS_AND_ONES = (torch.zeros, torch.ones)


def test_fixed_tokens_never_change():
    ids, mask = fixed_tokens(1000, (3, 2))
    assert ids.tolist() == [[366, 573, 145], [127, 510, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_digest_is_long_enough_to_encode_something():
    late = {**INT4_CACHE, "regions": {"sink": 4, "recent": 60}}
    assert make_digest(cached_program(late, dtype=F32)).lengths[0] > 64
    assert make_digest(cached_program(None, dtype=F32)).kind == "exact"


def test_a_digest_is_of_what_the_model_computes(program, lock):
    ids, mask = fixed_tokens(program.info.vocab_size, lock.digest.lengths)
    logits = OptimizedModel(program)(ids, mask)[mask.bool()]
    assert lock.digest.greedy == tuple(logits.argmax(-1).tolist())
    assert lock.digest.logits.rms == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-3)


def test_a_program_without_a_cache_has_logits_alone():
    program = llama_program(dtype=F32)
    digest = make_digest(program)
    assert digest.layers == ()
    ids, mask = fixed_tokens(program.info.vocab_size, digest.lengths)
    logits = program.to_module()(ids, default_positions(ids))[mask.bool()]
    assert list(digest.greedy) == logits.argmax(-1).tolist()


# Checks


def test_the_same_model_is_the_same(lock, program):
    result = check_lock(lock, OptimizedModel(program))
    assert (result.exit_code, rules(result)) == (0, set())
    assert result.numeric is not None
    assert {layer.key for layer in result.numeric.layers} == {0.0}


def test_rounding_of_weights_is_no_change(program):
    lock = make_lock(OptimizedModel(cached_program(None, dtype=F32)))
    nudged = cached_program(None, dtype=F32)
    for name, weight in nudged.weights.items():
        nudged.weights[name] = weight * (1 + 2e-7)
    assert check_lock(lock, OptimizedModel(nudged)).exit_code == 0


def test_a_changed_weight_is_seen_from_its_layer_on(lock, program):
    (site, *_) = (s for s in program.sites if s.layer == 1)
    changed = with_weight(program, site.k.weight, lambda w: w.roll(1, 0))
    result = check_lock(lock, OptimizedModel(changed))
    assert result.exit_code == 1
    assert {"digest-cache", "digest-logits"} <= rules(result)
    assert result.numeric is not None
    assert result.numeric.first_layer == 1
    (found,) = (f for f in result.findings if f.rule == "digest-cache")
    assert found.layers == (1,)


def test_a_changed_plan_is_seen(lock):
    three = {"key": {**INT4, "bits": 3}, "value": INT4}
    result = check_lock(lock, OptimizedModel(cached_program(three, dtype=F32)))
    assert {(c.layer, c.field) for c in result.plan} == {(0, "codec.bits"), (1, "codec.bits")}
    assert result.exit_code == 1


def test_other_layers_and_other_vocabularies_compare(lock):
    more = OptimizedModel(cached_program(INT4_CACHE, dtype=F32, layers=3))
    assert check_lock(lock, more).exit_code == 1
    assert check_lock(make_lock(more), more).exit_code == 0


def test_contracts(lock):
    def with_passes(*found: PassContract) -> Lock:
        return dataclasses.replace(lock, passes=found)

    rotate = PassContract("rotate-v", "exact", 2, "rounding")
    lossy = PassContract("quantize-kv", "approximate", 2, "1e-02")
    before = with_passes(rotate, lossy)
    near = dataclasses.replace(lossy, measured="2e-02")
    assert rules(compare_locks(before, with_passes(rotate, near))) == set()
    worse = dataclasses.replace(lossy, measured="1e-01")
    result = compare_locks(before, with_passes(rotate, worse))
    assert rules(result) == {"contract-measured"}
    assert "KL about 0.01 -> KL about 0.1" in result.findings[-1].message
    better = compare_locks(with_passes(rotate, worse), before)
    assert (better.exit_code, better.findings[-1].severity) == (0, "note")
    fewer = dataclasses.replace(rotate, matched=1)
    assert rules(compare_locks(before, with_passes(fewer, lossy))) == {"contract-passes"}
    assert rules(compare_locks(before, with_passes(lossy))) == {"recipe"}
    blocks = dataclasses.replace(rotate, options={"block": 32})
    result = compare_locks(before, with_passes(blocks, lossy))
    assert result.findings[0].message == "recipe: rotate-v block default -> 32"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012, "1e-02"), (0.018, "2e-02"), (0.08, "1e-01"), (3, "2e+00")],
)
def test_marks_are_1_2_5(value, text):
    assert mark(value) == text


def test_measures_that_may_be_the_same():
    assert is_same_measure("1e-02", "2e-02")
    assert not is_same_measure("1e-02", "5e-02")
    assert not is_same_measure("0", "1e-02")
    assert not is_same_measure("rounding", "1e-02")
    assert is_same_measure("not measured", "1e-02")


# Our own locks


def test_every_bundled_recipe_is_locked():
    locked = {path.stem.partition("-")[2] for path in (ROOT / ".ci" / "locks").glob("*.lock")}
    assert locked == set(bundled_recipes())
