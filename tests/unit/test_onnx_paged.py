"""Packages over paged caches, step by step, against the definition of the cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program, defined_logits
from paged_reference import open_paged, paged_package
from programs import token_ids

TOKENS, BLOCK = 40, 16
TOLERANCE = 1e-3  # where two ways of rounding meet, a code may flip; logits are about 2
FP8 = {"codec": "fp8", "format": "e4m3", "scaled": False}


def static(bits, axis="tensor"):
    count = 1 if axis == "tensor" else 2 * 16  # heads x channels
    scale = [(3 + 0.01 * i) / 2 ** (bits - 1) for i in range(count)]
    return {"codec": "static-int", "bits": bits, "axis": axis, "scale": scale}


PLANS = {
    "exact": None,
    "int8": {"key": static(8), "value": static(8)},
    "int8-channel": {"key": static(8, "channel"), "value": static(8)},
    "int4": {"key": static(4), "value": static(4, "channel")},
    "fp8": {"key": FP8, "value": FP8},
}


def program_of(plan, context=64, **model):
    program = cached_program(plan, None, dtype=torch.float32, **model)
    program.info = dataclasses.replace(program.info, context_length=context)
    return program


@pytest.mark.parametrize("case", PLANS)
def test_rows_of_different_lengths_are_as_if_alone(case, tmp_path, monkeypatch):
    program = program_of(PLANS[case])
    ids, counts = token_ids(program, 3, TOKENS), (20, 9, 1)
    expected = [defined_logits(program, row) for row in ids]
    session = open_paged(paged_package(program, tmp_path / "out"), monkeypatch)
    prompts = torch.zeros(3, 20, dtype=torch.int64)
    mask = (torch.arange(20) < torch.tensor(counts)[:, None]).long()
    prompts[mask.bool()] = torch.cat([ids[r, :n] for r, n in enumerate(counts)])
    every = session.prefill(prompts, mask, all_logits=True)
    for row, count in enumerate(counts):
        close(every[row, :count], expected[row][:count])
    for step in range(3):
        tokens = torch.stack([ids[r, n + step] for r, n in enumerate(counts)])
        logits = session.decode(tokens)
        for row, count in enumerate(counts):
            close(logits[row], expected[row][count + step])
    assert session.sequence_lengths() == tuple(n + 3 for n in counts)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
