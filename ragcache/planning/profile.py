"""Measure the speeds of a model over a store once, and record them in the store."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime

import torch
from blake3 import blake3

from ragcache.engine.base import ChunkEngine, Engine
from ragcache.errors import StoreError
from ragcache.planning.cost_model import Speeds
from ragcache.planning.measure import measure_speeds
from ragcache.store.base import ChunkStore, StoredChunk
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.key import ChunkKey

__all__ = ["Profile"]

logger = logging.getLogger(__name__)

_FETCHED = 4  # chunks copied from a remote store, if none is local


class Profile:
    """The speeds of one engine over one store, measured when first needed and recorded there.

    There is a record for each combination of model, device, kernels, threads, layout, RAM tier and
    machine. If the store cannot be written, or a record is malformed, no error is raised: the next
    process measures again.
    """

    def __init__(self, engine: ChunkEngine, store: ChunkStore, catalog: Catalog) -> None:
        self.engine, self.store, self.catalog = engine, store, catalog
        self.setting = f"speeds:{_circumstances(engine, store)}"
        self._known: Speeds | None = None

    def speeds(self, sample: Callable[[], Iterable[ChunkKey]]) -> Speeds | None:
        """The known or recorded speeds, or else measured by reading chunks of ``sample``; None if
        no chunk can be read."""
        self._known = self._known or self.recorded() or self.measure(sample())
        return self._known

    def recorded(self) -> Speeds | None:
        """The speeds that an earlier process recorded; None without a valid record."""
        try:
            text = self.catalog.get_setting(self.setting)
            return None if text is None else Speeds.from_json(text)
        except (StoreError, ValueError) as error:
            logger.warning("recorded speeds cannot be used, so they are measured: %s", error)
            return None

    def measure(self, sample: Iterable[ChunkKey]) -> Speeds | None:
        """Measure again, and record the result. None if no chunk of ``sample`` is stored and
        readable, and for vLLM servers, whose speeds cannot be measured from this process."""
        if not isinstance(self.engine, Engine):
            return None
        began = time.perf_counter()
        speeds = measure_speeds(self.engine, self.store, self._found(sample))
        if speeds is None:
            return None
        self._known = replace(speeds, measured=f"{datetime.now():%F %R}")
        logger.info("speeds measured in %.1f s: %s", time.perf_counter() - began, self._known)
        if (why := self.catalog.refusal()) is not None:
            logger.info("the measured speeds are not recorded: %s", why)
            return self._known
        try:
            self.catalog.put_setting(self.setting, self._known.as_json())
        except StoreError as error:
            logger.warning("the measured speeds are not recorded: %s", error)
        return self._known

    def _found(self, sample: Iterable[ChunkKey]) -> list[StoredChunk]:
        """The chunks of ``sample`` that are stored: the local ones, if there are any.

        If all are remote, a few are first copied to this machine if there is room, since the speed
        of a network varies and is not recorded (see :attr:`Speeds.link`).
        """
        there: list[StoredChunk] = []
        try:
            for key in sample:
                if isinstance(found := self.store.get_header(key, count=False), StoredChunk):
                    there.append(found)
        except StoreError as error:
            logger.warning("chunks were left out of the measurement: %s", error)
        if there and all(chunk.is_remote for chunk in there):
            for chunk in there[:_FETCHED]:
                self.store.get(chunk.key)
            again = [self.store.get_header(chunk.key, count=False) for chunk in there]
            there = [chunk for chunk in again if isinstance(chunk, StoredChunk)]
        return [chunk for chunk in there if not chunk.is_remote] or there


def _circumstances(engine: ChunkEngine, store: ChunkStore) -> str:
    """A digest of everything that the speeds depend on."""
    described = store.description
    device = str(getattr(engine, "device", ""))
    on = [
        getattr(engine, "kernel_names", ""),
        engine.fingerprint.digest.hex(),  # the codec is in it
        device,
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        torch.get_num_threads(),
        torch.__version__,
        platform.node(),
        described.kind,
        described.layout,
        described.ram_bytes,
        list(store.remote_codecs),
    ]
    return blake3(json.dumps(on).encode()).hexdigest()
