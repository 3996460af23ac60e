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
from ragcache.cli.output import Quiet, Verbose, out, print_note, speak, with_common_options
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
        "index": with_common_options(question_commands.index, kept=True),
        "query": with_common_options(question_commands.query),
        "serve": with_common_options(question_commands.serve, figures=False, until_stopped=True),
        "precompute": with_common_options(corpus_commands.precompute, kept=True),
        "batch": with_common_options(corpus_commands.batch, kept=True),
        "demo": with_common_options(question_commands.demo),
    },
    "Quality and speed": {
        "eval": with_common_options(evaluation_commands.evaluate),
        "calibrate": with_common_options(evaluation_commands.calibrate),
        "profile": with_common_options(evaluation_commands.profile),
        "models": with_common_options(evaluation_commands.models),
        "plan": with_common_options(corpus_commands.plan_corpora),
        "simulate": with_common_options(evaluation_commands.simulate),
    },
    "The store": {
        "documents": with_common_options(store_commands.documents),
        "delete": with_common_options(store_commands.delete, kept=True),
        "stats": with_common_options(store_commands.stats),
        "verify": with_common_options(store_commands.verify),
        "convert": with_common_options(store_commands.convert, kept=True),
        "compact": with_common_options(store_commands.compact),
        "doctor": with_common_options(store_commands.doctor),
        "push": with_common_options(store_commands.push, kept=True),
        "pull": with_common_options(store_commands.pull, kept=True),
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
        print_note("error", error, "bold red")
        sys.exit(NO_CHUNKS if isinstance(error, NoChunksError) else 1)
