"""Probes and the comparison of logits, against formulas written out."""

from __future__ import annotations

import math

import torch
from programs import llama_program, run

from kvxform.verify.probe import Probe, Reference, make_probe, pick, run_source, write_probe


def test_probes_are_the_same_every_time_and_know_their_padding():
    first, second = make_probe(50, (5, 3)), make_probe(50, (5, 3))
    assert torch.equal(first.input_ids, second.input_ids)
    assert first.input_ids.shape == (2, 5)
    assert first.real.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert pick(torch.zeros(2, 5, 7), first).shape == (8, 7)


def test_difference_follows_its_formulas():
    reference = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    measured = torch.tensor([[0.0, 1.0, 2.5], [0.0, 3.0, 0.0]])
    found = Reference(reference).compare(Reference(measured))
    kl = 0.0
    for p_row, q_row in zip(reference.tolist(), measured.tolist(), strict=True):
        p_sum, q_sum = sum(map(math.exp, p_row)), sum(map(math.exp, q_row))
        for p, q in zip(p_row, q_row, strict=True):
            kl += math.exp(p) / p_sum * (p - math.log(p_sum) - q + math.log(q_sum)) / 2
    assert abs(found.kl - kl) < 1e-12
    assert found.max_abs == 3.0
    assert found.relative == 1.0
    assert found.top1 == 0.5


def test_equal_logits_do_not_differ():
    logits = torch.randn(4, 9)
    found = Reference(logits).compare(Reference(logits.clone()))
    assert (found.max_abs, found.kl, found.top1) == (0.0, 0.0, 1.0)


def test_source_run_keeps_logits_and_what_attention_was_given():
    program = llama_program()
    probe = make_probe(program.info.vocab_size, (6, 4))
    source = run_source(program, probe)
    torch.testing.assert_close(source.logits, run(program, probe.input_ids), rtol=0, atol=1e-12)
    assert sorted(source.keys) == sorted(source.values) == [0, 1]
    assert source.keys[1].shape == (2, 2, 6, 16)
    # K of layer 0 at a position depends on that token alone: equal tokens, equal V
    ids = probe.input_ids.clone()
    ids[1, 0] = ids[0, 0]
    again = run_source(program, Probe(ids, probe.lengths))
    torch.testing.assert_close(again.values[0][0, :, 0], again.values[0][1, :, 0])


def test_written_probes_are_likelier_than_random_ones():
    program = llama_program()
    program.weights["head.weight"] = program.weights["head.weight"] * 20  # a model with opinions

    def likelihood(probe: Probe) -> float:
        log_p = run_source(program, probe).logits.log_softmax(-1)[:, :-1]
        return float(log_p.gather(2, probe.input_ids[:, 1:, None]).mean())

    random = make_probe(program.info.vocab_size, (30, 30))
    written = write_probe(program, (30, 30))
    assert torch.equal(written.input_ids, write_probe(program, (30, 30)).input_ids)
    assert likelihood(written) > likelihood(random) + 0.5


def test_what_is_not_a_number_is_not_equal():
    good = torch.zeros(2, 3)
    found = Reference(good).compare(Reference(torch.full((2, 3), float("nan"))))
    assert math.isnan(found.kl)
    assert math.isnan(found.max_abs)
