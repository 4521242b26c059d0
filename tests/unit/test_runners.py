"""Runners: stateless and step-by-step logits of a source module agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kvxform.evaluate.runners import SourceRunner


class LastPlusOne(nn.Module):
    """Predicts token + 1; a plain module without a cache, output wrapped in a tuple."""

    def forward(self, input_ids):
        return (nn.functional.one_hot((input_ids + 1) % 10, 10).float(),)


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [tiny_gpt2, LastPlusOne])
def test_steps_and_the_stateless_call_agree(make):
    runner = SourceRunner(make())
    ids = torch.randint(1, 10, (1, 9), generator=torch.manual_seed(1))
    whole = runner.logits(ids)
    for _ in range(2):  # a prefill starts anew
        rows = [runner.prefill(ids[:, :4])]
        rows += [runner.decode(ids[0, t : t + 1]) for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(rows), whole[0, 3:], rtol=1e-5, atol=1e-5)
