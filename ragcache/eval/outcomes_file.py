"""Save the outcomes of an evaluation after every question: to continue it, and to summarise it.

A file of outcomes is JSON Lines. The first line is the header: what the outcomes depend on. Every
other line is a question's number in its data set and its outcomes in all modes.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

from blake3 import blake3
from pydantic import TypeAdapter

from ragcache.blend.base import Blender
from ragcache.errors import ConfigError, SourceError
from ragcache.eval.dataset import EvalContext
from ragcache.eval.outcomes import AskedQuestion, ModeOutcomes, QuestionOutcome
from ragcache.models import TINY
from ragcache.planning.context import CONTEXT_REVISIONS, DEFAULT_CONTEXT
from ragcache.settings import Settings

__all__ = ["load_outcomes"]

_FORMAT = "ragcache outcomes 1"

_OUTCOMES = TypeAdapter(dict[str, QuestionOutcome])

_Header = dict[str, Any]
_Questions = dict[int, AskedQuestion]  # by number in the data set


def run_header(
    settings: Settings,
    datasets: Mapping[str, Sequence[EvalContext]],
    modes: Mapping[str, Blender],
    *,
    max_tokens: int,
    instruction: str,
) -> _Header:
    """Everything but the model's content that the outcomes of an evaluation depend on."""
    context = settings.encoding_context or DEFAULT_CONTEXT
    return {
        "format": _FORMAT,
        "model": settings.model or TINY,
        "device": settings.device,
        "dtype": settings.dtype,
        "kernels": settings.kernels,
        "codec": settings.codec or "raw",
        "encoding_context": context,
        **_revised(CONTEXT_REVISIONS.get(context, 1), "encoding_revision"),
        "max_tokens": max_tokens,
        "instruction": instruction,
        "modes": {label: _mode(made) for label, made in modes.items()},
        "datasets": {name: _dataset(contexts) for name, contexts in datasets.items()},
    }


def _mode(made: Blender) -> dict[str, Any]:
    return {"method": made.mode, "parameters": made.parameters, **_revised(made.revision)}


def _revised(revision: int, key: str = "revision") -> dict[str, Any]:
    """Files of before revisions were counted have none: they are of the first."""
    return {} if revision == 1 else {key: revision}


def _dataset(contexts: Sequence[EvalContext]) -> dict[str, Any]:
    """The number of questions, and a digest of them and their chunks."""
    entries = [asdict(context) for context in contexts]
    return {
        "questions": sum(len(context.questions) for context in contexts),
        "digest": blake3(json.dumps(entries).encode()).hexdigest(),
    }


@dataclass
class OutcomesFile:
    """A file of outcomes that is open for one run. It is locked; :meth:`close` releases it."""

    path: Path
    header: _Header
    model: str = ""  # digest of the model's fingerprint; "" before the first question
    known: dict[str, _Questions] = field(default_factory=dict)  # by data set
    torn: int = 0  # lines at the end that were incomplete, and have been removed
    _file: FileIO | None = None

    @classmethod
    def open(cls, path: Path, header: _Header) -> Self:
        """Open a file to continue the run of ``header``, or create it.

        An incomplete last line, which a killed run leaves behind, is removed. Raises ConfigError if
        the file is of another run, if another process has it open, or if it cannot be written, and
        SourceError if it is damaged.
        """
        _check_regular(path)
        try:
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"cannot save outcomes in {path}: {error.strerror}. Name a file in a folder that "
                "this user may write."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = _Content.read(path)
            if found.header is not None:
                _check_same_run(path, found.header, _plain(header))
            file.truncate(found.complete_bytes)
            opened = cls(path, header, found.model, found.questions, found.torn, file)
            if found.header is None:
                opened._write(header)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(
                f"another process saves outcomes in {path}: wait for it, or name another file"
            ) from error
        except OSError as error:
            file.close()
            raise ConfigError(_not_saved(path, error)) from error
        except BaseException:
            file.close()
            raise
        return opened

    def append(self, dataset: str, number: int, question: AskedQuestion) -> None:
        """Save a question's outcomes, so that they survive the end of this process. Raises
        ConfigError if they cannot be written."""
        self.model = question.model
        line = {"dataset": dataset, "question": number, "model": question.model}
        outcomes = {label: asdict(one) for label, one in question.outcomes.items()}
        self._write(line | {"outcomes": outcomes})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "the file is open"
        left = json.dumps(line).encode() + b"\n"
        try:
            while left:  # a disk that becomes full takes a part of it
                left = left[self._file.write(left) :]
        except OSError as error:
            raise ConfigError(_not_saved(self.path, error)) from error


def load_outcomes(*paths: Path) -> dict[str, list[ModeOutcomes]]:
    """The outcomes of saved runs by data set, for :func:`ragcache.eval.summary.figures`.

    Runs of other modes with the same model, settings and questions are joined; a mode that several
    have is taken from the first. Only questions that all of them have answered are kept. Raises
    ConfigError if the runs differ in more than modes and data sets, and SourceError for a file that
    is damaged, or holds no outcomes.
    """
    read = [(path, _Content.read(path)) for path in paths]
    joined: dict[str, list[ModeOutcomes]] = {}
    for path, content in read:
        if content.header is None or not any(content.questions.values()):
            raise SourceError(f"{path} holds no outcomes: `ragcache eval --save` writes such files")
        _check_joinable(read[0], (path, content))
    for name in dict.fromkeys(name for _, content in read for name in content.questions):
        having = [content for _, content in read if name in content.questions]
        answered = set.intersection(*(set(content.questions[name]) for content in having))
        if not answered:
            raise SourceError(
                f"the files have no question of {name} in common: continue their runs with "
                "`ragcache eval --save`"
            )
        modes = joined[name] = []
        for content in having:
            assert content.header is not None
            questions = [content.questions[name][number] for number in sorted(answered)]
            for label, made in content.header["modes"].items():
                if label not in {one.mode for one in modes}:
                    outcomes = [question.outcomes[label] for question in questions]
                    modes.append(ModeOutcomes(label, made["method"], made["parameters"], outcomes))
    return joined


