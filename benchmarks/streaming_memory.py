"""Peak memory of `kvxform optimize` on a large checkpoint with random weights, on the CPU.

    python benchmarks/streaming_memory.py --gigabytes 3 --recipe kv4 --json streaming.json

Writes a Llama checkpoint of the given size into a temporary folder, layer by layer, runs the
command line on it in a process of its own, and asks the system for the peak of its resident memory
(`ru_maxrss`: mapped files, libraries and the interpreter included).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 32, 4, 64, 32_000


def main() -> None:
    """Write the checkpoint, measure, print and write JSON if asked."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint, out = Path(folder, "checkpoint"), Path(folder, "out")
        size = write_checkpoint(checkpoint, int(options.gigabytes * 1e9))
        measured = optimize(checkpoint, out, options.recipe)
        artifact = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    result = {
        "recipe": options.recipe,
        "checkpoint_bytes": size,
        "artifact_bytes": artifact,
        **measured,
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--recipe", default="kv4", help="name or path")
    parser.add_argument("--folder", type=Path, help="where temporary files go; must be a disk")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def write_checkpoint(folder: Path, size: int) -> int:
    """Write a float32 Llama of about `size` bytes, one shard a layer, and return its size."""
    folder.mkdir()
    ends = 2 * VOCAB * HIDDEN * 4
    layers = max(1, round((size - ends) / layer_bytes()))
    generator = torch.Generator().manual_seed(0)
    where, total = {}, 0
    for number, tensors in enumerate(make_shards(layers, generator)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(make_config(layers)))
    return total


def layer_bytes() -> int:
    """Return the bytes of one layer."""
    attention = 2 * HIDDEN * HEAD_DIM * (HEADS + KV_HEADS)
    return 4 * (attention + 3 * HIDDEN * INNER + 2 * HIDDEN)


def make_shards(layers: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights of each layer, then embedding, last norm and head."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.02

    def gain() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator)

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield {
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INNER, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INNER),
            f"{prefix}.input_layernorm.weight": gain(),
            f"{prefix}.post_attention_layernorm.weight": gain(),
        }
    yield {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": gain()}
    yield {"lm_head.weight": matrix(VOCAB, HIDDEN)}


def make_config(layers: int) -> dict[str, object]:
    """Return the content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def optimize(checkpoint: Path, out: Path, recipe: str) -> dict[str, object]:
    """Run `kvxform optimize` and return its times and peak memory in bytes."""
    words = ["optimize", str(checkpoint), "-r", recipe, "-o", str(out)]
    code = f"import sys; from kvxform.cli.main import main; sys.exit(main({words!r}))"
    environment = {**os.environ, "KVXFORM_CACHE_DIR": str(out.parent / "cache")}
    start = time.perf_counter()
    # Linux counts the memory of this process at the start as the child's; it must stay small.
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"kvxform optimize failed with {os.waitstatus_to_exitcode(status)}")
    return {
        "peak_resident_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def environment() -> dict[str, object]:
    """Return what the numbers depend on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("kvxform", "torch", "transformers", "safetensors")},
    }


if __name__ == "__main__":
    main()
