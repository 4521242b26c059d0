"""`kvxform demo`: one model through the whole compiler, and one table of what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.atomic import check_replaceable
from kvxform.cli.generate import encode_prompt
from kvxform.cli.optimize import summarize
from kvxform.cli.options import Json
from kvxform.cli.output import (
    format_bytes,
    plain_table,
    print_data,
    print_json,
    print_table,
    progress_bar,
    talk,
)
from kvxform.cli.targets import need_tokenizer, open_source_model

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = "The three most important things to know about the history of computing are"

DemoModel = Annotated[str, typer.Option("--model", help="Model, as for optimize.")]
DemoRecipe = Annotated[str, typer.Option("--recipe", "-r", help="Recipe, as for optimize.")]
DemoOut = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is made.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="Text for perplexity; default: help topics of the library."),
]
Window = Annotated[int, typer.Option("--window", help="Tokens of a perplexity window.")]
Windows = Annotated[int, typer.Option("--windows", help="Number of perplexity windows.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]


BENCH_PROMPT, BENCH_TOKENS, BENCH_REPEATS = 256, 32, 3


def run(
    out: DemoOut = Path("demo-out"),
    model: DemoModel = "smollm2-135m",
    recipe: DemoRecipe = "kv4",
    prompt: Prompt = PROMPT,
    text: TextFile = None,
    max_new_tokens: NewTokens = 48,
    window: Window = 512,
    windows: Windows = 2,
    json: Json = False,
) -> None:
    """Optimise, verify, export, generate and measure; print one table."""
    import kvxform
    from kvxform.runtime.onnx_session import OnnxSession
    from kvxform.texts import encode_text, read_text

    words = read_text(text)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("artifact", "onnx"):
        check_replaceable(out / name)
    optimized = kvxform.optimize(model, recipe)
    talk("kvxform: saving the artifact")
    optimized.save(out / "artifact")
    talk("kvxform: writing the ONNX package")
    optimized.export_onnx(out / "onnx")
    source = open_source_model(model)
    tokenizer = need_tokenizer(source.tokenizer, model)
    models = {"source": source.model, "torch": optimized, "onnx": OnnxSession(out / "onnx")}
    tokens = encode_text(tokenizer, words)
    input_ids = encode_prompt(tokenizer, prompt, chat=False)
    data = {
        **summarize(optimized.report),
        "evaluation": _evaluate(models, tokens, window, windows),
        "speed": _time(models, tokens),
        "prompt": prompt,
        "texts": {
            name: tokenizer.decode(ids, skip_special_tokens=True)
            for name, ids in _generate(models, input_ids, max_new_tokens, source.eos_token_ids)
        },
        "files": {
            "artifact": str(out / "artifact"),
            "report": str(out / "artifact" / "report.html"),
            "onnx": str(out / "onnx"),
        },
    }
    if json:
        print_json(data)
    else:
        _print(data)


def _evaluate(
    models: dict[str, Any], tokens: Tensor, window: int, windows: int
) -> dict[str, dict[str, Any]]:
    """Return perplexity of each model, and KL of all but the source."""
    from kvxform.evaluate.perplexity import evaluate
    from kvxform.evaluate.runners import make_runner

    talk(f"kvxform: perplexity on {windows} x {window} tokens")
    reference = make_runner(models["source"], window)
    results = {}
    for name in ("torch", "onnx"):
        with progress_bar(f"perplexity, {name}", windows) as advance:
            result = evaluate(
                make_runner(models[name], window),
                tokens,
                window=window,
                windows=windows,
                reference=reference,
                progress=advance,
            )
        results[name] = result.to_dict()
    return results


def _time(models: dict[str, Any], tokens: Tensor) -> dict[str, dict[str, Any]]:
    """Return tokens per second of each model."""
    from kvxform.evaluate.bench import measure_speed
    from kvxform.evaluate.runners import make_runner

    talk(f"kvxform: speed, {BENCH_PROMPT} prompt tokens and {BENCH_TOKENS} new ones")
    runners = {
        name: make_runner(model, BENCH_PROMPT + BENCH_TOKENS) for name, model in models.items()
    }
    with progress_bar("speed", BENCH_REPEATS) as advance:
        speeds = measure_speed(
            runners,
            tokens[None, :BENCH_PROMPT],
            new_tokens=BENCH_TOKENS,
            repeats=BENCH_REPEATS,
            progress=advance,
        )
    return {name: dataclasses.asdict(speed) for name, speed in speeds.items()}


def _generate(
    models: dict[str, Any], input_ids: Tensor, max_new_tokens: int, eos: tuple[int, ...]
) -> Iterator[tuple[str, list[int]]]:
    """Yield the greedy continuation of each model."""
    from kvxform.evaluate.runners import make_runner
    from kvxform.runtime.generate import GenerationOptions, run_loop

    talk(f"kvxform: generating {max_new_tokens} tokens with each model")
    options = GenerationOptions(max_new_tokens, eos_token_ids=eos)
    for name, model in models.items():
        runner = make_runner(model, input_ids.shape[1] + max_new_tokens)
        ids = run_loop(input_ids, runner.prefill(input_ids), runner.decode, options)
        yield name, ids[0, input_ids.shape[1] :].tolist()


def _print(data: dict[str, Any]) -> None:
    """Print the table, the files and the texts."""
    evaluation, speed = data["evaluation"], data["speed"]
    torch_eval, onnx_eval = evaluation["torch"], evaluation["onnx"]
    before = format_bytes(data["bytes_per_token_before"]) + " (16 bit)"
    after, bits = format_bytes(data["bytes_per_token"]), f"{data['bits_per_value']:.2f}"
    rows = [
        ("cache per token", before, after, after),
        ("true bits per value", "16.00", bits, bits),
        ("perplexity", *(f"{p:.2f}" for p in _perplexities(evaluation))),
        ("KL to the source, nats", "0", f"{torch_eval['kl']:.4f}", f"{onnx_eval['kl']:.4f}"),
        (
            "same likeliest token",
            "100%",
            f"{torch_eval['top1_agreement']:.1%}",
            f"{onnx_eval['top1_agreement']:.1%}",
        ),
    ]
    rows += [
        (f"{kind}, tokens/s", *(f"{speed[name][kind]['median']:.1f}" for name in speed))
        for kind in ("prefill", "decode")
    ]
    heading = f"{data['model']}, {data['recipe']}"
    print_table((heading, "source", "torch", "onnx"), rows, right=(1, 2, 3))
    print_data(f"""
perplexity on {torch_eval["windows"]} x {torch_eval["window"]} tokens, {torch_eval["protocol"]}; \
speed: median of {BENCH_REPEATS}, {BENCH_PROMPT} prompt tokens, {BENCH_TOKENS} new ones, batch 1
""")
    print_data(plain_table(("files", ""), list(data["files"].items())))
    print_data(f"\nprompt: {data['prompt']}")
    for name, text in data["texts"].items():
        print_data(f"\n[{name}] {' '.join(text.split())}")


def _perplexities(evaluation: dict[str, dict[str, Any]]) -> tuple[float, float, float]:
    torch_eval, onnx_eval = evaluation["torch"], evaluation["onnx"]
    return torch_eval["reference_perplexity"], torch_eval["perplexity"], onnx_eval["perplexity"]
