"""The entry point: `main` runs one verb and turns every error into one line and an exit code.

Exit codes: 0 done, 1 the answer of `explain` is no, 2 an error with a code (bad input included),
70 an internal error (KVX800), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from kvxform.cli import (
    bench,
    bisect,
    check,
    codegen,
    demo,
    diff,
    evaluate,
    explain,
    export,
    generate,
    heal,
    lock,
    optimize,
    passes,
    plan,
    recipes,
    verify,
)
from kvxform.cli.output import print_data, talk
from kvxform.errors import KvxformError

EXIT_ERROR = 2
EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="kvxform",
    help="A compiler for the KV cache of decoder language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("optimize")(optimize.run)
app.command("heal")(heal.run)
app.command("export")(export.run)
app.command("codegen")(codegen.run)
app.command("generate")(generate.run)
app.command("plan")(plan.run)
app.command("explain")(explain.run)
app.command("passes")(passes.run)
app.add_typer(recipes.app, name="recipes")
app.command("lock")(lock.run)
app.command("check")(check.run)
app.command("diff")(diff.run)
app.command("verify")(verify.run)
app.command("eval")(evaluate.run)
app.command("bench")(bench.run)
app.command("bisect")(bisect.run)
app.command("demo")(demo.run)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_data(f"kvxform {version('kvxform')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print tracebacks and warnings; may stand anywhere.")
    ] = False,
) -> None:
    """A compiler for the KV cache of decoder language models."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        args: Words after the program name; those of the process if None.
    """
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug:
        _silence_libraries()
    try:
        return _run(words)
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        talk("interrupted")
        return EXIT_INTERRUPTED
    except KvxformError as error:
        if debug:
            traceback.print_exc()
        talk(str(error))
        return EXIT_ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
        talk(str(_internal_error(error)))
        return EXIT_INTERNAL


def _run(words: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(words, prog_name="kvxform", standalone_mode=False)
    except typer.TyperException as error:
        raise _usage_error(error) from error
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _usage_error(error: typer.TyperException) -> KvxformError:
    """Return what typer found wrong with the command line as KVX801."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "kvxform"
    return KvxformError("KVX801", message, hint=f"see {verb} --help")


def _internal_error(error: Exception) -> KvxformError:
    """Return an exception that nobody foresaw as one line."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    rule = f"internal error: {shown[:300]}".rstrip(".")
    return KvxformError("KVX800", rule, hint="run again with --debug and report the traceback")


def _silence_libraries() -> None:
    """Keep warnings and notes of torch and transformers out of what people read."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
