"""One model of `onnx_cpu.py` in a process of its own; commands and answers are lines of JSON.

Memory is that of the process, so each model needs one; and models of the builder may live in
another environment. `load`, `prefill`, `decode`, `fill` and `memory` are the commands.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_subjects import GenAI, HuggingFace, Package, PlainExport, Subject

Answer = dict[str, Any]
# imported before memory is counted
IMPORTS = {
    "huggingface": ("transformers.models.llama.modeling_llama", "kvxform.capture"),
    "plain": ("onnxruntime",),
    "kvxform": ("onnxruntime", "kvxform.runtime.onnx_session"),
    "genai": ("onnxruntime_genai",),
}


def main() -> None:
    """Answer commands until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to the terminal
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = worker.answer(**command)
        except Exception as error:  # whatever a runtime raises ends its row, not the run
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """Holds one subject."""

    def __init__(self) -> None:
        self._base = 0
        self._subject: Subject | None = None

    def answer(self, do: str, **options: Any) -> Answer:
        """Run one command."""
        if do == "memory":
            now = memory()
            return {name: now[name] - self._base for name in ("resident", "peak")}
        commands: dict[str, Callable[..., Answer]] = {
            "load": self.load,
            "prefill": self.prefill,
            "decode": self.decode,
            "fill": self.fill,
        }
        return commands[do](**options)

    @property
    def subject(self) -> Subject:
        """The subject."""
        assert self._subject is not None, "loaded first"
        return self._subject

    def load(self, runtime: str, **options: Any) -> Answer:
        """Load a model; memory counts from here on."""
        for name in IMPORTS[runtime]:
            importlib.import_module(name)
        self._base = memory()["resident"]
        start = time.perf_counter()
        self._subject = make_subject(runtime, **options)
        return {"seconds": time.perf_counter() - start}

    def prefill(self, ids: list[int]) -> Answer:
        """Return seconds of one prefill and the token that follows."""
        self.subject.reset()
        start = time.perf_counter()
        token = self.subject.prefill(ids)
        return {"seconds": time.perf_counter() - start, "token": token}

    def decode(self, ids: list[int]) -> Answer:
        """Return seconds of each step, and the tokens that follow."""
        marks, tokens = [time.perf_counter()], []
        for token in ids:
            tokens.append(self.subject.decode(token))
            marks.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(marks)]
        return {"seconds": seconds, "tokens": tokens, "cache_bytes": self.subject.cache_bytes()}

    def fill(self, length: int) -> Answer:
        """Bring the sequence to a length."""
        self.subject.fill(length)
        return {}


def make_subject(runtime: str, folder: str, threads: int, capacity: int) -> Subject:
    """Return the subject of a runtime: `huggingface`, `plain`, `kvxform` or `genai`."""
    if runtime == "huggingface":
        return HuggingFace(threads)
    if runtime == "plain":
        return PlainExport(Path(folder), threads)
    kinds: dict[str, Callable[[Path, int, int], Subject]] = {"kvxform": Package, "genai": GenAI}
    return kinds[runtime](Path(folder), threads, capacity)


def memory() -> dict[str, int]:
    """Return resident bytes of this process, now and at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"resident": "VmRSS", "peak": "VmHWM"}
    return {name: int(table[key].split()[0]) * 1024 for name, key in names.items()}


if __name__ == "__main__":
    main()
