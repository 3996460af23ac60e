"""Replies of workers to the process that sent a request: files in one folder, named by a ticket.

vLLM's streamed responses cannot contain a connector's report, and no response can contain KV. A
file is written under another name and renamed, so that readers see it whole or not at all. Files
are JSON or safetensors. The folder has mode 0700 and files 0600: KV is as confidential as its text.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

REPLIES_FOLDER = "mailbox"  # in the store's folder
_MAX_AGE_S = 3600.0  # of a reply that nobody has read


def new_ticket() -> str:
    """A new random ticket of 32 hex digits."""
    return secrets.token_hex(16)


class WorkerReplies:
    """Replies in ``folder``, which is created if it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_report(self, ticket: str, report: Mapping[str, Any]) -> None:
        """Write a report. A second one with the same ticket replaces the first."""
        self._write(f"{ticket}.json", json.dumps(report).encode())

    def write_kv(self, ticket: str, rank: int, ranks: int, keys: Tensor, values: Tensor) -> None:
        """Write the KV of one worker's heads, (layers, kv_heads, n, head_dim) each."""
        from safetensors.torch import save

        tensors = {"keys": keys.contiguous(), "values": values.contiguous()}
        self._write(f"{ticket}.{rank}", save(tensors, {"ranks": str(ranks)}))

    def take_report(self, ticket: str) -> dict[str, Any] | None:
        """Read and delete a report; None if there is none."""
        path = self.folder / f"{ticket}.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)
        return dict(json.loads(raw))

    def take_kv(self, ticket: str) -> tuple[Tensor, Tensor]:
        """Read and delete the keys and values of all workers, joined along the heads.

        Each is (layers, kv_heads, n, head_dim). Raises StoreError if a worker's part is missing.
        """
        import torch

        first, ranks = self._part(ticket, 0)
        parts = [first, *(self._part(ticket, rank)[0] for rank in range(1, ranks))]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _part(self, ticket: str, rank: int) -> tuple[tuple[Tensor, Tensor], int]:
        """The KV of one worker, and the number of workers."""
        from safetensors import safe_open

        path = self.folder / f"{ticket}.{rank}"
        if not path.is_file():
            raise StoreError(
                f"worker {rank} of vLLM has returned no KV in {self.folder}: it and this "
                "process must see the same store folder"
            )
        with safe_open(path, framework="pt") as worker_reply:
            pair = worker_reply.get_tensor("keys"), worker_reply.get_tensor("values")
            ranks = int(worker_reply.metadata()["ranks"])
        path.unlink(missing_ok=True)
        return pair, ranks

    def delete_expired(self) -> None:
        """Delete replies that nobody has read for an hour."""
        if self.folder.is_dir():
            for worker_reply in self.folder.iterdir():
                if worker_reply.stat().st_mtime < time.time() - _MAX_AGE_S:
                    worker_reply.unlink(missing_ok=True)

    def _write(self, name: str, raw: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.folder / f"{name}.{secrets.token_hex(4)}.part"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        part.replace(self.folder / name)
