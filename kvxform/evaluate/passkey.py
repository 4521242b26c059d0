"""Passkey retrieval: a number is hidden in a long text, and the model is asked for it.

The text goes into the cache in one piece. Question and answer follow token by token, so that what
they read of the text is what the cache holds, for every model alike. The answer is forced: a number
counts as found if each of its tokens is the likeliest one, which is when greedy decoding finds it.
Beside that, each token is a choice among those that occur in the answers (ten digits, where each is
a token): right answers to that fall off gradually. What all answers begin with, such as a token for
the blank, belongs to the question: a model that would rather write a colon there has lost nothing.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvxform.errors import KvxformError
from kvxform.evaluate.runners import Runner
from kvxform.texts import default_text, encode_text

OPENING = "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key?"
REPLY = "The pass key is"  # the answer begins so; what follows is the number
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
DIGITS = 5
CHARACTERS = 8  # of filler for each token that is wanted; more than any tokenizer needs


@dataclass(frozen=True)
class PasskeyPrompts:
    """Prompts of one length that hide a number at several depths.

    Attributes:
        context: Tokens up to the question, int64 `[rows, n]`.
        question: Tokens of the question and of what all answers begin with, int64 `[q]`.
        answers: Tokens of the numbers, int64 `[rows, a]`.
        depths: Where the number is, as a share of the filler, by row.
    """

    context: Tensor
    question: Tensor
    answers: Tensor
    depths: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.context.shape[1] + len(self.question) + self.answers.shape[1]


@dataclass(frozen=True)
class PasskeyResult:
    """What was found at one length.

    Attributes:
        length: Tokens of prompt and answer.
        depths: Where the number is hidden, as a share of the text.
        found: Share of the numbers that were found, by depth.
        chosen: Share of tokens of the answers that are likelier than all others in answers, by
            depth.
        nll: Mean negative log likelihood of a token of the answer in nats, by depth.
    """

    length: int
    depths: tuple[float, ...]
    found: tuple[float, ...]
    chosen: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Share of all numbers that were found."""
        return sum(self.found) / len(self.found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**dataclasses.asdict(self), "rate": self.rate}


def make_prompts(
    tokenizer: Any,
    length: int,
    *,
    depths: Sequence[float] = DEPTHS,
    keys: int = 2,
    seed: int = 0,
    filler: str | None = None,
) -> PasskeyPrompts:
    """Return prompts of `length` tokens, answer included, `keys` numbers at each depth.

    Tokenizers with a chat template get the question in it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        length: Tokens of a prompt and its answer.
        depths: Where to hide numbers, each from 0 to 1.
        keys: Numbers at each depth.
        seed: Seed of the numbers.
        filler: The text around the number; help topics of the standard library by default.

    Raises:
        KvxformError: KVX704 if there is no room for a filler.
    """
    draw = random.Random(seed)
    before, after = _chat_frame(tokenizer)
    opening = encode_text(tokenizer, before + OPENING)
    question = encode_text(tokenizer, f"{QUESTION}{after}{REPLY}")
    text = default_text() if filler is None else filler
    filling = encode_text(tokenizer, text[: length * CHARACTERS])
    contexts, answers, places = [], [], []
    for depth in depths:
        for _ in range(keys):
            key = "".join(draw.choices("123456789", k=DIGITS))
            answer = encode_text(tokenizer, f" {key}")
            needle = encode_text(tokenizer, NEEDLE.format(key=key))
            room = length - sum(map(len, (opening, needle, question, answer)))
            if room < 1 or len(filling) < room:
                rule = f"a passkey prompt needs more than {length - room} tokens, and filler enough"
                raise KvxformError("KVX704", rule, where="passkey", got=length)
            cut = round(room * depth)
            parts = (opening, filling[:cut], needle, filling[cut:room])
            contexts.append(torch.cat(parts))
            answers.append(answer)
            places.append(depth)
    shortest = min(map(len, answers))  # digits are one token each almost everywhere
    rows = [row for row, answer in enumerate(answers) if len(answer) == shortest]
    width = min(len(contexts[row]) for row in rows)
    beginning, endings = split_common(torch.stack([answers[row] for row in rows]))
    return PasskeyPrompts(
        torch.stack([contexts[row][:width] for row in rows]),
        torch.cat([question, beginning]),
        endings,
        tuple(places[row] for row in rows),
    )


def split_common(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that all answers begin with, `[c]`, and the rest, `[rows, a]`, never empty.

    Args:
        answers: int64 `[rows, c + a]`. A single row has nothing in common with others.
    """
    is_common = (answers == answers[:1]).all(0) if len(answers) > 1 else answers[0] < 0
    common = min(int(is_common.long().cumprod(0).sum()), answers.shape[1] - 1)
    return answers[0, :common], answers[:, common:]


def _chat_frame(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template puts before and after the words of a user."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", " "
    mark = "\x00"
    chat = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition(mark)
    return before, after


def find_passkeys(runner: Runner, prompts: PasskeyPrompts, *, batch_size: int = 1) -> PasskeyResult:
    """Ask `runner` for the numbers of `prompts`.

    Args:
        runner: The model.
        prompts: What `make_prompts` returned.
        batch_size: Prompts that run side by side.
    """
    found, chosen, nll = [], [], []
    candidates = prompts.answers.unique()
    for rows in torch.arange(len(prompts.context)).split(batch_size):
        answers = prompts.answers[rows]
        logits = runner.prefill(prompts.context[rows])
        for token in prompts.question:
            logits = runner.decode(token.expand(len(rows)))
        steps = [logits]
        steps += [runner.decode(answers[:, i]) for i in range(answers.shape[1] - 1)]
        scores = torch.stack(steps, 1).double().log_softmax(-1).cpu()  # [rows, a, vocab]
        found.append((scores.argmax(-1) == answers).all(1).double())
        choices = candidates[scores[..., candidates].argmax(-1)]
        chosen.append((choices == answers).double().mean(1))
        nll.append(-scores.gather(-1, answers[..., None]).mean((1, 2)))
    depths = tuple(dict.fromkeys(prompts.depths))
    by_depth = (_by_depth(prompts, torch.cat(values)) for values in (found, chosen, nll))
    return PasskeyResult(prompts.length, depths, *by_depth)


def _by_depth(prompts: PasskeyPrompts, values: Tensor) -> tuple[float, ...]:
    """Return means of `values` `[rows]` over the prompts of each depth."""
    places = torch.tensor(prompts.depths)
    return tuple(float(values[places == depth].mean()) for depth in dict.fromkeys(prompts.depths))
