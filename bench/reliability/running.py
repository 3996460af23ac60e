"""Run the service: ``ragcache serve`` in a process of its own, with two tenants."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

import httpx

HOSTILE, VICTIM = "hostile-" + "h" * 32, "victim-" + "v" * 32
_ENDS_S = 120.0


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """The result of a streamed question."""

    status: int
    ttft_s: float  # to the first piece of text, or to the end where there is none


class Running:
    """A service over the small model, at a free port of loopback, from the ``with`` on; killed at
    its end, unless it has ended. Its log is in ``folder``/log, its stores below ``folder``/store.

    ``descriptors``: how many the process may have open.
    """

    def __init__(self, folder: Path, descriptors: int | None = None, **settings: object) -> None:
        (folder / "keys").write_text(f"hostile:{HOSTILE}\nvictim:{VICTIM}\n")
        (folder / "keys").chmod(0o600)
        given = {"model": "tiny", "store": folder / "store", "keys": folder / "keys", "port": 0}
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAGCACHE_")}
        set_ = {f"RAGCACHE_{k.upper()}": str(v) for k, v in (given | settings).items()}
        limit = None
        if descriptors is not None:
            most = descriptors, descriptors
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, most)
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ragcache", "serve"],
                env=own | set_ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=limit,
                text=True,
            )
        self.url = self._listens()

    def _listens(self) -> str:
        out: IO[str] | None = self.process.stdout
        assert out is not None
        for line in out:
            if (at := line.find("http://")) >= 0:
                return line[at:].split()[0].removesuffix("/demo")
        raise RuntimeError(f"the service did not start: {self.log.read_text()[-2000:]}")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, key: str | None = VICTIM, seconds: float = 120.0) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=seconds, trust_env=False, verify=False
        )

    def ask(self, question: str, *, key: str = VICTIM, seconds: float = 60.0) -> StreamedAnswer:
        """Stream an answer of few tokens, on a connection of its own."""
        body = {"question": question, "max_tokens": 4, "stream": True}
        began = time.perf_counter()
        try:
            with self.client(key, seconds) as client:
                with client.stream("POST", "/v1/query", json=body) as response:
                    lines = response.iter_lines()
                    first = next((line for line in lines if '"delta"' in line), None)
                    taken = time.perf_counter() - began
                    whole = first is not None and [x for x in lines if x][-1] == "data: [DONE]"
                    status = response.status_code
        except httpx.HTTPError:
            return StreamedAnswer(0, time.perf_counter() - began)
        return StreamedAnswer(status if whole or status != 200 else 0, taken)

    def add(self, documents: list[dict[str, object]], *, key: str = VICTIM) -> None:
        with self.client(key) as client:
            client.post("/v1/documents", json={"documents": documents}).raise_for_status()

    def lines(self) -> list[dict[str, object]]:
        """The lines of its log."""
        found = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in found if line.startswith("{")]

    def stop(self) -> None:
        """Send SIGTERM."""
        self._stopped = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)

    def ended_s(self) -> float:
        """Seconds from :meth:`stop` to the end of the process."""
        self.process.wait(_ENDS_S)
        return time.perf_counter() - self._stopped

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
