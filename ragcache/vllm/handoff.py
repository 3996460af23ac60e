"""What workers hand back to whoever asked: files in one folder, each named by its ticket.

Streamed answers of vLLM have no room for what a connector says, and no answer has room for KV. A
worker_reply is there whole or not at all: it is written beside and renamed. Never anything but JSON
or safetensors. Folder 0700, files 0600: KV is as secret as its text.
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

REPLIES_FOLDER = "mailbox"  # in that of the store
_OLD_S = 3600.0  # until a worker_reply that nobody took is thrown away


def new_ticket() -> str:
    """A new ticket, which nobody can guess."""
    return secrets.token_hex(16)


class WorkerReplies:
    """Letters in ``folder``, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_report(self, ticket: str, report: Mapping[str, Any]) -> None:
        """Leave a report. A second one under the same ticket replaces the first."""
        self._write(f"{ticket}.json", json.dumps(report).encode())

    def write_kv(self, ticket: str, rank: int, ranks: int, keys: Tensor, values: Tensor) -> None:
        """Leave KV, each (layers, kv_heads, n, head_dim): the heads of one of several workers."""
        from safetensors.torch import save

        tensors = {"keys": keys.contiguous(), "values": values.contiguous()}
        self._write(f"{ticket}.{rank}", save(tensors, {"ranks": str(ranks)}))

    def take_report(self, ticket: str) -> dict[str, Any] | None:
        """The report, which is gone then; None where there is none."""
        path = self.folder / f"{ticket}.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)
        return dict(json.loads(raw))

    def take_kv(self, ticket: str) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, from all workers. StoreError where some is missing."""
        import torch

        first, ranks = self._part(ticket, 0)
        parts = [first, *(self._part(ticket, rank)[0] for rank in range(1, ranks))]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _part(self, ticket: str, rank: int) -> tuple[tuple[Tensor, Tensor], int]:
        """What one worker left, and how many there are."""
        from safetensors import safe_open

        path = self.folder / f"{ticket}.{rank}"
        if not path.is_file():
            raise StoreError(
                f"worker {rank} of vLLM has handed back no KV in {self.folder}: it and this "
                "process must see the same store folder"
            )
        with safe_open(path, framework="pt") as worker_reply:
            pair = worker_reply.get_tensor("keys"), worker_reply.get_tensor("values")
            ranks = int(worker_reply.metadata()["ranks"])
        path.unlink(missing_ok=True)
        return pair, ranks

    def delete_expired(self) -> None:
        """Throw away what nobody came for."""
        if self.folder.is_dir():
            for worker_reply in self.folder.iterdir():
                if worker_reply.stat().st_mtime < time.time() - _OLD_S:
                    worker_reply.unlink(missing_ok=True)

    def _write(self, name: str, raw: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.folder / f"{name}.{secrets.token_hex(4)}.part"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        part.replace(self.folder / name)
