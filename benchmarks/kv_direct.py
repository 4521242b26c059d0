"""A conversation on ids and a window against the same on a whole cache: tokens, memory, time.

    python benchmarks/kv_direct.py --text wikitext2/test.txt --json kv_direct.json

Each turn feeds the next tokens of the text and lets the model answer greedily. Both sessions get
the same turns; the window of `kv-direct` is `--hot-window` tokens. Bytes are those of the tensors
held between steps, `peak` adds what a step of `kv-direct` holds for its time beside activations of
one piece of tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import ResultFile, describe_run
from torch import Tensor

import kvxform
from kvxform.codegen.eager.checkpoint import CheckpointCache
from kvxform.runtime.session import Session
from kvxform.texts import encode_text, read_text

WHOLE, DIRECT = "exact cache", "kv-direct"


@dataclass
class Talk:
    """One session and what it has said."""

    session: Session
    said: list[int] = field(default_factory=list)

    def turn(self, ids: Tensor, answer: int) -> dict[str, float]:
        """Feed a turn and answer it; return seconds and bytes."""
        start = time.perf_counter()
        token = self.session.prefill(ids).argmax(-1)
        prefilled = time.perf_counter()
        for _ in range(answer):
            self.said.append(int(token))
            token = self.session.decode(token).argmax(-1)
        decoded = time.perf_counter()
        cache = self.session.cache
        held = self.session.cache_bytes()
        peak = cache.peak_bytes if isinstance(cache, CheckpointCache) else 0
        return {
            "tokens": self.session.sequence_lengths()[0],
            "prefill_s": prefilled - start,
            "step_s": (decoded - prefilled) / answer,
            "bytes": held,
            "peak_bytes": held + peak,
        }


def main() -> None:
    """Talk, print a line a turn, and write rows."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    talks, tokenizer = make_talks(options)
    text = encode_text(tokenizer, read_text(options.text))
    results = ResultFile(options.json, "kv_direct")
    results.start_run(describe_run(options, threads=torch.get_num_threads()))
    for turn in range(options.talk_turns):
        ids = text[None, turn * options.asked : (turn + 1) * options.asked]
        for name, talk in talks.items():
            row = talk.turn(ids, options.answered)
            results.add(f"{name}, turn {turn + 1}", {"session": name, "turn": turn + 1, **row})
            print(f"{turn + 1:3} {name:12} {describe(row)}", file=sys.stderr)
    whole, direct = (talks[name].said for name in (WHOLE, DIRECT))
    same = sum(a == b for a, b in zip(whole, direct, strict=True))
    results.add("tokens", {"answered": len(whole), "identical": same})
    print(f"{same} of {len(whole)} greedy tokens are identical")


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="what is asked; text of Python by default")
    parser.add_argument("--hot-window", type=int, default=256)
    parser.add_argument("--talk-turns", type=int, default=20)
    parser.add_argument("--asked", type=int, default=56, help="tokens of a turn")
    parser.add_argument("--answered", type=int, default=8, help="tokens of its answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--commit", default="", help="commit to record")
    return parser.parse_args()


def make_talks(options: argparse.Namespace) -> tuple[dict[str, Talk], Any]:
    """Return both sessions, empty, and the tokenizer."""
    talks, tokenizer = {}, None
    total = options.talk_turns * (options.asked + options.answered)
    for name, more in (
        (WHOLE, []),
        (DIRECT, [{"cache-residual": {"hot_window": options.hot_window}}]),
    ):
        recipe = {"version": 1, "name": "talk", "passes": ["insert-cache", *more]}
        model = kvxform.optimize(options.model, recipe, verify="none", progress=False)
        talks[name], tokenizer = Talk(model.new_session(1, total)), model.tokenizer
    return talks, tokenizer


def describe(row: dict[str, float]) -> str:
    """Return one line for people."""
    held, peak = row["bytes"] / 1e6, row["peak_bytes"] / 1e6
    seconds = f"prefill {row['prefill_s']:7.2f} s, step {row['step_s']:7.3f} s"
    return f"{row['tokens']:5.0f} tokens, {seconds}, {held:6.2f} MB, at most {peak:6.2f} MB"


if __name__ == "__main__":
    main()
