"""Write the pages that are generated from the code: settings.md and commands.md."""

from __future__ import annotations

import html
from pathlib import Path

import picture
import typer
from pydantic import ByteSize
from typer.cli import get_docs_for_click

from ragcache.cli import app
from ragcache.settings import ServiceSettings, Settings
from ragcache.settings.renamed import RENAMED
from ragcache.settings.sources import FILE, PREFIX, SourcedSettings

DOCS = Path(__file__).resolve().parents[1]


def commands() -> str:
    """Every command with its arguments and options, from the texts of ``ragcache --help``."""
    command = typer.main.get_command(app)
    made = get_docs_for_click(obj=command, ctx=typer.Context(command), name="ragcache")
    text = html.unescape(made).replace("```console", "```text")
    said = "The same text as `ragcache --help` and `ragcache COMMAND --help` print.\n\n"
    return "# Commands\n\n" + said + text.split("\n", 2)[2].rstrip() + "\n"


def _table(kind: type[SourcedSettings]) -> str:
    """Name, default and description of every setting of one class."""
    rows = ["| setting | default | description |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = field.default
        shown = "" if default is None or default == "" else str(default)
        if isinstance(default, ByteSize):
            shown = default.human_readable() if default else "0"
        rows.append(f"| `{name}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(rows)


def settings() -> str:
    """Every setting of stores and of the service, and the old names that still work."""
    old = "\n".join(f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    return f"""# Settings

A setting has the value of the first of these places that gives one:

1. an option of the command line, or an argument in Python. Options have the names of settings with
   dashes (`--top-k`); [commands](commands.md) lists those of each command.
2. an environment variable: `{PREFIX}` and the name in capitals (`{PREFIX}TOP_K`).
3. the file `{FILE}` in the working directory.
4. its default.

Unknown settings and values that are not valid are errors in all of these places.

```toml
store = "/srv/kv"
model = "Qwen/Qwen2.5-0.5B-Instruct"
max_bytes = "200GB"
ram_bytes = "8GB"
top_k = 6
```

## Settings of a store

They are about the store, its model, and how questions are answered. In Python they are the fields
of `ragcache.settings.Settings`, which `RagCache.open` takes.

{_table(Settings)}

## Settings of the service

Only `ragcache serve` uses them. In Python they are the fields of
`ragcache.settings.ServiceSettings`.

{_table(ServiceSettings)}

## Old names

These names, their options and their variables still work in this release, with a warning.

| old name | new name |
|---|---|
{old}
"""


PAGES = {"commands.md": commands, "settings.md": settings}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    picture.main()


if __name__ == "__main__":
    main()
