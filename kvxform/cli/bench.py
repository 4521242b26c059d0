"""`kvxform bench`: how fast an artifact, an ONNX package or a model runs on this machine."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.options import Json, OptionalRecipe, RunProvider, Target
from kvxform.cli.output import format_bytes, plain_table, print_data, print_json, talk
from kvxform.cli.targets import Opened, open_target
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.evaluate.bench import Rate, Speed

Prompt = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Decode steps after it.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences that run together.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the median counts.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; default: those of the machine."),
]


def run(
    target: Target,
    recipe: OptionalRecipe = None,
    provider: RunProvider = None,
    prompt_tokens: Prompt = 512,
    new_tokens: NewTokens = 32,
    batch: Batch = 1,
    repeats: Repeats = 3,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure prefill, decode, the first token and memory, on random tokens."""
    import torch

    from kvxform.evaluate.bench import measure_speed
    from kvxform.evaluate.runners import make_runner

    if threads is not None:
        torch.set_num_threads(threads)
    length = prompt_tokens + new_tokens
    opened = open_target(target, recipe, provider=provider, max_length=length, threads=threads)
    check_length(opened, length)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model_size(opened, "vocab_size", "vocab_size")
    assert vocab_size is not None, "every model has a vocabulary"
    ids = torch.randint(vocab_size, (batch, prompt_tokens), generator=generator)
    runner = make_runner(opened.model, length)
    (speed,) = measure_speed(
        {target: runner},
        ids,
        new_tokens=new_tokens,
        repeats=repeats,
        progress=lambda done: talk(f"round {done} of {repeats}"),
    ).values()
    cache_bytes = runner.cache_bytes() if hasattr(runner, "cache_bytes") else None
    data = bench_data(target, opened, speed, cache_bytes)
    if json:
        print_json(data)
    else:
        print_data(bench_text(data))


def model_size(opened: Opened, name: str, of_config: str) -> int | None:
    """Return a size that a model states: `name` of our own, `of_config` in transformers."""
    model = opened.model
    if hasattr(model, "program"):
        size = getattr(model.program.info, name)
    elif hasattr(model, "info"):
        size = model.info[name]
    else:
        size = getattr(model.config, of_config, None)
    return None if size is None else int(size)


def check_length(opened: Opened, length: int) -> None:
    """Refuse more tokens than a model can take.

    Raises:
        KvxformError: KVX801 with the options that say how many there are.
    """
    longest = model_size(opened, "context_length", "max_position_embeddings")
    if longest is not None and length > longest:
        rule = f"prompt and new tokens must fit into the {longest} that the model can take"
        hint = "give fewer by --prompt-tokens and --new-tokens"
        raise KvxformError("KVX801", rule, got=length, hint=hint)


def bench_data(
    target: str, opened: Opened, speed: Speed, cache_bytes: int | None
) -> dict[str, Any]:
    """Return what was measured as plain data; rates are tokens of all rows per second.

    Args:
        target: What the user named.
        opened: The model.
        speed: What the timer says.
        cache_bytes: Bytes of the cache at the end, or None if nobody knows.
    """
    import torch

    from kvxform.evaluate.bench import peak_bytes

    model = opened.model
    onnx = model.description["onnx"] if hasattr(model, "description") else None
    return {
        "target": Path(target).name,
        "package": onnx and {key: onnx[key] for key in ("level", "opset", "cache", "logits")},
        "provider": getattr(model, "provider", None),
        "runtime": _runtime(is_package=onnx is not None),
        "threads": torch.get_num_threads(),
        "batch": speed.batch_size,
        "prompt_tokens": speed.prompt_tokens,
        "new_tokens": speed.new_tokens,
        "repeats": speed.repeats,
        "prefill_tokens_per_s": _rate_data(speed.prefill),
        "decode_tokens_per_s": _rate_data(speed.decode),
        "first_token_s": speed.first_token_s,
        "cache_bytes": cache_bytes,
        "peak_bytes": peak_bytes(),
        "gpu_bytes": _gpu_bytes(),
    }


def bench_text(data: dict[str, Any]) -> str:
    """Return the measurements as text for people."""
    rows = [
        (label, *(f"{data[key][name]:.1f}" for name in ("median", "slowest", "fastest")))
        for label, key in (
            ("prefill, tokens/s", "prefill_tokens_per_s"),
            ("decode, tokens/s", "decode_tokens_per_s"),
        )
    ]
    table = plain_table(("", "median", "slowest", "fastest"), rows, right=(1, 2, 3))
    lines = [_heading(data), table, f"first token after {1000 * data['first_token_s']:.1f} ms"]
    sizes = [
        (label, data[key])
        for label, key in (
            ("cache", "cache_bytes"),
            ("peak of the process", "peak_bytes"),
            ("in use on the GPU", "gpu_bytes"),
        )
    ]
    lines.append(
        "; ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size is not None)
    )
    return "\n".join(lines)


def _heading(data: dict[str, Any]) -> str:
    kind = data["runtime"]
    if data["package"] is not None:
        package = data["package"]
        kind = f"{package['level']}, cache {package['cache']}, {kind} on {data['provider']}"
    tokens = f"{data['prompt_tokens']} + {data['new_tokens']} tokens"
    return f"{data['target']}: {kind}; batch {data['batch']}, {tokens}, {data['threads']} threads"


def _rate_data(rate: Rate) -> dict[str, float]:
    return {"median": rate.median, "slowest": rate.slowest, "fastest": rate.fastest}


def _runtime(*, is_package: bool) -> str:
    """Return what ran the model, with its version."""
    if not is_package:
        return f"torch {version('torch')}"
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _gpu_bytes() -> int | None:
    """Return bytes in use on the GPU, by all processes; None without one in use here."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free
