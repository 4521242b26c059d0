"""Machine code of emitted kernels, for sm_90, without a GPU.

Compiling needs a Triton that is not in interpreter mode, so it happens in a child process that
runs this file. Compile several kernels in one call: starting the child takes seconds.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Attributes:
        text: Source of the emitted module.
        kernel: Name of the jitted function.
        types: Type of each argument that is no constant, such as `*fp16`, `i32` or `fp32`, in any
            order. Pointers are taken to be aligned to 16 bytes, and `i32:16` is a multiple of 16.
        constants: Values of the `constexpr` arguments.
        num_warps: Warps of a CTA.
        num_stages: Stages of software pipelining.
        maxnreg: Limit of registers a thread, or None.
        is_gluon: Whether the kernel is written in Gluon.
    """

    text: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    is_gluon: bool = False


@dataclass(frozen=True)
class MachineCode:
    """What became of a kernel.

    Attributes:
        registers: Registers a thread.
        shared_bytes: Static and dynamic shared memory of a CTA.
        loops: Instructions of each loop, by full name such as `LDG.E.128` (loops of more than
            ten), the longest first.
        listings: The same instructions in order.
        whole: Instructions of the whole kernel.
    """

    registers: int
    shared_bytes: int
    loops: tuple[dict[str, int], ...] = field(default=())
    listings: tuple[tuple[str, ...], ...] = field(default=())
    whole: dict[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return count(self.whole, "LDL") + count(self.whole, "STL")


def count(instructions: dict[str, int], *parts: str) -> int:
    """Return how many instructions have a name of these parts, in this order, from the first on.

    `count(loop, "LDG", "128")` counts `LDG.E.EF.128` too; the first part must be the operation.
    """
    total = 0
    for name, number in instructions.items():
        pieces = name.split(".")
        rest = iter(pieces[1:])
        if pieces[0] == parts[0] and all(part in rest for part in parts[1:]):
            total += number
    return total


def compile_kernels(*builds: Build) -> list[MachineCode]:
    """Compile for sm_90 and return what the machine code consists of."""
    missing = [build for build in dict.fromkeys(builds) if build not in _done()]
    if missing:
        _done().update(zip(missing, _run_child(missing), strict=True))
    return [_done()[build] for build in builds]


@functools.cache
def _done() -> dict[Build, MachineCode]:
    return {}


def _run_child(builds: list[Build]) -> list[MachineCode]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        requests = []
        for i, build in enumerate(builds):
            path = Path(folder) / f"kernel_{i}.py"
            path.write_text(build.text, encoding="utf-8")
            requests.append({**asdict(build), "text": str(path)})
        environment.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(requests),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return [
        MachineCode(
            result["registers"],
            result["shared_bytes"],
            tuple(collections.Counter(body) for body in result["bodies"]),
            tuple(tuple(body) for body in result["bodies"]),
            result["whole"],
        )
        for result in results
    ]


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one request; only called in the child."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    spec = importlib.util.spec_from_file_location(Path(request["text"]).stem, request["text"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    kernel = getattr(module, request["kernel"])
    names = list(kernel.arg_names)
    types, constants = dict(request["types"]), dict(request["constants"])
    unknown = (types.keys() | constants.keys()) ^ set(names)
    assert not unknown, f"arguments that only one side has: {sorted(unknown)}"
    aligned = [n for n, t in types.items() if t.startswith("*") or t.endswith(":16")]
    source = (GluonASTSource if request["is_gluon"] else ASTSource)(
        fn=kernel,
        signature={n: types.get(n, "constexpr").removesuffix(":16") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {k: request[k] for k in ("num_warps", "num_stages", "maxnreg")}
    if request["is_gluon"]:
        del options["num_stages"]
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _inspect(compiled)


def _inspect(compiled: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _output([str(tools / "nvdisasm"), "-c", file.name])
        usage = _output([str(tools / "cuobjdump"), "-res-usage", file.name])
    lines = _lines(sass)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found.group(1)),
        "shared_bytes": compiled.metadata.shared,
        "bodies": sorted(_loops(lines), key=len, reverse=True),
        "whole": collections.Counter(name for name, _ in lines if not name.startswith(".L")),
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _lines(sass: str) -> list[tuple[str, str]]:
    """Return (instruction or label, rest of the line)."""
    lines = []
    for line in sass.splitlines():
        code = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        label = re.match(r"(\.L_x_\d+):", line)
        if code:
            lines.append((code.group(1), code.group(2)))
        elif label:
            lines.append((label.group(1), ""))
    return lines


def _loops(lines: list[tuple[str, str]]) -> list[list[str]]:
    """Return the instructions between each label and a branch back to it."""
    labels = {name: i for i, (name, _) in enumerate(lines) if name.startswith(".L")}
    loops = []
    for i, (name, rest) in enumerate(lines):
        target = re.search(r"`\((\.L_x_\d+)\)", rest) if name.startswith("BRA") else None
        if target and labels.get(target.group(1), i) < i:
            body = [n for n, _ in lines[labels[target.group(1)] : i + 1] if not n.startswith(".L")]
            if len(body) > 10:
                loops.append(body)
    return loops


if __name__ == "__main__":
    print(json.dumps([_compile(request) for request in json.load(sys.stdin)]))
