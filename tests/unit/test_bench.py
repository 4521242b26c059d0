"""The timer: what it runs, in which order, and the arithmetic of rates."""

from __future__ import annotations

import torch

from kvxform.evaluate.bench import Rate, measure_speed


class CountingRunner:
    def __init__(self, name: str, log: list[tuple[str, str, int]]) -> None:
        self.name, self.log = name, log

    def logits(self, input_ids):
        raise AssertionError("speed is measured on prefill and decode alone")

    def prefill(self, input_ids):
        self.log.append((self.name, "prefill", input_ids.shape[1]))
        return torch.zeros(1, 4)

    def decode(self, token_ids):
        self.log.append((self.name, "decode", int(token_ids)))
        return torch.zeros(1, 4)


def test_rates():
    rate = Rate.of(10, [1.0, 2.0, 5.0])
    assert (rate.median, rate.slowest, rate.fastest) == (5.0, 2.0, 10.0)


def test_runners_take_turns_and_decode_the_same_tokens():
    log: list[tuple[str, str, int]] = []
    runners = {name: CountingRunner(name, log) for name in ("a", "b")}
    prompt = torch.tensor([[7, 8, 9]])
    rounds: list[int] = []
    speeds = measure_speed(runners, prompt, new_tokens=4, repeats=2, progress=rounds.append)
    timed = log[2 * 3 :]  # after a warm-up of one prefill and two steps each
    one = [("prefill", 3), ("decode", 7), ("decode", 8), ("decode", 9), ("decode", 7)]
    expected = [(name, *entry) for _ in range(2) for name in ("a", "b") for entry in one]
    assert timed == expected
    assert rounds == [1, 2]
    assert set(speeds) == {"a", "b"}
    assert (speeds["a"].prompt_tokens, speeds["a"].new_tokens, speeds["a"].repeats) == (3, 4, 2)
    assert speeds["a"].decode.slowest <= speeds["a"].decode.median <= speeds["a"].decode.fastest
