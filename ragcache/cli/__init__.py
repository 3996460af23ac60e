"""The command line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import typer

from ragcache.cli import asking, bulk, measuring, stores
from ragcache.cli.options import NO_CHUNKS, tell
from ragcache.errors import NoChunksError, RagCacheError

app = typer.Typer(
    help="Reuse the KV of retrieved chunks in any RAG prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
#: In the order of ``ragcache --help``.
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Documents and questions": {
        "index": asking.index,
        "query": asking.query,
        "serve": asking.serve,
        "precompute": bulk.precompute,
        "batch": bulk.batch,
        "demo": asking.demo,
    },
    "Quality and speed": {
        "eval": measuring.evaluate,
        "calibrate": measuring.calibrate,
        "profile": measuring.profile,
        "models": measuring.models,
        "plan": bulk.plan_corpora,
        "simulate": measuring.simulate,
    },
    "The store": {
        "documents": stores.documents,
        "delete": stores.delete,
        "stats": stores.stats,
        "verify": stores.verify,
        "convert": stores.convert,
        "compact": stores.compact,
        "doctor": stores.doctor,
        "push": stores.push,
        "pull": stores.pull,
    },
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """Entry point. What goes wrong on purpose is one message and exit code 1, not a traceback; 4
    where there is nothing to answer from."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may have bytes of any encoding
        with suppress(OSError):  # of a descriptor that has become a pipe
            sys.stdout.reconfigure(errors="replace")
    if not sys.stderr.isatty():  # keep other libraries' progress bars out of logs and pipes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RagCacheError as error:
        tell("error", error, "bold red")
        sys.exit(NO_CHUNKS if isinstance(error, NoChunksError) else 1)
