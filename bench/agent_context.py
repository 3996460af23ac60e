"""An agent's context, made of a repository's own files and of what commands print about it.

Everything is read from one commit, so that a seed and a commit determine the context and its edits.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

SYSTEM = (
    "You are a coding agent. You work on a Python repository, and you see its files and the output "
    "of commands. Read what is given before you answer, name the file that you speak of, and never "
    "invent a function that you have not seen. Keep answers short: one or two sentences, without "
    "a list. If something is missing, say which command you would run next."
)
TASK = "Here are the files that my change touches. Read them, and look around where you need to."
QUESTION = "In one sentence: what is the last file above about, and which function matters most?"

_FILE_CHARS = 300, 4000  # of an excerpt of a file
_SUFFIXES = ".py", ".md", ".toml"
_TOOLS = ("read", "log", "list", "grep", "tests")

#: What an edit changes. A turn is an assistant's message and a tool's.
EditKind = Literal["drop", "change line", "insert line", "insert file", "move", "append turn"]
EDITS: tuple[EditKind, ...] = (
    "drop",
    "change line",
    "insert line",
    "insert file",
    "move",
    "append turn",
)


@dataclass(frozen=True)
class Repository:
    """The texts of a git repository at one commit."""

    root: Path
    commit: str

    @classmethod
    def at(cls, root: Path, revision: str = "HEAD") -> Repository:
        return cls(root, _git(root, "rev-parse", f"{revision}^{{commit}}").strip())

    @property
    def files(self) -> Sequence[str]:
        """Paths of the text files, without generated data."""
        return _files(self)

    def git(self, *command: str) -> str:
        return _git(self.root, *command)

    def read(self, path: str) -> str:
        return self.git("show", f"{self.commit}:{path}")


@dataclass(frozen=True)
class Block:
    """A text of a context that is edited as one: a pasted file, or a tool's result with the
    assistant's message before it."""

    role: Literal["user", "tool"]
    name: str
    text: str
    said: str = ""  # by the assistant before a tool's result


Context = tuple[Block, ...]


def messages(context: Context) -> list[dict[str, Any]]:
    """The chat: system, task with pasted files, turns, question. Files that stand between two
    turns are a message of the user."""
    made: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    pasted = [TASK]

    def close() -> None:
        if pasted:
            made.append({"role": "user", "content": "\n\n".join(pasted)})
            pasted.clear()

    for block in context:
        if block.role == "user":
            pasted.append(block.text)
            continue
        close()
        made.append({"role": "assistant", "content": block.said})
        made.append({"role": "tool", "content": block.text})
    close()
    return [*made, {"role": "user", "content": QUESTION}]


def initial_context(
    repository: Repository, random: Random, count: Callable[[Context], int], most: int
) -> Context:
    """A context of nearly ``most`` by ``count``: pasted files first, then turns."""
    context: Context = ()
    refused = 0
    while refused < 20:
        pastes = count(context) < 0.4 * most
        new = paste(repository, random) if pastes else turn(repository, random)
        longer = (*context, new)
        if count(longer) > most or any(new.name == block.name for block in context):
            refused += 1
        else:
            context = longer
    return context


def edited(
    context: Context,
    repository: Repository,
    random: Random,
    count: Callable[[Context], int],
    least: int,
    most: int,
) -> tuple[Context, EditKind, str]:
    """The context after one random edit that leaves ``least`` to ``most`` by ``count``, the kind of
    the edit, and what it was."""
    for _ in range(1000):
        kind = random.choice(EDITS)
        changed, what = _EDITS[kind](context, repository, random)
        if changed != context and least <= count(changed) <= most:
            return changed, kind, what
    raise ValueError(f"no edit leaves {least} to {most} tokens: give a wider range")


def paste(repository: Repository, random: Random) -> Block:
    """A file in the user's message."""
    name, text = _excerpt(repository, random)
    return Block("user", name, text)


def turn(repository: Repository, random: Random) -> Block:
    """A tool's result, and what the assistant says before it."""
    tool = random.choice(_TOOLS)
    path = random.choice(repository.files)
    folder = path.rpartition("/")[0]
    if tool == "read":
        name, text = _excerpt(repository, random)
        return Block("tool", name, text, f"I read {name}.")
    if tool == "log":
        command = ("log", "--stat", f"-{random.randint(2, 6)}", "--date=iso", repository.commit)
        shown = repository.git(*command, "--", path)
        return _result(f"git log --stat -- {path}", shown, f"Who changed {path} last?")
    if tool == "list":
        shown = repository.git("ls-tree", "-l", repository.commit, f"{folder}/" if folder else "./")
        return _result(f"git ls-tree -l HEAD {folder}/", shown, f"What else is in {folder or '.'}?")
    if tool == "grep":
        names = re.findall(r"^\s*(?:def|class) (\w{5,})", repository.read(path), re.MULTILINE)
        word = random.choice(names or ["encode"])
        shown = repository.git("grep", "-nw", word, repository.commit, "--", "*.py")
        shown = shown.replace(f"{repository.commit}:", "")
        return _result(f"git grep -nw {word}", shown, f"I search for the uses of {word}.")
    return _tests(repository, random)


