"""What a command says: results on stdout, for people or as JSON, and all else on stderr."""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ragcache.cli import render
from ragcache.errors import RagCacheError

# Names, questions and messages have brackets of their own: they are no markup.
out, err = render.Screen(markup=False), render.Screen(stderr=True, markup=False)

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it


@dataclass(frozen=True, slots=True)
class Manner:
    """How the command that runs is to speak."""

    json: bool = False  # one JSON object in place of what is printed for people
    quiet: bool = False  # no progress and no notes
    verbose: bool = False  # debug logs, and tracebacks of errors


_PLAIN = Manner()
_MANNER: ContextVar[Manner] = ContextVar("manner", default=_PLAIN)

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print results and errors alone: no progress, no notes."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print debug logs too, and tracebacks of errors.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object: docs/scripting.md.")]
# Either is taken in front of the command, where help shows it, and behind it.
_QuietToo = Annotated[bool, typer.Option("--quiet", "-q", hidden=True)]
_VerboseToo = Annotated[bool, typer.Option("--verbose", "-v", hidden=True)]


def speak(quiet: bool, verbose: bool) -> None:
    """How every command speaks that is run from here on."""
    _MANNER.set(Manner(quiet=quiet, verbose=verbose))


def spoken(
    command: Callable[..., None],
    *,
    figures: bool = True,
    kept: bool = False,
    until_stopped: bool = False,
) -> Callable[..., None]:
    """``command`` with the options that all have: --quiet, --verbose and, if it prints ``figures``,
    --json. ``kept``: after Ctrl-C, running it again goes on where it was; ``until_stopped``: that
    is how it ends, and nothing is said of it."""

    @wraps(command)
    def run(
        *, as_json: bool = False, quiet: bool = False, verbose: bool = False, **given: Any
    ) -> None:
        before = _MANNER.get()
        manner = Manner(as_json, quiet or before.quiet, verbose or before.verbose)
        if manner.quiet and manner.verbose:
            raise typer.BadParameter("--quiet and --verbose contradict each other: give one")
        with _speaking(manner):
            try:
                command(**given)
            except KeyboardInterrupt:
                after = "what is done is kept: run the same command again to continue"
                if not until_stopped:
                    tell("interrupted", after if kept else "nothing more is done")
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
    signature = plain.replace(parameters=[*plain.parameters.values(), *options])
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


@contextmanager
def _speaking(manner: Manner) -> Iterator[None]:
    token = _MANNER.set(manner)
    logger, level = logging.getLogger("ragcache"), logging.getLogger("ragcache").level
    out.quiet = manner.json
    if manner.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        _MANNER.reset(token)
        out.quiet = False
        logger.setLevel(level)


def figures(found: Mapping[str, Any]) -> None:
    """Print the results of the command as one JSON object, where --json asks for it."""
    if _MANNER.get().json:
        try:
            sys.stdout.write(as_json(found) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            out.on_broken_pipe()


def as_json(found: Mapping[str, Any]) -> str:
    """JSON in ASCII, whatever is in it; numbers that are none are null."""
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
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
    """How far the work is, on stderr; with --quiet nothing is shown."""
    return nullcontext(render.ProgressReporter()) if _MANNER.get().quiet else render.progress(err)


def waiting(what: str) -> AbstractContextManager[None]:
    """Say on stderr ``what`` is under way, whose end nobody can tell."""
    return nullcontext() if _MANNER.get().quiet else render.waiting(err, what)


def loading(model: str) -> None:
    """Say on stderr that a model is being loaded, for that takes a while."""
    if not _MANNER.get().quiet:
        err.print(f"loading model {model}", highlight=False, soft_wrap=True)


def tell(label: str, text: object, style: str = "yellow") -> None:
    """A message about the work, beside its results: on stderr, on a line of its own. With --quiet,
    only what the exit code tells of: errors, that the work was interrupted, and answers from
    nothing."""
    if _MANNER.get().quiet and label not in ("error", "interrupted", "nothing to answer from"):
        return
    said = render.plain(str(text))
    err.print(Text.assemble((f"{label}:", style), f" {said}"), soft_wrap=True)
