"""``python -m ragcache.store.disk STORE``: exits with 0 if every record of a store is valid."""

from __future__ import annotations

import sys

from ragcache.store.disk.store import DiskStore
from ragcache.store.format.checksummed import damaged_rows


def main() -> None:
    with DiskStore(sys.argv[1], readonly=True) as store:
        bad = {**store.verify(), **damaged_rows(store.tables)}
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
