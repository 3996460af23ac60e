"""The command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version as installed
from platform import python_version
from typing import Annotated

import typer

import ragcache
from ragcache.cli import (
    corpus_commands,
    evaluation_commands,
    question_commands,
    store_commands,
)
from ragcache.cli.options import NO_CHUNKS
from ragcache.cli.output import Quiet, Verbose, out, speak, spoken, tell
from ragcache.cli.render.screen import replace_unencodable
from ragcache.errors import NoChunksError, RagCacheError

__all__ = ["main"]

app = typer.Typer(
    help="Reuse the KV of retrieved chunks in any RAG prompt.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
#: In the order of ``ragcache --help``.
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Documents and questions": {
        "index": spoken(question_commands.index, kept=True),
        "query": spoken(question_commands.query),
        "serve": spoken(question_commands.serve, figures=False, until_stopped=True),
        "precompute": spoken(corpus_commands.precompute, kept=True),
        "batch": spoken(corpus_commands.batch, kept=True),
        "demo": spoken(question_commands.demo),
    },
    "Quality and speed": {
        "eval": spoken(evaluation_commands.evaluate),
        "calibrate": spoken(evaluation_commands.calibrate),
        "profile": spoken(evaluation_commands.profile),
        "models": spoken(evaluation_commands.models),
        "plan": spoken(corpus_commands.plan_corpora),
        "simulate": spoken(evaluation_commands.simulate),
    },
    "The store": {
        "documents": spoken(store_commands.documents),
        "delete": spoken(store_commands.delete, kept=True),
        "stats": spoken(store_commands.stats),
        "verify": spoken(store_commands.verify),
        "convert": spoken(store_commands.convert, kept=True),
        "compact": spoken(store_commands.compact),
        "doctor": spoken(store_commands.doctor),
        "push": spoken(store_commands.push, kept=True),
        "pull": spoken(store_commands.pull, kept=True),
    },
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        others = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers"))
        out.print(
            f"ragcache {ragcache.__version__} (Python {python_version()}, {others})",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit()


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    speak(quiet, verbose)


def main() -> None:
    """Entry point. A RagCacheError is printed as one message, without a traceback; the exit code is
    1, or 4 if there are no chunks to answer from."""
    replace_unencodable((sys.stdout, sys.stderr))
    if not sys.stderr.isatty():  # keep other libraries' progress bars out of logs and pipes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RagCacheError as error:
        tell("error", error, "bold red")
        sys.exit(NO_CHUNKS if isinstance(error, NoChunksError) else 1)
