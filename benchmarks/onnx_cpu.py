"""SmolLM2-135M on the CPU: our ONNX packages, a plain export, GenAI's builder, Hugging Face.

    python benchmarks/onnx_cpu.py --packages out/onnx --json out/onnx_cpu.json
    python benchmarks/onnx_cpu.py --packages out/onnx --only huggingface,l3-int8 --contexts 256

Packages that are missing in the folder are made first (`onnx_packages.py`). Every model has a
process of its own, so that its memory can be told; they take turns, so that a busy machine slows
all alike. One sequence, float32 weights. Up to `--longest-prompt` tokens the prompt is prefilled
and timed; longer caches are filled without being timed, with copies of their first tokens where the
runtime lets its cache be set, and measured in one round. All models decode the same forced tokens.
Packages of the builder run in ONNX Runtime GenAI, ours in `OnnxSession` and, in rows `genai-...`,
in GenAI too.

The result file is written after every measurement, so that a run that is cut keeps what it has.
With its defaults a run takes less than 8 minutes on two cores: prompts that take longer than
`--slow` seconds are timed once, and rows that take minutes to fill a long cache are left out there;
`--all-contexts` measures them too, last of all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx_packages import make_package
from onnx_tables import cpu_table
from results import ResultFile, Row, describe_run, first_line, is_wanted

CAPACITY = 8192  # the context of the model
SLOW_TO_FILL = ("builder-int8", "builder-int4")
HUGGINGFACE = "huggingface"
# name of a row -> runtime, and package
ROWS: dict[str, tuple[str, str]] = {
    HUGGINGFACE: (HUGGINGFACE, ""),
    "plain": ("plain", "plain"),
    "l1": ("kvxform", "l1"),
    "l3": ("kvxform", "l3"),
    "l3-int8": ("kvxform", "l3-int8"),
    "l3-int4": ("kvxform", "l3-int4"),
    "builder-fp32": ("genai", "builder-fp32"),
    "builder-int8": ("genai", "builder-int8"),
    "builder-int4": ("genai", "builder-int4"),
    "genai-l3-int8": ("genai", "l3-int8"),
}


@dataclass
class Measured:
    """What one model has shown at one context.

    Attributes:
        prefill_s: Seconds of each prefill; none where the cache was filled otherwise.
        decode_s: Seconds of each step.
        tokens: The likeliest tokens of the first round: after the prompt, and after each step.
        memory: Bytes: `resident` and `peak` of the process, less what it had before the model was
            loaded; `cache` as the runtime tells.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)