@dataclass(frozen=True, slots=True)
class _Content:
    """What a file of outcomes holds."""

    header: _Header | None  # None: an empty file
    questions: dict[str, _Questions]
    model: str
    complete_bytes: int  # of its complete lines
    torn: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SourceError for a damaged line that is not the last, ConfigError for a file that
        is something else."""
        _check_regular(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise SourceError(
                f"cannot read the outcomes in {path}: {error.strerror}. Name a file that "
                "`ragcache eval --save` has written."
            ) from error
        lines = raw.splitlines(keepends=True)
        parsed = [_parsed(line) for line in lines]
        torn = int(bool(parsed) and parsed[-1] is None)
        if torn:
            parsed.pop()
        header, questions, model = None, dict[str, _Questions](), ""
        if raw and not parsed and not raw.startswith(b'{"format": "ragcache outcomes'[: len(raw)]):
            raise ConfigError(_foreign(path))
        for number, entry in enumerate(parsed, 1):
            if header is None:
                header = _checked_header(path, entry)
                continue
            try:
                dataset, question, asked = _question(header, entry)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise SourceError(
                    f"line {number} of {path} is damaged: remove it, and its question is asked "
                    "again"
                ) from error
            if model not in ("", asked.model):
                raise SourceError(
                    f"{path} has outcomes of two models: line {number} is of another one than the "
                    "line before. Name another file."
                )
            model = asked.model
            questions.setdefault(dataset, {})[question] = asked
        complete = sum(map(len, lines[: len(parsed)]))
        return cls(header, questions, model, complete, torn)


def _parsed(line: bytes) -> Any:
    """The value of a complete line; None if it is incomplete or not JSON."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _checked_header(path: Path, entry: Any) -> _Header:
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        raise ConfigError(_foreign(path))
    try:
        for made in entry["modes"].values():
            made["method"], made["parameters"].items()
        for found in entry["datasets"].values():
            found["digest"][:8], range(found["questions"])
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"line 1 of {path}, the header, is damaged: name another file") from error
    return entry


def _question(header: _Header, entry: Any) -> tuple[str, int, AskedQuestion]:
    """Data set, number and outcomes of a line. Raises KeyError, TypeError or ValueError if they
    are not those of the header."""
    dataset, number = entry["dataset"], entry["question"]
    outcomes = _OUTCOMES.validate_python(entry["outcomes"])
    if number not in range(header["datasets"][dataset]["questions"]):
        raise ValueError(f"there is no question {number} in {dataset}")
    if outcomes.keys() != header["modes"].keys():
        raise ValueError(f"these are not the modes of the header: {', '.join(outcomes)}")
    return dataset, number, AskedQuestion(str(entry["model"]), outcomes)


def _not_saved(path: Path, error: OSError) -> str:
    return (
        f"the outcomes cannot be saved in {path}: {error.strerror}. Make room, or see to its file "
        "system, and run the same command again: it asks only the questions that are not saved."
    )


def _check_regular(path: Path) -> None:
    """Raise ConfigError for a device or a pipe, which cannot be read to its end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is not a regular file: name another one for the outcomes")


def _foreign(path: Path) -> str:
    return f"{path} is not a file of outcomes of this version of ragcache: name another file"


def _check_same_run(path: Path, saved: _Header, given: _Header) -> None:
    if different := [key for key in {**given, **saved} if saved.get(key) != given.get(key)]:
        what = "; ".join(
            f"{key}: {_shown(saved, key)}, now {_shown(given, key)}" for key in different
        )
        raise ConfigError(
            f"{path} has outcomes of another run ({what}). Repeat that run, or name another file."
        )


def _check_joinable(first: tuple[Path, _Content], other: tuple[Path, _Content]) -> None:
    (path, one), (other_path, two) = first, other
    assert one.header is not None and two.header is not None
    keys = [key for key in {**one.header, **two.header} if key not in ("modes", "datasets")]
    different = [key for key in keys if one.header.get(key) != two.header.get(key)]
    if one.model != two.model and "model" not in different:
        different.append("the model's content")
    shared = one.header["datasets"].keys() & two.header["datasets"].keys()
    different += [n for n in shared if one.header["datasets"][n] != two.header["datasets"][n]]
    if different:
        raise ConfigError(
            f"{path} and {other_path} cannot be compared: they differ in {', '.join(different)}. "
            "Load them one by one."
        )


def _shown(header: _Header, key: str) -> str:
    value = header.get(key)
    if key == "modes":
        return ", ".join(
            f"{label}, revision {made['revision']}" if "revision" in made else label
            for label, made in (value or {}).items()
        )
    if key == "datasets":
        return ", ".join(
            f"{n} ({d['questions']} questions, {d['digest'][:8]})" for n, d in (value or {}).items()
        )
    return repr(value)


def _plain(header: _Header) -> _Header:
    """The header as it is read back."""
    plain: _Header = json.loads(json.dumps(header))
    return plain
