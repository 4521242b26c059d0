"""The table of `kvxform eval --recipes`: quality per true bit of many formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvxform.cli.output import print_json, print_table, talk


@dataclass(frozen=True)
class TableRequest:
    """What the command line asks for.

    Attributes:
        model: The source model, as MODEL.
        names: Formats, with commas between them.
        text: File that is measured on.
        calibration: File that statistics are collected on.
        window: Tokens of one window.
        windows: Number of windows.
        decode_window: Tokens of a window that are decoded one by one.
        passkey: Lengths of passkey prompts, with commas between them.
        device: Where everything runs.
        plot: SVG to write.
        json: Print JSON.
    """

    model: str
    names: str
    text: Path | None
    calibration: Path | None
    window: int
    windows: int
    decode_window: int
    passkey: str
    device: str | None
    plot: Path | None
    json: bool


def run_table(request: TableRequest) -> None:
    """Measure every format and print one table, or JSON."""
    from kvxform.evaluate.plotting import draw_quality
    from kvxform.evaluate.scorecard import Effort
    from kvxform.evaluate.tables import HEADINGS, NUMBERS, table_rows
    from kvxform.quality import QualityRun, check_names, expand_names

    effort = Effort(
        window=request.window,
        windows=request.windows,
        decode_window=min(request.decode_window, request.window),
        passkey_lengths=parse_lengths(request.passkey),
        encoding=request.json,  # the table has no room for it
    )
    names = expand_names(request.names)
    check_names(names)
    run = QualityRun(
        request.model,
        effort,
        text=request.text,
        calibration=request.calibration,
    )
    if request.device is not None:
        run.move(request.device)
    run.expect(names)
    cards = []
    for done, name in enumerate(names):
        talk(f"[{done + 1}/{len(names)}] {name}")
        cards.append(run.measure(run.open(name)))
    if request.plot is not None:
        draw_quality(cards, request.plot, highlight=("kvx-",))
        talk(f"wrote {request.plot}")
    if request.json:
        print_json({"model": request.model, "text": _source(request.text), "rows": cards})
        return
    print_table(HEADINGS, table_rows(cards), right=NUMBERS)


def parse_lengths(words: str) -> tuple[int, ...]:
    """Return numbers from a list with commas.

    Raises:
        KvxformError: KVX801 if one is not a number.
    """
    from kvxform.errors import KvxformError

    try:
        return tuple(int(word) for word in words.split(",") if word.strip())
    except ValueError as error:
        rule = "lengths must be whole numbers with commas between them"
        raise KvxformError("KVX801", rule, where="eval", got=repr(words)) from error


def _source(text: Path | None) -> str:
    return "help topics of the standard library" if text is None else str(text)
