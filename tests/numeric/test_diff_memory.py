"""What a diff of two artifacts holds in memory does not grow with the number of layers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from deep_programs import deep_program, layer_bytes

from kvxform.runtime.model import OptimizedModel

MIB = 1 << 20
SCRIPT = """
import sys, kvxform
result = kvxform.diff(sys.argv[1], sys.argv[2], progress=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) >> 10)
print(*(f"{f.rule} {f.layers}" for f in result.findings), sep="\\n")
"""


def peak_of_diff(folder: Path, layers: int) -> tuple[int, str]:
    """Return the peak of resident memory of a diff in MiB, and what it found.

    `ru_maxrss` of a child also counts what its parent held before, `VmHWM` does not.
    """
    program = deep_program(layers)
    other = dataclasses.replace(program, weights=dict(program.weights))
    other.weights["layers.1.k.weight"] = program.weights["layers.1.k.weight"].flip(0)
    for name, side in (("a", program), ("b", other)):
        OptimizedModel(side).save(folder / name)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "a"), str(folder / "b")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, _, found = run.stdout.partition("\n")
    return int(peak), found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_diff_does_not_grow_with_the_depth(tmp_path):
    two, found = peak_of_diff(tmp_path / "2", 2)
    assert found.startswith("weight-permuted (1,)")
    twelve, found = peak_of_diff(tmp_path / "12", 12)
    assert found.startswith("weight-permuted (1,)")
    layer = layer_bytes(deep_program(1)) // MIB
    assert layer >= 32
    assert twelve - two < 2 * layer
