"""The token loop against Hugging Face's, on logits that depend on the last token alone."""

import pytest
import torch
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel

from kvxform.errors import KvxformError
from kvxform.runtime.generate import GenerationOptions, eos_tuple, make_processor, run_loop

VOCAB = 40
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
PROMPT = torch.tensor([[3, 5, 7], [2, 9, 4]])


def loop(options, **kwargs):
    return run_loop(PROMPT, TABLE[PROMPT[:, -1]], lambda ids: TABLE[ids], options, **kwargs)


class TableModel(GPT2LMHeadModel, GenerationMixin):
    """A Hugging Face model whose logits are rows of TABLE."""

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = TABLE[input_ids]
        return out


@pytest.fixture(scope="module")
def hf():
    config = GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return TableModel(config).eval()


CASES = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.7},
    "sampling": {"do_sample": True, "top_k": 0},
    "warpers": {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.8},
    "default top_k": {"do_sample": True, "temperature": 3.0},
    "all": {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_hugging_face(hf, name):
    torch.manual_seed(11)
    found = loop(GenerationOptions(max_new_tokens=12, **CASES[name]))
    torch.manual_seed(11)
    expected = hf.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=12,
        pad_token_id=0,
        **{"do_sample": False, **CASES[name]},
    )
    assert torch.equal(found, expected)


def test_generator_makes_draws_repeatable():
    options = GenerationOptions(max_new_tokens=20, do_sample=True, temperature=2.0)
    draws = [loop(options, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_processor_without_options():
    logits = TABLE[:2]
    assert make_processor(GenerationOptions())(PROMPT, logits) is logits


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended += 1


def test_streamer_gets_prompt_then_tokens():
    streamer = Recorder()
    out = loop(GenerationOptions(max_new_tokens=4), streamer=streamer)
    assert torch.equal(streamer.seen[0], PROMPT)
    assert torch.equal(torch.stack(streamer.seen[1:], 1), out[:, 3:])
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range(option, value):
    with pytest.raises(KvxformError, match=f"KVX704 .*{option}"):
        GenerationOptions(**{option: value})


def test_end_tokens():
    assert eos_tuple(None, (1, 2)) == (1, 2)
    assert eos_tuple(5, (1, 2)) == (5,)
    assert eos_tuple([5, 6], ()) == (5, 6)
