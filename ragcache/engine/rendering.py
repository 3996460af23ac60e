"""Try out a model's chat template in a subprocess, with limits on time and memory.

A chat template is a program that comes with a model. It may loop forever or fill the memory, which
the process that renders it cannot prevent. So a template that is new on this machine is first
rendered by a subprocess. Only if that succeeds within the limits, it is rendered in this process.
The subprocess runs ``python -m ragcache.engine.rendering`` and reads JSON from standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ragcache.errors import ModelError
from ragcache.models.file_cache import cached_text

_FIX = "Change chat_template.jinja in the model's folder, or use another model."
#: Limits of CPU seconds and bytes, in addition to importing transformers.
_SECONDS, _BYTES = 5, 1 << 30
_WAIT_S = 120  # limit of elapsed time, for a busy machine
_REFUSED, _TOO_MUCH = 3, 4  # exit status: the template refuses the messages; it exceeds a limit


def check_rendering(
    tokenizer: Any,
    source: str,
    messages: list[dict[str, str]],
    *,
    documents: list[dict[str, Any]] | None = None,
    fix: str = _FIX,
) -> None:
    """Raise ModelError unless the chat template ``source`` renders ``messages`` within the limits.

    A template that refuses the messages with an error passes too. ``fix`` ends the error's message.
    """
    given = {
        "conversations": [messages],
        "chat_template": source,
        "add_generation_prompt": True,
        **({"documents": documents} if documents else {}),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    text = json.dumps(given, sort_keys=True)
    versions = [f"{name} {version(name)}" for name in ("transformers", "jinja2")]
    cached_text("template", [text, *versions], lambda: _render_in_subprocess(text, fix))


def _render_in_subprocess(text: str, fix: str) -> str:
    """Render in a subprocess. Raises ModelError if the template is broken or exceeds a limit."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ragcache.engine.rendering"],
            input=text.encode(),
            capture_output=True,
            timeout=_WAIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(_unbounded(fix)) from error
    if done.returncode in (0, _REFUSED):
        return "rendered"
    if done.returncode == 1:  # an exception of jinja or Python
        message = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(f"the chat template is broken ({message[:300]}). {fix}")
    raise ModelError(_unbounded(fix))


def _unbounded(fix: str) -> str:
    return (
        f"the chat template does not end within {_SECONDS} seconds and {_BYTES >> 20} MiB of "
        f"memory. {fix}"
    )


def _main() -> int:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    given = json.load(sys.stdin)
    _limit()
    try:
        render_jinja_template(**given)
    except TemplateSyntaxError:
        raise
    except TemplateError:
        return _REFUSED
    except (MemoryError, RecursionError, OverflowError):
        return _TOO_MUCH
    return 0


def _limit() -> None:
    """Limit CPU time and memory of this process, in addition to what it has used so far.

    On a system without such limits, the parent process still limits the elapsed time.
    """
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + _SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        mapped = _mapped()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _BYTES, mapped + _BYTES))


def _mapped() -> int:
    """Bytes of this process's address space."""
    import resource

    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(_main())
