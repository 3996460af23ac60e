"""Output of commands: results on stdout, as text or JSON, and everything else on stderr."""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.text import Text

from ragcache.cli import render
from ragcache.errors import RagCacheError
from ragcache.settings.renamed import RENAMED, RenamedWarning, by_new_names

# Brackets in names, questions and messages are not markup.
out, err = render.Screen(markup=False), render.Screen(stderr=True, markup=False)

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it


@dataclass(frozen=True, slots=True)
class Manner:
    """How the running command prints."""

    json: bool = False  # one JSON object instead of text
    quiet: bool = False  # no progress and no notes
    verbose: bool = False  # debug logs, and tracebacks of errors


_PLAIN = Manner()
_MANNER: ContextVar[Manner] = ContextVar("manner", default=_PLAIN)

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results and errors: no progress, no notes."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print debug logs, and tracebacks of errors.")
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; docs/scripting.md lists its keys.")
]
# Both are accepted before the command, where --help shows them, and after it.
_QuietToo = Annotated[bool, typer.Option("--quiet", "-q", hidden=True)]
_VerboseToo = Annotated[bool, typer.Option("--verbose", "-v", hidden=True)]


def speak(quiet: bool, verbose: bool) -> None:
    """Set how every command prints from here on."""
    _MANNER.set(Manner(quiet=quiet, verbose=verbose))


def with_common_options(
    command: Callable[..., None],
    *,
    figures: bool = True,
    kept: bool = False,
    until_stopped: bool = False,
) -> Callable[..., None]:
    """``command`` with the options of all commands: --quiet, --verbose, --json if it prints
    ``figures``, and old names of its own options. ``kept``: after Ctrl-C, a second run continues
    the first; ``until_stopped``: Ctrl-C is the usual end, without a message."""

    @wraps(command)
    def run(
        *, as_json: bool = False, quiet: bool = False, verbose: bool = False, **given: object
    ) -> None:
        before = _MANNER.get()
        manner = Manner(as_json, quiet or before.quiet, verbose or before.verbose)
        if manner.quiet and manner.verbose:
            raise typer.BadParameter("--quiet and --verbose contradict each other: give one")
        with _speaking(manner), _renamed_on_stderr():
            try:
                command(**by_new_names(given, plain.parameters, _flag))
            except KeyboardInterrupt:
                after = "what is done is kept: run the same command again to continue"
                if not until_stopped:
                    print_note("interrupted", after if kept else "nothing more is done")
                raise typer.Exit(INTERRUPTED) from None
            except RagCacheError:
                if manner.verbose:
                    traceback.print_exc()
                raise

    more = {"as_json": _Json} if figures else {}
    more |= {"quiet": _QuietToo, "verbose": _VerboseToo}
    plain = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in more.items()
    ]
    options += [
        inspect.Parameter(
            old,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(_flag(old), hidden=True)],
        )
        for old, new in RENAMED.items()
        if new in plain.parameters
    ]
    signature = plain.replace(parameters=[*plain.parameters.values(), *options])
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def _renamed_on_stderr() -> Iterator[None]:
    """Print warnings of old names of settings as lines on stderr, each once."""
    printed: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RenamedWarning):
                show(message, category, filename, lineno, file, line)
            elif (said := str(message)) not in printed:
                printed.add(said)
                print_note("deprecated", said)

        warnings.simplefilter("always", RenamedWarning)
        warnings.showwarning = shown
        yield


@contextmanager
def _speaking(manner: Manner) -> Iterator[None]:
    token = _MANNER.set(manner)
    logger, level = logging.getLogger("ragcache"), logging.getLogger("ragcache").level
    out.quiet = manner.json
    if manner.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logger.setLevel(logging.DEBUG)
    elif manner.quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _MANNER.reset(token)
        out.quiet = False
        logger.setLevel(level)


def figures(found: Mapping[str, object]) -> None:
    """With --json, print the results of the command as one JSON object."""
    if _MANNER.get().json:
        try:
            sys.stdout.write(as_json(found) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            out.on_broken_pipe()


def as_json(found: Mapping[str, object]) -> str:
    """JSON in ASCII; NaN and infinity are null."""
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: object) -> object:
    match value:
        case Mapping():
            return {str(key): _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case float() if not math.isfinite(value):
            return None
        case Path():
            return str(value)
        case _:
            return value


def progress() -> AbstractContextManager[render.ProgressReporter]:
    """Show progress on stderr, unless --quiet is given."""
    return nullcontext(render.ProgressReporter()) if _MANNER.get().quiet else render.progress(err)


def waiting(what: str) -> AbstractContextManager[None]:
    """Show on stderr that ``what`` is in progress, where its length is unknown."""
    return nullcontext() if _MANNER.get().quiet else render.waiting(err, what)


def loading(model: str) -> None:
    """Print on stderr that a model is being loaded."""
    if not _MANNER.get().quiet:
        err.print(f"loading model {model}", highlight=False, soft_wrap=True)


def print_note(label: str, text: object, style: str = "yellow") -> None:
    """Print a message on stderr, on a line of its own. With --quiet, only what the exit code
    reports: errors, interruptions, and answers without chunks."""
    if _MANNER.get().quiet and label not in ("error", "interrupted", "nothing to answer from"):
        return
    said = render.plain(str(text))
    err.print(Text.assemble((f"{label}:", style), f" {said}"), soft_wrap=True)
