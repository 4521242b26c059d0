"""The asserts of `kvxform.testing`: what passes, what fails, and what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import apply, llama_program
from torch import nn

from kvxform.errors import KvxformError
from kvxform.ir.program import default_positions
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.runtime.model import OptimizedModel
from kvxform.testing import assert_cache_state, assert_equivalent, assert_graph_snapshot
from kvxform.testing.snapshots import snapshot_text

INT4 = {"codec": "int", "bits": 4}


def scaled(program, name, factor):
    """Return the program with one weight times `factor`."""
    weights = {**program.weights, name: program.weights[name] * factor}
    return dataclasses.replace(program, weights=weights)


def set_origin(program, text, start=1):
    """Let every node come from `text` with a number of its own for `{line}`."""
    for line, node in enumerate(n for n in program.graph.nodes if n.op != "output"):
        node.meta["origin"] = text.format(line=start + line)


class AsModule(nn.Module):
    """A program as somebody's model."""

    def __init__(self, program):
        super().__init__()
        self.inner = program.to_module()

    def forward(self, input_ids):
        return self.inner(input_ids, default_positions(input_ids))


class TestEquivalent:
    def test_a_rotated_program_is_the_same_model(self):
        program = llama_program()
        rotated, found = apply(RotateV(), program)
        assert found
        assert_equivalent(program, rotated)
        assert_equivalent(program, OptimizedModel(cached_program()))

    def test_a_near_miss_is_not(self):
        program = llama_program()
        other = scaled(program, "layers.1.attn.o.weight", 1 + 1e-7)
        with pytest.raises(AssertionError) as found:
            assert_equivalent(program, other)
        text = str(found.value)
        assert "of the largest logit; 1.00e-09 is allowed" in text
        assert "layer 1" in text, "where they part"
        assert_equivalent(program, other, rtol=1e-5)

    def test_modules_run_as_they_are(self):
        program = llama_program()
        assert_equivalent(AsModule(program), program)
        with pytest.raises(KvxformError, match="KVX822"):
            assert_equivalent(AsModule(program), AsModule(program))
        ids = torch.arange(6).view(2, 3)
        assert_equivalent(AsModule(program), AsModule(program), inputs=ids)

    def test_models_that_round_are_held_to_a_divergence(self):
        program, coarse = llama_program(), cached_program({"key": INT4, "value": INT4})
        assert_equivalent(program, coarse, max_kl=0.1)
        with pytest.raises(AssertionError, match=r"KL of B from A is .* 1\.00e-12 is allowed"):
            assert_equivalent(program, coarse, max_kl=1e-12)

    def test_logits_that_are_no_numbers_are_not_equal(self):
        broken = scaled(llama_program(layers=1), "norm.weight", float("nan"))
        for options in ({}, {"max_kl": 1.0}):
            with pytest.raises(AssertionError, match="nan"):
                assert_equivalent(llama_program(layers=1), broken, **options)


class TestSnapshot:
    def test_names_and_source_lines_make_no_difference(self, tmp_path):
        path = tmp_path / "graph.json"
        program = llama_program()
        set_origin(program, "moved (source.py:{line})")
        assert assert_graph_snapshot(program, path, update=True)
        program = llama_program(seed=5)  # other weights
        set_origin(program, "moved (source.py:{line})", start=77)
        assert snapshot_text(program) != path.read_text()
        assert not assert_graph_snapshot(program, path)

    def test_a_change_of_one_layer_is_named(self, tmp_path):
        path = tmp_path / "graph.json"
        program = cached_program({"key": INT4, "value": INT4}, layers=3)
        assert_graph_snapshot(program, path, update=True)
        site = program.plan.site(1)
        key = dataclasses.replace(site.key, codec={**site.key.codec, "bits": 8})
        program.plan = program.plan.replace_site(1, key=key)
        with pytest.raises(AssertionError, match=r"graph\.json differs") as found:
            assert_graph_snapshot(program, path)
        assert "layer 1" in str(found.value)
        assert "bits" in str(found.value)

    def test_layers_with_one_pattern_are_stored_once(self):
        sizes = []
        for layers in (2, 9):
            program = llama_program(layers=layers)
            set_origin(program, "linear (source.py:1)")  # equal in all layers, as in real models
            sizes.append(len(snapshot_text(program)))
        assert sizes[1] < 1.05 * sizes[0]

    def test_no_snapshot_and_no_json_are_told_apart(self, tmp_path):
        path = tmp_path / "graph.json"
        with pytest.raises(AssertionError, match=r"there is no snapshot graph\.json yet"):
            assert_graph_snapshot(llama_program(), path)
        path.write_text("{}")
        with pytest.raises(AssertionError, match=r"graph\.json is no snapshot"):
            assert_graph_snapshot(llama_program(), path)


class TestCacheState:
    def test_a_good_cache_passes_and_says_what_was_compared(self):
        program = cached_program({"key": INT4, "value": INT4})
        found = assert_cache_state(program, schedules=["prefill", "page-reuse"])
        assert {c.schedule for c in found.comparisons} >= {"prefill", "page reuse after free"}

    def test_a_wrong_cache_fails_with_schedule_and_place(self, monkeypatch):
        from kvxform.runtime.session import Session

        right = Session.sequence_lengths
        monkeypatch.setattr(Session, "sequence_lengths", lambda s: [n + 1 for n in right(s)])
        with pytest.raises(AssertionError, match=r"(?s)comparisons failed.*prefill: .*lengths"):
            assert_cache_state(cached_program(), schedules=["prefill"])

    def test_it_needs_a_cache_and_known_schedules(self):
        with pytest.raises(KvxformError, match="KVX401"):
            assert_cache_state(llama_program())
        with pytest.raises(KvxformError, match=r"KVX801.*'prefill'"):
            assert_cache_state(cached_program(), schedules=["prefil"])
