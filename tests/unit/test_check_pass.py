"""`check_pass`: every promise is checked, and a pass that breaks one is told which and where."""

from __future__ import annotations

from dataclasses import dataclass

import promise_breakers as breakers
import pytest
import torch
from promise_breakers import DoubleValues

from kvxform.errors import PassError, RecipeError
from kvxform.pass_base import PASSES, NoMatch
from kvxform.testing import check_pass, fuzz_pass, llama_program
from kvxform.testing import programs as testing
from kvxform.testing.examples import draw_examples, prerequisites
from kvxform.testing.fingerprint import digest

BREAKERS = {
    breakers.ImpureMatch(): ("purity", "`match` changed the touched"),
    breakers.WriteInPlace(): ("purity", "changed the weight layers.0.attn.v.weight"),
    breakers.WrongType(): ("validity", "says f16"),
    breakers.NoMeta(): ("validity", "KVX215"),
    breakers.NoProvenance(): ("provenance", "mul_scalar is new"),
    breakers.RandomResult(): ("determinism", "another result the second time"),
    breakers.NeverDone(): ("idempotence", "matches 1 places again (layers 0)"),
    breakers.ReadsValues(): ("shapes", "RuntimeError"),
    breakers.Swallow(): ("transaction", "is swallowed"),
    breakers.FullStop(): ("purity", "'nothing here.'"),
    breakers.Inexact(): ("contract", "KVX212"),
    breakers.NotFinite(): ("contract", "not finite"),
}


def test_a_good_pass_keeps_every_promise():
    check = check_pass(DoubleValues(), examples=4, seed=1, new_process=False)
    outcomes = {trial.outcome for trial in check.trials}
    assert check.applied >= 2
    assert "refused" in outcomes, "fused projections are refused"
    assert not check.faults
    assert "faults" in str(check)
    assert DoubleValues.pass_name() not in PASSES, "it was registered only for the check"


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda p: p.pass_name())
def test_a_broken_promise_is_named(breaker):
    promise, words = BREAKERS[breaker]
    check = fuzz_pass(breaker, examples=1, new_process=False)
    found = [fault.message for fault in check.faults if fault.promise == promise]
    assert any(words in message for message in found), check
    assert all("llama_program(layers=1)" in fault.example for fault in check.faults)


def test_no_promise_is_broken_besides():
    """One fault, one promise: nothing else is claimed of a pass whose new node lacks a source."""
    check = fuzz_pass(breakers.NoProvenance(), examples=1, new_process=False)
    assert {fault.promise for fault in check.faults} == {"provenance"}


def test_declarations_are_checked():
    faults = fuzz_pass(breakers.Undeclared(), examples=1, new_process=False).faults
    messages = [fault.message for fault in faults if fault.promise == "declaration"]
    assert [m for m in messages if "docstring" in m]
    assert [m for m in messages if "source" in m]
    assert [m for m in messages if "'v.bases'" in m]


def test_any_other_error_is_no_refusal():
    odd = llama_program(layers=1, head_dim=8)
    check = fuzz_pass(breakers.EvenHeadsOnly(), examples=1, programs=[odd], new_process=False)
    assert [trial.outcome for trial in check.trials] == ["applied", "refused"]
    (fault,) = [fault for fault in check.faults if fault.promise == "refusal"]
    assert "AssertionError: I only know 16" in fault.message
    assert "given program" in fault.example


def test_the_first_fault_is_the_error_and_the_others_are_notes():
    with pytest.raises(PassError, match=r"KVX220 \[undeclared\].*promise of declaration") as found:
        check_pass(breakers.Undeclared(), examples=1, new_process=False)
    assert len(found.value.__notes__) == 2


def test_a_pass_that_takes_nothing_is_not_checked():
    @dataclass(frozen=True)
    class Never(DoubleValues):
        """Refuses everything."""

        def match(self, program):
            return [NoMatch("nothing suits me")]

    with pytest.raises(PassError, match=r"KVX223.*nothing suits me"):
        check_pass(Never(), examples=1, new_process=False)


def test_a_local_class_is_not_checked_across_processes():
    @dataclass(frozen=True)
    class Local(DoubleValues):
        """No other process can import it."""

    check = check_pass(Local(), examples=1)
    assert "Local cannot be imported" in check.notes[0]


@pytest.mark.slow  # two processes that import torch
def test_hashes_of_strings_must_not_show():
    here = fuzz_pass(breakers.HashedName(), examples=1, new_process=False)
    assert not here.faults
    there = fuzz_pass(breakers.HashedName(), examples=1)
    assert [fault.promise for fault in there.faults] == ["determinism"]
    assert not fuzz_pass(DoubleValues(), examples=2).faults


def test_required_options_must_be_given():
    with pytest.raises(PassError, match=r"KVX205 \[quantize-kv\].*check an instance"):
        check_pass("quantize-kv")
    with pytest.raises(RecipeError, match=r"KVX104.*'rotate-v'"):
        check_pass("rotate-w")


def test_prerequisites_come_from_facts():
    names = [p.pass_name() for p in prerequisites(PASSES["rotate-k-prerope"]())]
    assert names == ["insert-cache", "cache-prerope"]
    assert prerequisites(PASSES["insert-cache"]()) == ()


def test_examples_are_the_same_for_the_same_seed_and_say_how_they_are_made():
    first, again, other = (
        [str(e) for e in draw_examples(DoubleValues(), 6, before=None, seed=seed)]
        for seed in (3, 3, 4)
    )
    assert first == again != other
    assert first[0] == "llama_program(layers=1)"
    assert len(set(first)) == 6


def test_an_example_prints_as_the_call_that_makes_it():
    drawn = draw_examples(DoubleValues(), 8, before=(), seed=0)
    plain = [e for e in drawn if not e.opaque and "attention" not in dict(e.options)]
    assert any("dtype" in dict(e.options) for e in plain)
    for example in plain:
        program = eval(str(example), {"torch": torch, **vars(testing)})
        assert digest(program) == digest(example.source())
