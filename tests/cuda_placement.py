"""Which nodes of a graph ONNX Runtime would run on CUDA, told on a machine without a GPU.

    python tests/cuda_placement.py SITE model.onnx ...

SITE is a folder with an unpacked onnxruntime-gpu: `pip install --no-deps --target SITE
onnxruntime-gpu`. Kernels are looked up when a session is made and nothing is run, so the CUDA
libraries may be stand-ins whose functions do nothing. They are compiled here, from the names that
the provider asks for; needs gcc and nm. Prints one JSON line a graph: nodes off CUDA by operator,
the node count, whether it can be a CUDA graph, or the error of the session.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIBRARIES = {
    "libcudart.so.13": r"(__)?cuda",
    "libcublas.so.13": r"cublas(?!Lt)",
    "libcublasLt.so.13": r"cublasLt",
    "libcurand.so.10": r"curand",
    "libcuda.so.1": r"cu[A-Z]",
}
# Functions that must give something back; all others return 0, which is success.
BODIES = {
    "cudaMalloc": "(void **p, size_t n) { *p = calloc(1, n); return 0; }",
    "cudaMallocHost": "(void **p, size_t n) { *p = calloc(1, n); return 0; }",
    "cudaHostAlloc": "(void **p, size_t n, int f) { *p = calloc(1, n); return 0; }",
    "cudaFree": "(void *p) { free(p); return 0; }",
    "cudaFreeHost": "(void *p) { free(p); return 0; }",
    "cudaGetDeviceCount": "(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "(int *n) { *n = 0; return 0; }",
    "cudaRuntimeGetVersion": "(int *n) { *n = 13000; return 0; }",
    "cudaDriverGetVersion": "(int *n) { *n = 13000; return 0; }",
    "cudaMemGetInfo": "(size_t *f, size_t *t) { *f = *t = (size_t)80 << 30; return 0; }",
    "cudaMemcpy": "(void *d, void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "cudaMemcpyAsync": "(void *d, void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "cudaGetErrorString": '(void) { return (long)"none"; }',
    "cudaGetErrorName": '(void) { return (long)"none"; }',
    # Words of cudaDeviceProp: warp size, threads a block, capability 9.0, multiprocessors.
    "cudaGetDeviceProperties": "(int *p) { p[77] = 32; p[80] = 1024; p[90] = 9; p[91] = 0;"
    " p[96] = p[97] = 132; return 0; }",
}
HEAD = "#include <stdlib.h>\n#include <string.h>\n"
PLACE = """
import json, sys
import onnxruntime
CUDA = "CUDAExecutionProvider"
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[CUDA])
    except Exception as error:
        print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
        continue
    off, count = {}, 0
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            count += 1
            if part.ep_name != CUDA:
                off.setdefault(node.op_type, []).append(node.name)
    try:
        onnxruntime.InferenceSession(path, options, providers=[(CUDA, {"enable_cuda_graph": "1"})])
        captures = True
    except Exception:
        captures = False
    print(json.dumps({"nodes": count, "captures": captures, "off": off}), flush=True)
"""


def place(site: Path, graphs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what the runtime in `site` says of each graph.

    Returns:
        For each graph `nodes` (how many), `off` (names of nodes off CUDA, by operator) and
        `captures` (whether it can be a CUDA graph); or `error`. Operators of `SIZE_OPS` are off
        CUDA where they compute sizes.
    """
    with tempfile.TemporaryDirectory() as folder:
        build_stubs(site, Path(folder))
        env = os.environ | {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": folder}
        words = [sys.executable, "-c", PLACE, *map(str, graphs)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(graphs), done.stderr[-2000:]
    return lines


def build_stubs(site: Path, folder: Path) -> None:
    """Compile a stand-in for each CUDA library that the provider in `site` is linked to."""
    provider = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    table = _output(["nm", "-D", "--undefined-only", str(provider)])
    wanted = {line.split()[-1].partition("@")[0] for line in table.splitlines()}
    for library, pattern in LIBRARIES.items():
        names = sorted(name for name in wanted if re.match(pattern, name))
        code = HEAD + "".join(f"long {n}{BODIES.get(n, '() { return 0; }')}\n" for n in names)
        (folder / "stub.c").write_text(code)
        (folder / "stub.map").write_text(f"{library} {{ global: *; }};\n")
        flags = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        script = f"-Wl,--version-script={folder / 'stub.map'}"
        _output(["gcc", *flags, script, "-o", str(folder / library), str(folder / "stub.c")])


def _output(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for found in place(Path(sys.argv[1]), [Path(x) for x in sys.argv[2:]]):
        print(json.dumps(found))
