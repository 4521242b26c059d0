r"""Quality per true bit of caches of SmolLM2-135M: recipes, and Hugging Face's QuantizedCache.

    python benchmarks/quality.py --text wikitext2/test.txt --calibration wikitext2/valid.txt \
        --json benchmarks/results/quality.json
    python benchmarks/quality.py --only kv4,hf-quanto --json ...  # some rows; the others stay
    python benchmarks/quality.py --device cuda --jobs 6 --json ... # rows side by side, one file
    python benchmarks/quality_page.py                              # docs/quality.md and the plot

Each row is written as soon as it is measured. With `--missing` rows that the file has are left out,
so that an interrupted run goes on where it stopped. Perplexity is measured in both protocols over
the same windows, `decode` on the first `--decode-window` tokens of each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from results import (
    ResultFile,
    Row,
    add_common_options,
    describe_command,
    describe_run,
    first_line,
    format_table,
    is_wanted,
)

from kvxform.evaluate.scorecard import Effort
from kvxform.evaluate.tables import HEADINGS, table_rows
from kvxform.quality import ALL, QualityRun, expand_names

MODEL = "smollm2-135m"
BENCHMARK = "quality"


def main() -> None:
    """Measure the rows that are asked for."""
    options = parse_options()
    file = ResultFile(options.json, BENCHMARK)
    names = [
        name
        for name in expand_names(options.formats)
        if is_wanted(name, options.only) and not (options.missing and name in file.rows)
    ]
    if options.jobs > 1:
        run_side_by_side(names, options)
        file = ResultFile(options.json, BENCHMARK)
    else:
        measure_rows(names, file, options)
    print_rows([row for key, row in file.rows.items() if key in names])


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokenizer", type=Path, help="folder; default: that of the model")
    parser.add_argument("--formats", default=ALL, help="comma separated names, or all")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's help topics")
    parser.add_argument("--calibration", type=Path, help="text for statistics; likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure side by side")
    parser.add_argument("--missing", action="store_true", help="only rows that are not there yet")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--decode-window", type=int, default=256)
    parser.add_argument("--passkey", default="1024,2048,4096", help="lengths of prompts")
    parser.add_argument("--keys", type=int, default=2, help="numbers hidden at each depth")
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a prefill")
    return parser.parse_args()


def measure_rows(names: Sequence[str], file: ResultFile, options: argparse.Namespace) -> None:
    """Measure rows one after the other; one that fails says why and stops nothing."""
    lengths = [int(word) for word in options.passkey.split(",") if word]
    effort = Effort(
        window=options.window,
        windows=options.windows,
        decode_window=options.decode_window,
        batch_size=options.batch_size,
        passkey_lengths=tuple(lengths),
        passkey_keys=options.keys,
    )
    run = QualityRun(
        options.model,
        effort,
        text=options.text,
        calibration=options.calibration,
        tokenizer=options.tokenizer,
        device=options.device,
    )
    file.start_run({**describe_run(options), "command": public_command(sys.argv)})
    for name in names:
        start = time.perf_counter()
        try:
            row: Row = run.measure(name).to_dict()
        except Exception as error:  # other rows are worth having
            traceback.print_exc()
            row = {"name": name, "error": first_line(error)}
        file.add(name, {**row, "seconds": round(time.perf_counter() - start, 1)})
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def run_side_by_side(names: Sequence[str], options: argparse.Namespace) -> None:
    """Deal the rows out to processes, and join what they write into the result file."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{job}.json" for job in range(options.jobs)]
        shares = [names[job :: options.jobs] for job in range(options.jobs)]
        passed = own_arguments(sys.argv[1:])
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *passed, "--formats", ",".join(share),
                 "--jobs", "1", "--json", str(part)]
            )
            for share, part in zip(shares, parts, strict=True)
            if share
        ]  # fmt: skip
        for process in started:
            process.wait()
        merge(options.json, [part for part in parts if part.exists()])


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that a process of a share gets too."""
    dropped, kept, skip = ("--formats", "--jobs", "--json", "--only"), [], False
    for argument in arguments:
        if not skip and argument not in dropped:
            kept.append(argument)
        skip = argument in dropped
    return kept


def merge(path: Path | None, parts: Sequence[Path]) -> None:
    """Put the rows of `parts`, files of one run, into the result file as one run."""
    file = ResultFile(path, BENCHMARK)
    for number, part in enumerate(parts):
        share = ResultFile(part, BENCHMARK)
        if number == 0:
            file.start_run({**share.runs[-1], "command": public_command(sys.argv)})
        for key, row in share.rows.items():
            file.add(key, {k: v for k, v in row.items() if k not in ("key", "run")})


def public_command(arguments: Sequence[str]) -> str:
    """Return the command as a reader would type it: places of files on this machine left out."""
    kept, skip = [arguments[0]], False
    for argument in arguments[1:]:
        if not skip and argument not in ("--model", "--tokenizer"):
            kept.append(Path(argument).name if "/" in argument else argument)
        skip = argument in ("--model", "--tokenizer")
    return describe_command(kept)


def print_rows(rows: Sequence[Row]) -> None:
    """Print one table, and the rows that failed."""
    done = [row for row in rows if "error" not in row]
    print(format_table(HEADINGS, table_rows(done)))
    for row in rows:
        if "error" in row:
            print(f"{row['name']}: {row['error']}")


if __name__ == "__main__":
    main()
