"""Results made once more in another process, where hashes of strings fall differently.

Run as a module it is that process: it reads a pickle of its own parent from stdin, and prints the
digests as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from kvxform.pass_base import PASSES, GraphPass
from kvxform.testing.examples import Example
from kvxform.testing.promises import replay
from kvxform.testing.trials import Fault, Trial, crash

Case = tuple[GraphPass, Example]
Home = tuple[str, str | None]  # a module and its file


def compare_processes(
    graph_pass: GraphPass, trials: Sequence[Trial]
) -> tuple[list[Fault], tuple[str, ...]]:
    """Make the results of trials again elsewhere; return the faults, and what was not possible."""
    taken = [trial for trial in trials if trial.digest and trial.example.program is None]
    if not taken:
        return [], ()
    try:
        digests = digests_elsewhere([(graph_pass, trial.example) for trial in taken])
    except (
        pickle.PicklingError,
        AttributeError,
        TypeError,
        subprocess.CalledProcessError,
    ) as error:
        why = "cannot be imported in another process"
        name = type(graph_pass).__qualname__
        detail = _last_line(error.stderr) if hasattr(error, "stderr") else str(error)
        return [], (f"determinism across processes is not checked: {name} {why} ({detail})",)
    message = "another process makes another result of the same program"
    faults = [
        Fault("determinism", message, str(trial.example))
        for trial, found in zip(taken, digests, strict=True)
        if found != trial.digest
    ]
    return faults, ()


def digests_elsewhere(cases: Sequence[Case]) -> list[str]:
    """Return the digest of every case as a new process finds it.

    Raises:
        pickle.PicklingError: If a class is local to a function; AttributeError in Python 3.11.
        subprocess.CalledProcessError: If the process cannot import a class.
    """
    classes = {type(p) for graph_pass, example in cases for p in (graph_pass, *example.before)}
    homes = sorted((c.__module__, _file(c)) for c in classes if c.__module__ != "__main__")
    payload = pickle.dumps((sys.path, homes, pickle.dumps(list(cases))))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=payload,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
    )
    found: list[str] = json.loads(done.stdout)
    return found


def main() -> None:
    """Be the other process."""
    path, homes, cases = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    for home in homes:
        _import(*home)
    found = []
    for graph_pass, example in pickle.loads(cases):
        PASSES.setdefault(graph_pass.pass_name(), type(graph_pass))
        try:
            found.append(replay(graph_pass, example))
        except Exception as error:  # an error is another result than that of the parent
            found.append(crash(error))
    print(json.dumps(found))


def _file(cls: type) -> str | None:
    return getattr(sys.modules[cls.__module__], "__file__", None)


def _import(name: str, file: str | None) -> None:
    """Import a module by name, or from its file where the name alone does not lead there."""
    if importlib.util.find_spec(name.partition(".")[0]) is not None or file is None:
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "it is a Python file"
    assert spec.loader is not None, "it is a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _last_line(text: Any) -> str:
    shown = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return (shown.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    main()
