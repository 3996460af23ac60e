"""Run work in a forked process, which inherits all imports and has no store open."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Self


class Send:
    """Sends a line to the parent process."""

    def __init__(self, into: int) -> None:
        self.into = into

    def __call__(self, line: str) -> None:
        os.write(self.into, line.encode() + b"\n")


class Child:
    """Runs ``work(send)`` in a fork; the lines that it sends are :meth:`read` here.

    The caller must have no store open, for LMDB's are of no use in a fork. Killed at the end of the
    ``with``. A process that raises writes a traceback, and exits with 1.
    """

    def __init__(self, work: Callable[[Send], object], *, quiet: bool = False) -> None:
        self._out, into = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self.status: int | None = None
        if self.pid:
            os.close(into)
            return
        os.close(self._out)
        code = 1
        try:
            if quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work(Send(into))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def read(self) -> list[str]:
        """Wait for its end; returns all complete lines that it has sent."""
        with open(self._out, "rb", closefd=False) as file:
            return [line.decode() for line in file.read().split(b"\n")[:-1]]

    def line(self) -> str:
        """The next line, without anything read ahead; "" if it ends without."""
        line = b""
        while (byte := os.read(self._out, 1)) not in (b"", b"\n"):
            line += byte
        return line.decode()

    @property
    def running(self) -> bool:
        if self.status is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status is None

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Wait for its exit code; minus the signal's number if a signal ended it."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        os.close(self._out)
