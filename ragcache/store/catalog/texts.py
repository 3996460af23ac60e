"""Settings and longer texts of a store, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragcache.text import to_bytes, to_text

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Tables

_MAX_NAME = 511  # bytes: what LMDB allows for a key


class StoredTexts:
    """Settings, such as the embedder's name, and texts of any length. Thread-safe."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def get_setting(self, name: str) -> str | None:
        """The value of a setting; None where there is none."""
        with self._tables.read() as txn:
            value = txn.get("settings", to_bytes(name))
        return None if value is None else to_text(value)

    def put_setting(self, name: str, value: str) -> None:
        """Set a setting. ``name``: 1 to 511 bytes of UTF-8, else ValueError."""
        if not 0 < len(to_bytes(name)) <= _MAX_NAME:
            raise ValueError(
                f"a setting's name takes 1 to {_MAX_NAME} bytes, not {len(to_bytes(name))}"
            )
        with self._tables.write() as txn:
            txn.put("settings", to_bytes(name), to_bytes(value))

    def settings(self, prefix: str) -> dict[str, str]:
        """All settings whose names begin with ``prefix``, by name."""
        with self._tables.read() as txn:
            names = list(txn.keys("settings", to_bytes(prefix)))
            return {to_text(name): to_text(txn.get("settings", name) or b"") for name in names}

    def drop_setting(self, name: str) -> bool:
        """Delete a setting; True if there was one."""
        with self._tables.write() as txn:
            return txn.delete("settings", to_bytes(name))

    def put_text(self, name: str, text: str) -> None:
        """Store a text under a name of up to 511 bytes, until :meth:`drop_text`."""
        with self._tables.write() as txn:
            txn.put("texts", to_bytes(name), to_bytes(text))

    def get_text(self, name: str) -> str | None:
        """The text under a name; None where there is none. Earlier releases stored texts as
        settings, which are read too."""
        with self._tables.read() as txn:
            text = txn.get("texts", to_bytes(name))
        return self.get_setting(name) if text is None else to_text(text)

    def drop_text(self, name: str) -> bool:
        """Delete a text; True if there was one."""
        with self._tables.write() as txn:
            was_stored = txn.delete("texts", to_bytes(name))
            return txn.delete("settings", to_bytes(name)) or was_stored