class Remote:
    """A model in a worker process."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("onnx_worker.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Run a command of the worker.

        Raises:
            RuntimeError: With what the worker says, if it fails.
        """
        commands, answers = self._process.stdin, self._process.stdout
        assert commands is not None, "a pipe"
        assert answers is not None, "a pipe"
        commands.write(json.dumps({"do": do, **options}) + "\n")
        commands.flush()
        line = answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Bench:
    """All models of one run."""

    def __init__(self, options: argparse.Namespace, file: ResultFile) -> None:
        self.options, self.file = options, file
        self.remotes: dict[str, Remote] = {}
        self.found: dict[str, dict[int, Measured]] = {}
        generator = torch.Generator().manual_seed(0)
        self.ids: list[int] = torch.randint(5, 1000, (CAPACITY,), generator=generator).tolist()

    def run(self) -> None:
        """Load all models, let them take turns at every context, and store the rows."""
        for name in ROWS:
            if is_wanted(name, self.options.only):
                self.guarded(name, self.load)
        for context in self.options.contexts:
            for turn in range(self.rounds_at(context)):
                for name in self.rows_at(context):
                    self.guarded(name, self.measure, context, turn)
        for remote in self.remotes.values():
            remote.close()

    def rounds_at(self, context: int) -> int:
        """Return how often all models take their turn."""
        return self.options.rounds if context <= self.options.longest_prompt else 1

    def rows_at(self, context: int) -> list[str]:
        """Return the models to measure in their order; those that take long to fill come last."""
        names = list(self.remotes)
        if context <= self.options.longest_prompt:
            return names
        slow = [name for name in names if name in SLOW_TO_FILL]
        quick = [name for name in names if name not in slow]
        return quick + slow if self.options.all_contexts else quick

    def guarded(self, name: str, do: Any, *arguments: int) -> None:
        """Call a method for one row; what fails ends the row and is stored."""
        try:
            do(name, *arguments)
        except Exception as error:  # runtimes raise anything, and one must not end the run
            self.store(name, error=first_line(error))
            print(f"{name}: {first_line(error)}", file=sys.stderr, flush=True)
            remote = self.remotes.pop(name, None)
            if remote is not None:
                remote.close()

    def load(self, name: str) -> None:
        """Start the process of a row."""
        runtime, package = ROWS[name]
        folder = make_package(package, self.options.packages) if package else Path()
        remote = Remote(sys.executable)
        self.remotes[name], self.found[name] = remote, {}
        threads = self.options.threads
        remote.ask("load", runtime=runtime, folder=str(folder), threads=threads, capacity=CAPACITY)

    def measure(self, name: str, context: int, turn: int) -> None:
        """Time one round of one row at one context."""
        remote, steps = self.remotes[name], self.options.new_tokens
        found = self.found[name].setdefault(context, Measured())
        tokens: list[int] = []
        if context > self.options.longest_prompt:
            remote.ask("fill", length=context - steps)
        elif turn == 0 or max(found.prefill_s) <= self.options.slow:
            answer = remote.ask("prefill", ids=self.ids[:context])
            found.prefill_s.append(answer["seconds"])
            tokens.append(answer["token"])
        answer = remote.ask("decode", ids=self.ids[-steps:])
        found.decode_s += answer["seconds"]
        found.tokens = found.tokens or [*tokens, *answer["tokens"]]
        found.memory = {**remote.ask("memory"), "cache": answer["cache_bytes"]}
        self.store(name)
        self.tell(name, context, found)

    def tell(self, name: str, context: int, found: Measured) -> None:
        """Say how far the run is."""
        prefill = f"{context / found.prefill_s[-1]:8.1f}" if found.prefill_s else " " * 8
        step = statistics.median(found.decode_s[-self.options.new_tokens :])
        print(f"{name:14} {context:5} {prefill} {1 / step:8.1f} tokens/s", file=sys.stderr)

    def store(self, name: str, **more: str) -> None:
        """Store the row of a model as far as it has been measured."""
        measured = {c: m for c, m in self.found.get(name, {}).items() if m.decode_s}
        rows = {str(context): summarize(context, m) for context, m in measured.items()}
        self.file.add(name, {"name": name, "runtime": ROWS[name][0], "contexts": rows, **more})


def summarize(context: int, found: Measured) -> Row:
    """Return what is stored of one model at one context."""
    row: Row = {"decode": rate(1, found.decode_s), "tokens": found.tokens, "memory": found.memory}
    if found.prefill_s:
        row["prefill"] = rate(context, found.prefill_s)
    return row


def rate(tokens: int, seconds: Sequence[float]) -> Mapping[str, float]:
    """Return tokens per second: of the median time, of the slowest and of the fastest."""
    return {
        "median": tokens / statistics.median(seconds),
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
    }


def main() -> None:
    """Measure, write JSON, print a table."""
    options = parse_options()
    file = ResultFile(options.json, "onnx_cpu")
    file.start_run(describe_run(options, device=processor()))
    Bench(options, file).run()
    print(cpu_table(file.this_run()))


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of packages")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--only", default="", help="comma separated parts of names of rows")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--longest-prompt", type=int, default=2048, help="longer ones are filled")
    parser.add_argument("--new-tokens", type=int, default=16, help="decode steps of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=9.0, help="seconds of a prefill; see above")
    parser.add_argument("--all-contexts", action="store_true", help="long ones of all rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", default="", help="commit to record, where git does not know it")
    return parser.parse_args()


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