def _tests(repository: Repository, random: Random) -> Block:
    """The output of pytest for the tests of one file, with the lines of one that fails."""
    path = random.choice([f for f in repository.files if f.rpartition("/")[2].startswith("test_")])
    source = repository.read(path)
    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE) or ["test_nothing"]
    failing = random.choice(names)
    lines = [f"collected {len(names)} items", ""]
    for number, name in enumerate(names, 1):
        verdict = "FAILED" if name == failing else "PASSED"
        lines.append(f"{path}::{name} {verdict} [{100 * number // len(names):3d}%]")
    body = source.partition(f"def {failing}(")[2].split("\ndef ")[0].splitlines()[:25]
    lines += ["", f"____ {failing} ____", "", f"def {failing}({''.join(body[:1])}", *body[1:]]
    lines += ["", f"==== 1 failed, {len(names) - 1} passed ===="]
    return _result(f"pytest -v {path}", "\n".join(lines), f"I run the tests in {path}.")


def _result(command: str, shown: str, said: str) -> Block:
    """A tool's result, cut at a line if it is long."""
    return Block("tool", command, f"$ {command}\n{_first_lines(shown, _FILE_CHARS[1])}", said)


def _excerpt(repository: Repository, random: Random) -> tuple[str, str]:
    """Lines of a file between tags with its path, as agents show them."""
    while True:
        path = random.choice(repository.files)
        lines = repository.read(path).splitlines(keepends=True)
        start = 0 if random.random() < 0.7 else random.randrange(len(lines))
        shown = _first_lines("".join(lines[start:]), random.randint(1000, _FILE_CHARS[1]))
        if len(shown) >= _FILE_CHARS[0]:
            where = f"{path}:{start + 1}"
            return where, f'<file path="{where}">\n{shown}\n</file>'


def _first_lines(text: str, chars: int) -> str:
    """The first whole lines of ``text``, at most ``chars`` characters."""
    if len(text) > chars:
        text = text[: max(0, text.rfind("\n", 0, chars))]
    return text.rstrip("\n")


def _drop(context: Context, _: Repository, random: Random) -> tuple[Context, str]:
    if not context:
        return context, ""
    number = random.randrange(len(context))
    return context[:number] + context[number + 1 :], f"dropped {context[number].name}"


def _change_line(context: Context, repository: Repository, random: Random) -> tuple[Context, str]:
    return _with_line(context, repository, random, insert=False)


def _insert_line(context: Context, repository: Repository, random: Random) -> tuple[Context, str]:
    return _with_line(context, repository, random, insert=True)


def _with_line(
    context: Context, repository: Repository, random: Random, *, insert: bool
) -> tuple[Context, str]:
    """Put a line of another file into a block, before a line or in its place."""
    if not context:
        return context, ""
    number = random.randrange(len(context))
    block = context[number]
    lines = block.text.split("\n")
    if len(lines) < 4:
        return context, ""
    at = random.randrange(1, len(lines) - 1)  # not the first and last, which are tags
    other = [
        line
        for line in repository.read(random.choice(repository.files)).splitlines()
        if 10 < len(line) < 200
    ]
    lines[at : at if insert else at + 1] = [random.choice(other or ["# nothing"])]
    changed = replace(block, text="\n".join(lines))
    verb = "inserted a line before" if insert else "changed"
    what = f"{verb} line {at} of {block.name}"
    return (*context[:number], changed, *context[number + 1 :]), what


def _insert_file(context: Context, repository: Repository, random: Random) -> tuple[Context, str]:
    new = paste(repository, random)
    if any(new.name == block.name for block in context):
        return context, ""
    at = random.randint(0, len(context))
    return (*context[:at], new, *context[at:]), f"inserted {new.name} as block {at}"


def _move(context: Context, _: Repository, random: Random) -> tuple[Context, str]:
    if len(context) < 2:
        return context, ""
    number = random.randrange(len(context))
    block, rest = context[number], context[:number] + context[number + 1 :]
    at = random.randint(0, len(rest))
    return (*rest[:at], block, *rest[at:]), f"moved {block.name} from {number} to {at}"


def _append_turn(context: Context, repository: Repository, random: Random) -> tuple[Context, str]:
    new = turn(repository, random)
    return (*context, new), f"appended {new.name}"


_EDITS: Mapping[EditKind, Callable[[Context, Repository, Random], tuple[Context, str]]] = {
    "drop": _drop,
    "change line": _change_line,
    "insert line": _insert_line,
    "insert file": _insert_file,
    "move": _move,
    "append turn": _append_turn,
}


@cache
def _files(repository: Repository) -> Sequence[str]:
    listed = repository.git("ls-tree", "-r", "-l", repository.commit).splitlines()
    fields = (line.split(maxsplit=4) for line in listed)
    return [
        path
        for *_, size, path in fields
        if path.endswith(_SUFFIXES) and size.isdecimal() and 600 <= int(size) <= 40_000
    ]


@cache
def _git(root: Path, *command: str) -> str:
    """What a git command prints. Raises CalledProcessError if it fails."""
    done = subprocess.run(
        ("git", "-C", str(root), *command), capture_output=True, text=True, check=True
    )
    return done.stdout
