"""The pages to look things up in, from the code: ``python docs/site/lookup.py`` writes them."""

from __future__ import annotations

import html
from pathlib import Path

import typer
from pydantic import ByteSize
from typer.cli import get_docs_for_click

from ragcache.cli import app
from ragcache.settings import ServiceSettings, Settings
from ragcache.settings.sources import FILE, PREFIX, SourcedSettings

DOCS = Path(__file__).resolve().parents[1]


def commands() -> str:
    """Every command with its arguments and options, as ``ragcache --help`` has them."""
    command = typer.main.get_command(app)
    made = get_docs_for_click(obj=command, ctx=typer.Context(command), name="ragcache")
    text = html.unescape(made).replace("```console", "```text")
    said = "What `ragcache --help` and `ragcache COMMAND --help` say.\n\n"
    return "# Commands\n\n" + said + text.split("\n", 2)[2].rstrip() + "\n"


def _table(kind: type[SourcedSettings]) -> str:
    """Settings of one kind: the default of each, and what it is."""
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = field.default
        shown = "" if default is None or default == "" else str(default)
        if isinstance(default, ByteSize):
            shown = default.human_readable() if default else "0"
        rows.append(f"| `{name}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(rows)


def settings() -> str:
    """Every setting, of stores and of the service."""
    return f"""# Settings

A setting comes from a flag, or else from the environment, or else from `{FILE}` in the working
directory, or else it has its default. Flags have the names of settings with dashes (`--top-k`),
where a [command](commands.md) has them; variables are `{PREFIX}` and the name in capitals
(`{PREFIX}TOP_K`). A key that is no setting is an error wherever it stands, and so is a value that
cannot be.

```toml
store = "/srv/kv"
model = "Qwen/Qwen2.5-0.5B-Instruct"
max_bytes = "200GB"
ram_bytes = "8GB"
top_k = 6
```

## Of a store, its model and its answers

In Python they are the fields of `ragcache.settings.Settings`, which `RagCache.open` takes.

{_table(Settings)}

## Of the service

`ragcache serve` alone uses these. In Python they are the fields of
`ragcache.settings.ServiceSettings`.

{_table(ServiceSettings)}
"""


PAGES = {"commands.md": commands, "settings.md": settings}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
