"""`kvxform generate`: continue a prompt with an artifact, an ONNX package or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.options import Json, OptionalRecipe, RunProvider, Target
from kvxform.cli.output import print_data, print_json
from kvxform.cli.targets import need_tokenizer, open_target
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from torch import Tensor

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to add.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from so many tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the tokens with this mass.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
SeqLen = Annotated[
    int | None,
    typer.Option("--max-seq-len", help="Room of the cache in tokens; default: what is needed."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")]


def run(
    target: Target,
    prompt: Prompt,
    recipe: OptionalRecipe = None,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    max_seq_len: SeqLen = None,
    chat: Chat = False,
    provider: RunProvider = None,
    json: Json = False,
) -> None:
    """Continue a prompt and print the new text."""
    import torch

    from kvxform.evaluate.runners import make_runner
    from kvxform.runtime.generate import GenerationOptions, run_loop

    opened = open_target(target, recipe, provider=provider, max_length=max_seq_len)
    tokenizer = need_tokenizer(opened.tokenizer, target)
    input_ids = encode_prompt(tokenizer, prompt, chat=chat)
    options = GenerationOptions(
        max_new_tokens,
        do_sample=temperature != 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        eos_token_ids=opened.eos_token_ids,
    )
    if max_seq_len is not None and isinstance(opened.model, torch.nn.Module):
        rule = "--max-seq-len is for artifacts, packages and recipes"
        raise KvxformError("KVX801", rule, got=repr(target), hint="drop it")
    runner = make_runner(opened.model, max_seq_len or input_ids.shape[1] + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = run_loop(
        input_ids, runner.prefill(input_ids), runner.decode, options, generator=generator
    )
    new_ids = ids[0, input_ids.shape[1] :].tolist()
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    if json:
        print_json({"prompt": prompt, "text": text, "token_ids": new_ids})
    else:
        print_data(text)


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """Return the tokens of a prompt, int64 `[1, S]`.

    Raises:
        KvxformError: KVX801 for an empty prompt, or a chat with a tokenizer without a template.
    """
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise KvxformError("KVX801", "--chat needs a tokenizer with a chat template")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise KvxformError("KVX801", "a prompt must have one token or more", got=repr(prompt))
    return torch.tensor([ids], dtype=torch.int64)
