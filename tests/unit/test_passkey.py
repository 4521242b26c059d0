"""Passkey prompts have the length and the depths that they say; finding follows greedy decoding."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tokenizers import byte_pair_tokenizer, word_tokenizer

from kvxform.errors import KvxformError
from kvxform.evaluate.passkey import find_passkeys, make_prompts, split_common
from kvxform.texts import default_text


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pair_tokenizer([default_text()[:20000]], 150)


class Knows:
    """Gives the answers of prompts, each in its turn; from one token on wrong ones, if asked to."""

    def __init__(self, prompts, vocab, wrong_from=99):
        self.prompts, self.vocab, self.wrong_from = prompts, vocab, wrong_from
        self.rows, self.fed = slice(0, 0), 0

    def prefill(self, ids):
        self.rows = slice(self.rows.stop, self.rows.stop + len(ids))
        self.fed = -len(self.prompts.question)
        return torch.zeros(len(ids), self.vocab)

    def decode(self, token_ids):
        self.fed += 1
        answers = self.prompts.answers[self.rows]
        logits = torch.zeros(len(answers), self.vocab)
        if self.fed >= 0:
            wrong = int(self.fed >= self.wrong_from)
            logits.scatter_(1, (answers[:, self.fed, None] + wrong) % self.vocab, 5.0)
        return logits


def test_prompts_hide_the_number_where_they_say(tokenizer):
    prompts = make_prompts(tokenizer, 400, depths=(0.0, 0.5, 1.0), keys=2)
    assert prompts.length == 400
    assert prompts.depths == (0.0, 0.0, 0.5, 0.5, 1.0, 1.0)
    places = []
    for row, answer in zip(prompts.context, prompts.answers, strict=True):
        text = tokenizer.decode(row)
        key = tokenizer.decode(answer).strip()
        assert len(key) == 5
        assert key.isdigit()
        assert text.count(key) == 2, "the needle says it twice"
        places.append(text.index(key) / len(text))
    assert places[0] < 0.5 < places[4]
    assert places[0] < places[2] < places[4]
    assert len({tuple(answer.tolist()) for answer in prompts.answers}) == 6


def test_the_same_seed_gives_the_same_prompts(tokenizer):
    first, second, other = (make_prompts(tokenizer, 400, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.context, second.context)
    assert not torch.equal(first.answers, other.answers)


def test_a_chat_template_frames_the_question():
    prompts = make_prompts(word_tokenizer(), 60, depths=(0.5,), keys=1)
    assert word_tokenizer().decode(prompts.question).split().count("w9") == 1


def test_no_room_is_refused(tokenizer):
    with pytest.raises(KvxformError, match="more than") as caught:
        make_prompts(tokenizer, 30)
    assert caught.value.code == "KVX704"


def test_what_all_answers_begin_with_is_asked_not_answered():
    answers = torch.tensor([[9, 4, 1, 2], [9, 4, 3, 2]])
    beginning, endings = split_common(answers)
    assert beginning.tolist() == [9, 4]
    assert endings.tolist() == [[1, 2], [3, 2]]
    beginning, endings = split_common(answers[:1])
    assert (beginning.tolist(), endings.tolist()) == ([], [[9, 4, 1, 2]])
    assert split_common(torch.tensor([[7, 8], [7, 8]]))[1].tolist() == [[8], [8]]


def test_choices_are_among_tokens_of_answers(tokenizer):
    prompts = make_prompts(tokenizer, 400, depths=(0.2, 0.8), keys=2)
    outside = next(t for t in range(len(tokenizer)) if t not in prompts.answers)

    class Chatty(Knows):
        def decode(self, token_ids):
            logits = super().decode(token_ids)
            logits[:, outside] = 9.0  # likelier than any digit, and no digit
            return logits

    result = find_passkeys(Chatty(prompts, len(tokenizer)), prompts)
    assert (result.rate, result.chosen) == (0.0, (1.0, 1.0))


@pytest.mark.parametrize(("wrong_from", "rate"), [(99, 1.0), (3, 0.0)])
def test_all_tokens_of_an_answer_must_be_right(tokenizer, wrong_from, rate):
    prompts = make_prompts(tokenizer, 400, depths=(0.2, 0.8), keys=2)
    vocab = len(tokenizer)
    result = find_passkeys(Knows(prompts, vocab, wrong_from), prompts, batch_size=3)
    assert (result.rate, result.depths) == (rate, (0.2, 0.8))
    right = math.log(math.exp(5) + vocab - 1) - 5
    tokens = prompts.answers.shape[1]
    wrong = max(0, tokens - wrong_from)
    assert result.nll == pytest.approx((right + 5 * wrong / tokens,) * 2, rel=1e-5)
