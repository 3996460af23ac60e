"""Interpreters that have already imported ragcache, so that the commands of a page start at once.

Commands run in a real shell, in processes of their own. Only the start of the interpreter is saved:
``python`` and ``ragcache`` on the shell's PATH hand arguments, folder, environment and open files
to a process that forks for them. Where PYTHONPATH names another checkout than this one, the fork
forgets ragcache, and imports it from there.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: How wide the terminal of commands is: the console is made before the fork.
COLUMNS = "100"
_ROOT = str(Path(__file__).resolve().parent.parent)
_PRELOADED = (
    *("torch", "transformers", "sentence_transformers", "faiss", "fastapi", "rich", "pytest"),
    *("ragcache.cli", "ragcache.rag", "ragcache.engine.hf.engine"),
)
_START = "import ragcache.cli; ragcache.cli.main()"

_CLIENT = """#!{python} -SE
import json, os, socket, sys
here = socket.socket(socket.AF_UNIX)
here.connect({address!r})
asked = {first} + sys.argv[1:], os.getcwd(), dict(os.environ)
socket.send_fds(here, [json.dumps(asked).encode()], [0, 1, 2])
sys.exit(int(here.recv(8) or 70))
"""


@contextmanager
def interpreters(folder: Path) -> Iterator[Path]:
    """A folder for the front of PATH, with ``python`` and ``ragcache``; both end with the block."""
    bin, address = folder / "bin", str(folder / "warm")
    bin.mkdir(parents=True)
    for name, first in (("python", []), ("ragcache", ["-c", _START])):
        client = _CLIENT.format(python=sys.executable, address=address, first=first)
        (bin / name).write_text(client)
        (bin / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        handed = str(listening.fileno())
        process = subprocess.Popen(
            [sys.executable, __file__, handed],
            pass_fds=[int(handed)],
            env=os.environ | {"COLUMNS": COLUMNS},
        )
        try:
            yield bin
        finally:
            process.terminate()
            process.wait()


def serve(listening: socket.socket) -> None:
    """Fork for every caller, until the process is ended."""
    sys.path[0] = _ROOT
    for name in _PRELOADED:
        __import__(name)
    while True:
        caller, _ = listening.accept()
        data, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        if os.fork() == 0:
            listening.close()
            if os.fork() == 0:  # nobody has to wait for it
                caller.send(str(run(data, files)).encode())
            os._exit(0)
        os.wait()
        for file in files:
            os.close(file)
        caller.close()


def run(data: bytes, files: list[int]) -> int:
    """What the interpreter would do with these arguments: ``-c CODE``, ``-m MODULE`` or a file."""
    arguments, folder, environment = json.loads(data)
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if (checkout := os.environ["PYTHONPATH"]) != _ROOT:
        sys.path[0] = checkout
        for name in [name for name in sys.modules if name.split(".")[0] == "ragcache"]:
            del sys.modules[name]
    option, *rest = arguments
    try:
        if option == "-c":
            sys.argv = ["ragcache", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        elif option == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(option, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
