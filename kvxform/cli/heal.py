"""`kvxform heal`: train what structure passes touched, and write the healed artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvxform.cli.options import Json, Out
from kvxform.cli.output import print_json, print_table, talk

if TYPE_CHECKING:
    from kvxform.healing_record import HealingRecord

Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Folder that `kvxform optimize` wrote.")
]
Source = Annotated[str, typer.Option("--source", help="The MODEL it was made from.")]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 file to train on; default: help topics of the library."),
]
StepsLocal = Annotated[
    int, typer.Option("--steps-local", help="Steps on the outputs of single attentions.")
]
Steps = Annotated[int, typer.Option("--steps", help="Steps on the logits of the whole model.")]
Rate = Annotated[
    float | None,
    typer.Option("--lr", help="Longest step; default 2e-4, or 1e-3 with --lora."),
]
Lora = Annotated[
    int | None, typer.Option("--lora", help="Train additions of this rank, merged at the end.")
]
Full = Annotated[bool, typer.Option("--full", help="Train whole weights, which is the default.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Windows of a step.")]
Window = Annotated[int, typer.Option("--window", help="Tokens of a window.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the order of the text and the additions.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to train, as cuda.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run to the same OUT was.")
]


def run(
    artifact: Artifact,
    source: Source,
    out: Out,
    text: TextFile = None,
    steps_local: StepsLocal = 100,
    steps: Steps = 300,
    lr: Rate = None,
    lora: Lora = None,
    full: Full = False,
    batch_size: BatchSize = 8,
    window: Window = 512,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train what structure passes touched, against the source model."""
    import kvxform
    from kvxform.atomic import check_replaceable
    from kvxform.errors import KvxformError
    from kvxform.healing.options import HealOptions

    if full and lora is not None:
        rule = "weights are trained in full or by additions, not both"
        raise KvxformError("KVX801", rule, where="heal", hint="drop --full or --lora")
    options = HealOptions(
        steps_local=steps_local,
        steps=steps,
        learning_rate=lr,
        rank=lora,
        seed=seed,
        batch_size=batch_size,
        window=window,
    )
    check_replaceable(out)
    checkpoint = out.with_name(f".{out.name}.healing.safetensors")
    try:
        healed = kvxform.heal(
            artifact,
            source,
            text=text,
            options=options,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            talk("kvxform: the same command with --resume goes on from here")
        raise
    healed.save(out)
    record = healed.report.healing
    assert record is not None, "it has just been healed"
    if json:
        print_json({**_data(record), "files": {"artifact": str(out)}})
    else:
        print_table(("what", "before", "after"), _rows(record, out), right=(1, 2))


def _data(record: HealingRecord) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(record)


def _rows(record: HealingRecord, out: Path) -> list[tuple[str, str, str]]:
    before, after = record.before, record.after
    rows = [
        ("perplexity, held-out text", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}"),
        ("KL to the source, nats per token", f"{before.kl:.3e}", f"{after.kl:.3e}"),
        ("same greedy token", f"{before.top1:.1%}", f"{after.top1:.1%}"),
    ]
    rows += [
        (f"attention error, layer {x.layer}", f"{x.before:.3f}", f"{x.after:.3f}")
        for x in record.layers
    ]
    return [
        *rows,
        ("perplexity of the source", "", f"{record.source_perplexity:.4f}"),
        ("numbers trained", "", f"{record.parameters:,}".replace(",", " ")),
        ("artifact", "", str(out)),
    ]
